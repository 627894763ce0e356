"""From a recipe to the data folder of a run: sources, mixtures, cleaning, leaks, accounts, and what people read."""

import json
import shutil

import pytest
from conftest import DRUGS, USES, medibuddy, pubmedqa_rows
from test_hub import HCM, MEDQA, O1, repository

from medibuddy import flow
from medibuddy.data.sources import OFFICIAL_TEST_IDS
from medibuddy.recipe import Recipe, recipe_from_dict
from medibuddy.run import UsageError, read_json, read_jsonl
from medibuddy.verification import verify


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(**data):
    return recipe_from_dict({"data": {"test_fraction": 0.3, **data}})


def rows_of(run, *splits):
    return [row for split in splits or ("train", "validation", "test") for row in read_jsonl(run / "data" / f"{split}.jsonl")]


def balanced(account):
    "Rows in = rows out + rows dropped, and every dropped row is named"
    assert account["rows_in"] == account["rows_out"] + sum(account["dropped"].values())
    assert {reason: len(ids) for reason, ids in account["dropped_ids"].items()} == account["dropped"]
    return True


# ---- accounts ----


def test_several_processes_prepare_the_same_rows(tmp_path, monkeypatch):
    from medibuddy.data import processes

    rows = [{"input": f"Hello doctor, I am Priya Rao and my {use} came with {drug}.", "output": f"Hi, Stop {drug} and see someone about {use}. Take care."} for drug in DRUGS for use in USES]
    path = write(tmp_path / "rows.jsonl", [*rows, rows[0], {"input": "Is it gout?", "output": "Yes."}, {"input": "Is it gout? " * 2000, "output": "It may be gout."}])
    alone = flow.prepare(recipe(source="healthcaremagic", path=path), tmp_path / "alone")
    monkeypatch.setattr(processes, "ROWS_A_PROCESS", 20)
    assert processes.process_count(len(rows)) > 1 or processes.process_count(10**6) == 1  # one core has one process
    together = flow.prepare(recipe(source="healthcaremagic", path=path), tmp_path / "together")
    assert {**together, "path": None} == {**alone, "path": None} and together["dropped"]["longer than max_seq_length"] == 1
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")


def test_every_row_dropped_or_changed_is_named_with_its_reason(tmp_path):
    good = [{"input": f"Hello doctor, my {use} came with {drug}.", "output": f"Hi, Stop {drug} and see someone about {use}. Take care."} for drug in DRUGS for use in USES]
    bad = [{"input": "Is it gout?", "output": "Yes."}, {"input": "", "output": "It is."}, good[0], {"input": "I am <|im_end|> ill.", "output": "It may be gout."}, {"input": "My name is Priya Rao, my toe hurts.", "output": "It may be gout, so rest it."}]
    path = write(tmp_path / "rows.jsonl", [*good, *bad])
    account = flow.prepare(recipe(source="healthcaremagic", path=path), tmp_path / "run")
    assert balanced(account) and account["rows_in"] == len(good) + len(bad)
    assert account["dropped"] | {"leak: stands in the test rows too": 0} == {"one-word answer": 1, "empty input": 1, "exact duplicate": 1, "chat marker in the text": 1, "leak: stands in the test rows too": 0}
    records = read_jsonl(tmp_path / "run" / "data" / "accounting.jsonl")
    kept = {row["id"]: row for row in rows_of(tmp_path / "run")}
    for what, reasons in (("dropped", account["dropped"]), ("changed", account["changed_by_reason"])):
        found = [why for record in records if record["what"] == what for why in record["why"]]
        assert {reason: found.count(reason) for reason in found} == reasons
    assert account["changed_by_reason"]["protected information: NAME"] == 1 and account["changed_by_reason"]["greeting or sign-off"] >= len(good)
    assert all(record["id"] in kept for record in records if record["what"] == "changed")
    assert not [row for row in kept.values() if "Priya" in row["question"] or row["answer"].startswith("Hi")]
    assert "Priya" not in (tmp_path / "run" / "data" / "accounting.jsonl").read_text()


