"A prompt that holds its own answer stops the evaluation; worked examples come from the training rows; drawn answers continue after a kill."

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REAL_ROWS, environment, pubmedqa_rows

from medibuddy import flow
from medibuddy.data.chat import user_text
from medibuddy.data.example import Example
from medibuddy.data.sources import load_examples
from medibuddy.evaluation.guard import check_prompts, gold_in_prompt
from medibuddy.evaluation.shots import choose_shots
from medibuddy.recipe import Recipe
from medibuddy.run import UsageError, read_jsonl
from medibuddy.verification import verify

ANSWER = "The drug lowered the risk of death in men but not in women."
ROW = Example(id="r7", question="Does the drug lower the risk?", context="RESULTS: 12 of 40 men and 9 of 38 women died.", answer=ANSWER, reasoning="Men died less often in the drug arm, and women did not, so the effect depends on sex.", decision="maybe")


@pytest.mark.parametrize(("added", "what"), [
    ("Final decision: maybe", "gold decision"), ("**Final Decision:** Maybe", "gold decision"), ("final_decision: maybe", "gold decision"), ("The answer is maybe.", "gold decision"),
    (ANSWER, "reference answer"), (ANSWER.upper().replace(" ", "\n"), "reference answer"), (ROW.reasoning, "reasoning"),
])
def test_gold_in_a_prompt_is_found_where_it_stands(added, what):
    prompt = f"{user_text(ROW)}\n\n{added}\n<think>\n"
    found = gold_in_prompt(ROW, prompt)
    assert found.what == what
    assert prompt[found.start : found.end].lower().split()[0] in added.lower()
    with pytest.raises(UsageError, match=f"row r7, characters {found.start} to {found.end}, {what}"):
        check_prompts([ROW], [prompt])


@pytest.mark.parametrize("added", ["", "Final decision: no", "Answer with yes, no or maybe.", "Maybe the sample was small.", "The drug lowered the risk of death.", 'End with "Final decision: maybe".'])
def test_a_clean_prompt_passes(added):
    check_prompts([ROW], [f"{user_text(ROW)}\n\n{added}"])


def test_options_stand_in_a_prompt_by_right():
    long = "Start intravenous fluids and give broad spectrum antibiotics within the first hour"
    row = Example(id="1", question="What next?", options=(("A", long), ("B", "Wait")), answer=long, decision="A")
    check_prompts([row], [user_text(row)])
    assert gold_in_prompt(row, user_text(row) + "\nAnswer: A").what == "gold decision"


@pytest.mark.skipif(not REAL_ROWS.exists(), reason="published rows are not here")
def test_no_false_alarm_on_published_rows_and_every_planted_answer_found():
    rows = load_examples("pubmedqa", REAL_ROWS / "pubmedqa_pqal_250.json")
    check_prompts(rows, [user_text(row) for row in rows])
    for row in rows:
        assert gold_in_prompt(row, f"{user_text(row)}\nFinal decision: {row.decision}"), row.id
        assert gold_in_prompt(row, f"{row.answer}\n{user_text(row)}"), row.id


def test_shots_are_training_rows_in_an_order_of_their_own():
    rng = random.Random(1)
    train = [Example(id=f"t{i}", question="?", decision=rng.choice(["yes", "no", "maybe"])) for i in range(60)]
    chosen = choose_shots(train, 6, 3)
    assert len({row.id for row in chosen}) == 6 and {row.decision for row in chosen} == {"yes", "no", "maybe"}
    assert choose_shots(rng.sample(train, 60), 6, 3) == chosen
    assert choose_shots(train, 6, 4) != chosen


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    "A small run with worked examples and three drawn answers a question"
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "rows.json").write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    recipe = Recipe.load(
        "tiny", path=str(folder / "rows.json"), source="pubmedqa", max_steps=2, test_fraction=0.3, max_new_tokens=12, shots=2, temperature=0.8, top_p=0.9, samples=3, eval_batch_size=2, choices=True
    )
    flow.train(recipe, folder / "run")
    for stage in (flow.evaluate, flow.compare, flow.report):
        stage(folder / "run")
    return folder / "run"


def test_worked_examples_come_from_the_training_rows_and_the_run_verifies(drawn_run):
    questions = {name: {row["question"] for row in read_jsonl(drawn_run / "data" / f"{name}.jsonl")} for name in ("train", "test")}
    rows = read_jsonl(drawn_run / "generations" / "tuned.jsonl")
    for row in rows:
        shown = [question for question in questions["train"] if question in row["prompt"]]
        assert len(shown) == 2 and sum(question in row["prompt"] for question in questions["test"]) == 1
        assert len(row["samples"]) == 3 and row["text"] in [sample["text"] for sample in row["samples"]]
    assert verify(drawn_run).ok
    assert "drawn at temperature 0.8" in (drawn_run / "report.md").read_text(encoding="utf-8")


