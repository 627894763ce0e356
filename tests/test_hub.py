"""The real `datasets` loading code on local folders laid out as the Hub's repositories are; mixtures of what came out."""

import pyarrow
import pyarrow.parquet
import pytest

from medibuddy.data.cleaning import clean
from medibuddy.data.hub import HUB, load_hub
from medibuddy.data.leaks import find_leaks
from medibuddy.data.mixtures import mix
from medibuddy.data.sources import load_examples
from medibuddy.data.splits import split_examples
from medibuddy.run import UsageError

PUBMEDQA = [{"pubid": n, "question": f"Is drug {n} safe?", "context": {"contexts": ["We looked."], "labels": ["METHODS"], "meshes": []}, "long_answer": "It is.", "final_decision": "yes"} for n in range(1, 41)]
MEDQA = [{"question": f"Which disease has sign {n}?", "answer": "gout", "options": {"A": "croup", "B": "gout", "C": "lupus", "D": "sprue"}, "meta_info": "step1", "answer_idx": "B", "metamap_phrases": ["sign"]} for n in range(30)]
MEDMCQA = [{"id": f"u-{n}", "question": f"Which nerve has root {n}?", "opa": "ulnar", "opb": "median", "opc": "radial", "opd": "sural", "cop": n % 4, "choice_type": "single", "exp": None, "subject_name": "Anatomy", "topic_name": None} for n in range(30)]
O1 = [{"Question": f"What is sign {n}?", "Complex_CoT": "Think.", "Response": "A sign of disease."} for n in range(30)]
HCM = [{"instruction": "If you are a doctor", "input": f"My toe {n} hurts.", "output": "It may be gout."} for n in range(30)]


def repository(tmp_path, name, files):
    "A folder as `huggingface-cli download` leaves it: a card with the configurations, Parquet files"
    folder = tmp_path / name
    card = ["---", "configs:"]
    for (configuration, split), rows in files.items():
        path = folder / configuration / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        if f"- config_name: {configuration}" not in card:
            card += [f"- config_name: {configuration}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
def test_configurations_and_splits(tmp_path, streaming):
    unlabeled = [{name: value for name, value in row.items() if name != "final_decision"} for row in PUBMEDQA]
    folder = repository(tmp_path, "PubMedQA", {("pqa_labeled", "train"): PUBMEDQA, ("pqa_unlabeled", "train"): unlabeled[:7]})
    examples, dropped, provenance = load_hub("pubmedqa", folder=folder, streaming=streaming)
    assert (len(examples), dropped, examples[0].id, examples[0].decision) == (40, [], "pubmedqa-1", "yes")
    assert (provenance.configuration, provenance.split, provenance.licence, len(provenance.revision)) == ("pqa_labeled", "train", "MIT", 64)
    examples, _, _ = load_hub("pubmedqa", "pqa_unlabeled", folder=folder, streaming=streaming)
    assert len(examples) == 7 and {example.decision for example in examples} == {None}


@pytest.mark.parametrize("shape, rows, split", [("medqa", MEDQA, "test"), ("medmcqa", MEDMCQA, "validation"), ("medical-o1", O1, "train"), ("healthcaremagic", HCM, "train")])
def test_every_published_shape(tmp_path, shape, rows, split):
    configuration = HUB[shape].configurations[0]
    folder = repository(tmp_path, shape, {(configuration, split): rows})
    examples, dropped, provenance = load_hub(shape, split=split, folder=folder, limit=20, streaming=True)
    assert (len(examples), dropped, provenance.split) == (20, [], split)
    if shape == "medqa":
        assert examples[0].decision == "B" and examples[0].answer == "gout" and len(examples[0].options) == 4
    if shape == "medmcqa":
        assert [example.decision for example in examples[:4]] == list("ABCD") and examples[0].specialty == "anatomy"
        assert "validation split stands in" in provenance.notice
    assert ("no licence" in provenance.notice) == (shape == "healthcaremagic")


def test_the_revision_changes_with_the_files(tmp_path):
    folder = repository(tmp_path, "a", {("default", "train"): HCM})
    before = load_hub("healthcaremagic", folder=folder, streaming=True)[2].revision
    assert before == load_hub("healthcaremagic", folder=folder, streaming=True)[2].revision
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(HCM[1:]), folder / "default" / "train-00000-of-00001.parquet")
    assert before != load_hub("healthcaremagic", folder=folder, streaming=True)[2].revision


def test_hidden_answers_are_left_out_by_name(tmp_path):
    folder = repository(tmp_path, "m", {("default", "train"): [*MEDMCQA, {**MEDMCQA[0], "id": "hidden-1", "cop": -1}]})
    examples, dropped, _ = load_hub("medmcqa", folder=folder)
    assert len(examples) == 30 and [(row.id_or_row, row.reason) for row in dropped] == [("row 31 (id hidden-1)", "the right answer is hidden")]


def test_wrong_names_say_what_there_is(tmp_path):
    folder = repository(tmp_path, "m", {("default", "train"): MEDMCQA})
    with pytest.raises(UsageError, match="use validation"):
        load_hub("medmcqa", split="test", folder=folder)
    with pytest.raises(UsageError, match="Did you mean `medmcqa`"):
        load_hub("medmcq", folder=folder)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_hub("medmcqa", split="validation", folder=folder)


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    import huggingface_hub

    def unreachable(self, *arguments, **more):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UsageError, match="cannot be reached on the Hub.*--data"):
        load_hub("medqa")


@pytest.mark.parametrize("shape, rows", [("medqa", MEDQA), ("medmcqa", MEDMCQA)])
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_choice_shapes_from_local_files(tmp_path, shape, rows, suffix):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    path = tmp_path / f"rows{suffix}"
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False)
    examples = load_examples(shape, path)
    assert len(examples) == 30 and all(example.decision in dict(example.options) for example in examples)


def test_column_map(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("frage,antwort\nIst es Gicht?,Ja es ist.\n", encoding="utf-8")
    assert load_examples("plain", path, columns={"question": "frage", "answer": "antwort"})[0].question == "Ist es Gicht?"
    assert load_examples("medical-o1", path, columns={"Question": "frage", "Response": "antwort", "Complex_CoT": "antwort"})[0].answer == "Ja es ist."
    with pytest.raises(UsageError, match="column 'answer'.*The file has"):
        load_examples("plain", path, columns={"question": "frage", "answer": "antwrt"})


def test_a_mixture_is_split_and_leak_checked_as_one(tmp_path):
    one = [row for row in clean(load_hub("medqa", folder=repository(tmp_path, "a", {("default", "train"): MEDQA}))[0]).examples]
    other = [row for row in clean(load_hub("medical-o1", folder=repository(tmp_path, "b", {("en", "train"): [{**row, "Question": MEDQA[n]["question"]} for n, row in enumerate(O1)]}))[0]).examples]
    splits = split_examples(mix({"medqa": one, "medical-o1": other}), (0.6, 0.2, 0.2))
    places = {}
    for name, part in splits.items():
        for row in part:
            places.setdefault(row.question, set()).add(name)
    assert all(len(names) == 1 for names in places.values())  # a question that both sources have is on one side
    assert not [leak for leak in find_leaks(splits["train"] + splits["validation"], splits["test"]) if leak.kind in ("exact", "normalised")]