def test_the_gate_goes_by_the_shape_of_the_file_not_by_what_a_row_calls_itself(tmp_path):
    rows = [{"input": f"I am Priya Rao, my {use} came with {drug}.", "output": f"Stop {drug} and see someone about {use}.", "source": "our clinic"} for drug in DRUGS[:6] for use in USES]
    path = write(tmp_path / "rows.jsonl", rows)
    flow.prepare(recipe(source="healthcaremagic", path=path, drop_leaks=True), tmp_path / "auto")
    assert all("[NAME]" in row["question"] and row["source"] == "our clinic" for row in rows_of(tmp_path / "auto"))
    flow.prepare(recipe(source="healthcaremagic", path=path, scrub="never", drop_leaks=True), tmp_path / "never")
    assert all("Priya Rao" in row["question"] for row in rows_of(tmp_path / "never"))
    assert "switched off" in (tmp_path / "never" / "data" / "README.md").read_text()
    plain = write(tmp_path / "plain.jsonl", [{"question": row["input"], "answer": row["output"], "context": f"Note {n} of Dr. John Smith, clinic {n % 40} of the south."} for n, row in enumerate(rows)])
    flow.prepare(recipe(source="plain", path=plain, scrub="all", drop_leaks=True), tmp_path / "all")
    assert all("[NAME]" in row["question"] and "Smith" not in row["context"] for row in rows_of(tmp_path / "all"))


# ---- published data sets, pinned ----


def test_a_published_test_set_stays_the_test_set(tmp_path):
    folder = repository(tmp_path, "medqa", {("default", "train"): MEDQA[:20], ("default", "test"): MEDQA[20:]})
    account = flow.prepare(recipe(source="medqa", hub=True, path=str(folder), streaming=True, drop_leaks=True), tmp_path / "run")
    assert balanced(account)
    tested = {row["question"] for row in rows_of(tmp_path / "run", "test")}
    assert tested == {row["question"] for row in MEDQA[20:]} and account["named_test"] == {"named": 10, "kept": 10}
    facts = account["sources"][0]
    assert (facts["licence"], facts["splits"], len(facts["revision"])) == ("CC-BY-4.0", ["train", "test"], 64)


def test_the_newest_revision_is_asked_for_once_and_recorded(tmp_path, monkeypatch):
    import huggingface_hub

    from medibuddy.data import hub

    folder, asked = repository(tmp_path, "o1", {("en", "train"): O1}), []

    class Answer:
        sha = "ab" * 20

    def dataset_info(self, name, revision=None):
        asked.append((name, revision))
        return Answer

    opened = []

    def open_copy(repository, configuration, split, revision, streaming):
        opened.append((repository, revision))
        return load(str(folder), configuration, split, None, streaming)

    load = hub._open
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(hub, "_open", open_copy)  # the network's part; the copy has the same layout
    mine = recipe(source="medical-o1", hub=True, dataset_revision="main", streaming=True, drop_leaks=True)
    account = flow.prepare(mine, tmp_path / "run")
    assert asked == [("FreedomIntelligence/medical-o1-reasoning-SFT", "main")] and opened == [(asked[0][0], Answer.sha)]
    assert account["sources"][0]["revision"] == account["sha256"] == Answer.sha and account["sources"][0]["licence"] == "Apache-2.0"
    assert flow.prepare(mine, tmp_path / "run") == account and verify(tmp_path / "run").ok
    assert len(asked) == len(opened) == 1  # neither the second call nor the verification went to the network
    assert f"revision {Answer.sha[:12]}" in (tmp_path / "run" / "data" / "README.md").read_text()