def test_choices_stand_in_rows_metrics_and_report(drawn_run):
    rows = read_jsonl(drawn_run / "generations" / "tuned.jsonl")
    assert all(set(row["choices"]) == {"yes", "no", "maybe"} for row in rows)
    scores = json.loads((drawn_run / "metrics.json").read_text(encoding="utf-8"))["tuned"]["choices"]
    assert scores["n"] == len(rows) and sum(part["n"] for part in scores["bins"]) == len(rows)
    assert "Choices by likelihood" in (drawn_run / "report.html").read_text(encoding="utf-8") and (drawn_run / "figures" / "calibration.png").exists()


def test_forced_answers_are_told_apart_and_graded_nowhere(tmp_path):
    run = tmp_path / "run"
    flow.train(Recipe.load("tiny", limit=300, max_steps=1, max_new_tokens=24, force_answer=True, perplexity=False), run)
    for stage in (flow.evaluate, flow.compare, flow.report):
        stage(run)
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    for which in ("base", "tuned"):
        rows, scores = read_jsonl(run / "generations" / f"{which}.jsonl"), found[which]
        asked = [row for row in rows if row["stop_reason"] == "length" and row["gold"] is not None]
        if which == "base":  # it has all kinds: answers cut off, answers that ended, and open questions cut off, which have no decision to force
            assert asked and any(row["stop_reason"] == "stop" for row in rows) and any(row["stop_reason"] == "length" and row["gold"] is None for row in rows)
        assert [row["id"] for row in rows if "forced" in row] == [row["id"] for row in asked]
        right = sum(row["forced"] == row["gold"] for row in asked)
        assert scores["forced"] == ({"asked": len(asked), "correct": right, "accuracy_with_them": pytest.approx((scores["correct"] + right) / scores["n"])} if asked else None)
        assert all(row["decision"] is None for row in asked) and scores["unparseable"] >= len(asked)
    for name in ("report.md", "report.html"):
        assert "Answers that were cut off" in (run / name).read_text(encoding="utf-8")
    assert verify(run).ok


def test_worked_examples_that_leave_no_room_are_found_before_training(drawn_run, tmp_path):
    recipe = Recipe.load("tiny", path=str(drawn_run.parent / "rows.json"), source="pubmedqa", max_steps=2, test_fraction=0.3, max_new_tokens=12, shots=5, max_seq_length=192)
    with pytest.raises(UsageError, match="`eval.shots` is 5"):
        flow.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_sample_in_front_is_found_behind_mended_hashes(drawn_run, tmp_path):
    from medibuddy.run import Run, write_jsonl

    run = shutil.copytree(drawn_run, tmp_path / "run")
    rows = read_jsonl(run / "generations" / "base.jsonl")
    rows[0] |= {"text": rows[0]["text"] + " altered"}
    write_jsonl(run / "generations" / "base.jsonl", rows)
    manifest = Run(run)
    manifest.record_files(["generations/base.jsonl"])
    manifest.save()
    assert any("does not stand for the answers drawn" in problem.what for problem in verify(run).problems)


def test_drawn_answers_go_on_after_a_kill_as_if_nothing_had_been(drawn_run, tmp_path):
    run = shutil.copytree(drawn_run, tmp_path / "run")
    whole = read_jsonl(run / "generations" / "tuned.jsonl")
    (run / "generations" / "tuned.jsonl").unlink()
    process = subprocess.Popen([sys.executable, "-m", "medibuddy", "evaluate", str(run)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(path.stat().st_size for path in (run / "generations").glob(".tuned-*.partial")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    flow.evaluate(run)
    assert [{**row, "seconds": 0} for row in read_jsonl(run / "generations" / "tuned.jsonl")] == [{**row, "seconds": 0} for row in whole]


def test_a_leaking_row_stops_the_evaluation_with_status_two(tmp_path, call):
    rows = pubmedqa_rows()
    for row in rows:
        row["context"]["contexts"][0] += f" Final decision: {row['final_decision']}"
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    flow.prepare(Recipe.load("tiny", path=str(tmp_path / "rows.json"), source="pubmedqa", test_fraction=0.3), tmp_path / "run")
    status, _, message = call("evaluate", tmp_path / "run", "--which", "base")
    assert status == 2 and "prompts hold their own answer" in message and "gold decision" in message