def test_a_missing_licence_is_said_at_load_and_in_the_card(tmp_path):
    folder = repository(tmp_path, "hcm", {("default", "train"): [{**row, "input": f"{row['input']} It began after {DRUGS[n % 12]}."} for n, row in enumerate(HCM)]})
    done = medibuddy("prepare", "--hub", "healthcaremagic", "--data", folder, "--run", tmp_path / "run", "--set", "test_fraction=0.3", "--set", "streaming=true", "--drop-leaks", env={"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("states no licence") == 1 and "licence of healthcaremagic: none stated" in done.stdout
    assert "HealthCareMagic states no licence" in (tmp_path / "run" / "data" / "README.md").read_text()
    assert "states no licence" in read_json(tmp_path / "run" / "manifest.json")["data"]["sources"][0]["notice"]


# ---- mixtures ----


def mixture(tmp_path, **more):
    official = OFFICIAL_TEST_IDS.read_text().split()
    graded = {pmid: {"QUESTION": f"Is {DRUGS[n % 12]} {n} safe?", "CONTEXTS": [f"Study {n} of {DRUGS[n % 12]}."], "LABELS": ["AIM"], "LONG_ANSWER": f"It is, says study {n}.", "final_decision": ("yes", "no")[n % 2]} for n, pmid in enumerate([*official[:30], *map(str, range(100, 130))])}
    (tmp_path / "graded.json").write_text(json.dumps(graded))
    write(tmp_path / "o1.jsonl", [{"Question": f"How does {use} number {n} follow {drug}?", "Complex_CoT": "Think.", "Response": f"By way {n}."} for n, drug in enumerate(DRUGS) for use in USES])
    (tmp_path / "frei.csv").write_text("frage,antwort\n" + "".join(f"Was hilft bei {use} nach {drug}?,Ruhe und {drug} meiden.\n" for drug in DRUGS for use in USES))
    sources = [
        {"source": "pubmedqa", "path": str(tmp_path / "graded.json")}, {"source": "medical-o1", "path": str(tmp_path / "o1.jsonl"), "train_only": True},
        {"source": "plain", "path": str(tmp_path / "frei.csv"), "columns": {"question": "frage", "answer": "antwort"}},
    ]
    for number, changes in more.pop("changes", {}).items():
        sources[number] |= changes
    return recipe(sources=sources, drop_leaks=True, **more)


def test_a_mixture_keeps_official_test_rows_and_caps_the_rest(tmp_path):
    account = flow.prepare(mixture(tmp_path, changes={1: {"cap": 50}, 2: {"cap": 40}}), tmp_path / "run")
    assert balanced(account) and account["rows_in"] == 60 + 144 + 144
    rows = {split: rows_of(tmp_path / "run", split) for split in ("train", "validation", "test")}
    tested = {row["source"] for row in rows["test"]}
    assert "medical-o1" not in tested and {"pubmedqa", "plain"} <= tested
    assert account["named_test"] == {"named": 30, "kept": 30} and sum(row["source"] == "pubmedqa" for row in rows["test"]) == 30
    counts = {name: sum(row["source"] == name for part in rows.values() for row in part) for name in ("medical-o1", "plain")}
    lost = sum(account["dropped"].get(reason, 0) for reason in ("leak: stands in the test rows too",))
    assert 90 - lost <= sum(counts.values()) <= 90 and counts["medical-o1"] <= 50 and counts["plain"] <= 40
    assert account["source"] == "mixture of pubmedqa, medical-o1, plain" and [facts["rows"] for facts in account["sources"]] == [60, 144, 144]
    assert verify(tmp_path / "run").ok


def test_weights_set_the_shares(tmp_path):
    account = flow.prepare(mixture(tmp_path, changes={0: {"weight": 1}, 1: {"weight": 2}, 2: {"weight": 2}}), tmp_path / "run")
    left = account["dropped_ids"]["left out of the mixture"]
    # 30 free PubMedQA rows weigh 1, so 60 of each other source stay
    assert balanced(account) and len(left) == 2 * (144 - 60)


def test_a_row_of_two_sources_is_kept_once_and_a_test_row_stays_one(tmp_path):
    graded = pubmedqa_rows()
    official = OFFICIAL_TEST_IDS.read_text().split()[:len(graded)]
    write(tmp_path / "copy.jsonl", [{**row, "pubid": f"copy-{n}"} for n, row in enumerate(graded)])
    write(tmp_path / "own.jsonl", [{**row, "pubid": pmid, "group": None} if n < 8 else row for n, (row, pmid) in enumerate(zip(graded, official, strict=True))])
    account = flow.prepare(recipe(sources=[{"source": "pubmedqa", "path": str(tmp_path / "copy.jsonl"), "train_only": True}, {"source": "pubmedqa", "path": str(tmp_path / "own.jsonl")}], drop_leaks=True), tmp_path / "run")
    assert balanced(account) and account["dropped"]["exact duplicate"] == len(graded)
    assert account["named_test"] == {"named": 8, "kept": 8}


def test_one_id_for_two_rows_of_a_mixture_is_an_error(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "x", "question": "Is it gout?", "answer": "It is gout."}])
    write(tmp_path / "b.jsonl", [{"id": "x", "question": "Is it flu?", "answer": "It is flu."}])
    with pytest.raises(UsageError, match="sources 1 and 2 of the mixture have different rows with the id 'x'"):
        flow.prepare(recipe(sources=[{"source": "plain", "path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]), tmp_path / "run")


@pytest.mark.parametrize("data, words", [
    ({"sources": [{"source": "plain", "path": "a", "weight": 1}, {"source": "plain", "path": "b"}]}, ["give every source a weight, or none"]),
    ({"sources": [{"source": "plain", "path": "a", "train_only": True}]}, ["nothing would be tested on"]),
    ({"sources": [{"source": "plain", "path": "a"}], "limit": 3}, ["data.sources", "for each of them"]),
    ({"sources": [{"source": "plain", "path": "a", "wieght": 3}]}, ["data.sources[0].wieght", "Did you mean `weight`?"]),
    ({"sources": [{"source": "plain"}]}, ["data.sources[0]", "data.path"]),
    ({"benchmarks": [{"source": "medqa"}]}, ["data.benchmarks[0].path", "medqa"]),
    ({"source": "plain", "path": "a", "streaming": True}, ["data.streaming", "hub: true"]),
    ({"source": "medqa", "hub": True, "columns": {"a": "b"}}, ["data.columns"]),
    ({"source": "medqa", "hub": True, "path": "copy", "dataset_revision": "main"}, ["data.dataset_revision"]),
    ({"hub": True}, ["data.hub", "--hub pubmedqa"]),
    ({"scrub": "sometimes"}, ["data.scrub", "dialogues"]),
    ({"columns": ["a"], "source": "plain", "path": "a"}, ["data.columns", "question=frage"]),
])
def test_impossible_data_sections_are_named(data, words):
    with pytest.raises(UsageError) as caught:
        recipe_from_dict({"data": data})
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---- leaks against benchmark files ----


@pytest.fixture
def held_out(tmp_path):
    "A file of rows and a benchmark that repeats one of them, reworded"
    write(tmp_path / "rows.jsonl", [{"question": f"How does {drug} act on {use} in adults?", "answer": f"It acts on {use}."} for n, drug in enumerate(DRUGS) for use in (USES[n % len(USES)],)] + [{"question": f"Which sign of {use} is seen {n} days after onset?", "answer": f"Sign {n} is."} for n, use in enumerate(USES)])
    write(tmp_path / "held.jsonl", [{"question": f"In adults how does {drug} act on {USES[n % len(USES)]}?", "answer": "A or B."} for n, drug in enumerate(DRUGS)])
    return tmp_path


def test_a_benchmark_row_in_training_stops_the_run_or_is_dropped(held_out, call):
    options = ["prepare", "--data", held_out / "rows.jsonl", "--shape", "plain", "--benchmark", f"plain={held_out / 'held.jsonl'}", "--set", "test_fraction=0.3"]
    status, _, err = call(*options, "--run", held_out / "stops")
    assert status == 2 and "held.jsonl" in err and "--drop-leaks" in err
    status, out, _ = call(*options, "--run", held_out / "run", "--drop-leaks", "--json")
    account = json.loads(out)
    assert status == 0 and balanced(account) and account["dropped"]["leak: stands in a benchmark"] > 3
    assert not [row for row in rows_of(held_out / "run", "train", "validation") if "act on" in row["question"]]
    assert any("held.jsonl" in pairs for pairs in account["leak_pairs"]) and account["benchmarks"][0]["rows"] == 12
    assert "Held against these benchmarks" in (held_out / "run" / "data" / "README.md").read_text()
    # another benchmark is another run: its hash is part of what the stage depends on
    write(held_out / "held.jsonl", [{"question": "Nothing alike at all here?", "answer": "A or B."}])
    status, out, _ = call(*options, "--run", held_out / "run", "--drop-leaks", "--json")
    assert status == 0 and "leak: stands in a benchmark" not in json.loads(out)["dropped"]


# ---- what people read ----


def test_show_prints_real_rows_with_labels(tmp_path, call, rows_file, monkeypatch):
    options = ("prepare", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--set", "test_fraction=0.3", "--show", 3)
    status, out, _ = call(*options)
    assert status == 0 and out.count("tokens") == 3 and "\x1b" not in out  # not a terminal: no colour
    trained = out.split("⟦")[2].split("⟧")[0]
    assert trained.endswith("<｜end▁of▁sentence｜>") and "Final decision: " in trained and "</think>" in trained
    monkeypatch.setattr("medibuddy.data.show.wants_colour", lambda: True)
    coloured = call(*options)[1]
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured
    assert json.loads(call(*options, "--json")[1])["shown"].count("⟦") == 4


@pytest.mark.parametrize("terminal, variable, expected", [(True, "", True), (False, "", False), (True, "1", False)])
def test_colour_is_for_terminals_that_want_it(terminal, variable, expected, monkeypatch):
    from medibuddy.data.show import wants_colour

    class Stream:
        def isatty(self):
            return terminal

    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", "xterm")
    assert bool(wants_colour(Stream())) == expected


def test_the_card_counts_what_is_there_and_verify_watches_it(tmp_path, rows_file):
    run = tmp_path / "run"
    account = flow.prepare(Recipe.load("tiny", source="pubmedqa", path=str(rows_file), test_fraction=0.3, drop_leaks=True), run)
    card = (run / "data" / "README.md").read_text()
    rows = {split: rows_of(run, split) for split in ("train", "validation", "test")}
    for decision in ("yes", "no"):
        assert f"| {decision} | " + " | ".join(str(sum(row["decision"] == decision for row in part)) for part in rows.values()) + " |" in card
    assert "| pubmedqa | a file, SHA-256" in card and "| MIT |" in card and f"{account['rows_in']} rows were read" in card and "<｜end▁of▁sentence｜>" in card
    assert verify(run).ok
    shutil.copy(run / "data" / "README.md", tmp_path / "saved.md")
    (run / "data" / "README.md").write_text(card.replace("| MIT |", "| public domain |"))
    assert [problem.file for problem in verify(run).problems] and not verify(run).ok
    shutil.copy(tmp_path / "saved.md", run / "data" / "README.md")
    (run / "data" / "accounting.jsonl").unlink()
    assert "data/accounting.jsonl" in [problem.file for problem in verify(run).problems]


def test_multi_turn_files_go_through_the_whole_room(tmp_path):
    talks = [{"id": f"{drug}-{use}", "conversations": [
        {"from": "system", "value": "You are a doctor."}, {"from": "human", "value": f"I am Priya Rao and {drug} gives me {use}."}, {"from": "gpt", "value": "Since when?"},
        {"from": "human", "value": f"Since I doubled {drug} last week."}, {"from": "gpt", "value": f"<think>{drug} does that.</think> Then {drug} causes the {use}."},
    ]} for drug in DRUGS for use in USES[:4]]
    broken = [{"id": "odd", "conversations": talks[0]["conversations"][:4]}]
    account = flow.prepare(recipe(source="conversation", path=write(tmp_path / "talks.jsonl", talks + broken), drop_leaks=True), tmp_path / "run")
    assert balanced(account) and account["dropped"]["the turns do not alternate from a question to an answer"] == 1
    row = rows_of(tmp_path / "run", "train")[0]
    assert "[NAME]" in row["question"] and row["answer"] == "Since when?" and row["turns"][0]["reasoning"].endswith("does that.")
    shown = flow.show_training_rows(tmp_path / "run", 1)
    assert shown.count("⟦") == 3 and "causes the" in shown.split("⟦")[3]
    assert verify(tmp_path / "run").ok
