"""The embedded model and rows are what their cards say."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

import medibuddy

EMBEDDED = Path(medibuddy.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    "Every embedded row by id, with its shape"
    found = {}
    for path in sorted((EMBEDDED / "rows").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert row["id"] not in found
            found[row["id"]] = row | {"shape": path.stem}
    return found


@pytest.fixture(scope="module")
def split(rows) -> dict[str, str]:
    "The split of each id"
    splits = json.loads((EMBEDDED / "rows" / "splits.json").read_text())
    named = {i: name for name in ("validation", "test") for i in splits[name]}
    assert set(named) <= set(rows)
    return {i: named.get(i, "train") for i in rows}


def test_rows_are_many_and_in_the_published_shapes(rows):
    assert len(rows) >= 1800
    columns = {"pubmedqa": {"pubid", "question", "context", "long_answer", "final_decision"}, "medical_o1": {"Question", "Complex_CoT", "Response"}, "healthcaremagic": {"instruction", "input", "output"}}
    for row in rows.values():
        assert columns[row["shape"]] <= set(row)
    assert set(Counter(row["shape"] for row in rows.values())) == set(columns)


def test_graded_test_rows_are_many_balanced_and_a_third_in_new_wording(rows, split):
    graded = [row for i, row in rows.items() if split[i] == "test" and row["shape"] == "pubmedqa"]
    classes = Counter(row["final_decision"] for row in graded)
    assert len(graded) >= 300 and set(classes) == {"yes", "no", "maybe"}
    assert max(classes.values()) <= 2 * min(classes.values())
    new = [row for row in graded if row["source"].endswith("new-wording")]
    assert 0.3 <= len(new) / len(graded) <= 0.37
    assert not [i for i, row in rows.items() if row["source"].endswith("new-wording") and split[i] != "test"]


def test_no_fact_of_a_test_row_is_in_the_training_rows(rows, split):
    # a fact belongs to a condition or a drug; the groups name them
    groups = {name: {row["group"] for i, row in rows.items() if split[i] == name} for name in ("train", "validation", "test")}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"] and not groups["validation"] & groups["test"]
    # and the passages name the conditions and drugs that they state facts of
    subjects = {name: {mesh for i, row in rows.items() if split[i] == name and row["shape"] == "pubmedqa" for mesh in row["context"]["meshes"]} for name in ("train", "test")}
    assert len(subjects["test"]) >= 60 and not subjects["train"] & subjects["test"]


def test_new_wording_is_new(rows, split):
    from medibuddy.data.leaks import normalise

    # the question with the names taken out is its template
    def template(row):
        text = f" {normalise(row['question'])} "
        for mesh in sorted(row["context"]["meshes"], key=len, reverse=True):
            text = text.replace(f" {normalise(mesh)} ", " * ")
        return tuple(text.split()[:3])

    graded = {i: row for i, row in rows.items() if row["shape"] == "pubmedqa"}
    trained = {template(row) for i, row in graded.items() if split[i] == "train"}
    new = [template(row) for row in graded.values() if row["source"].endswith("new-wording")]
    assert sum(t in trained for t in new) / len(new) < 0.35


def test_the_base_model_is_small_plain_and_says_what_it_is():
    from safetensors import safe_open

    config = json.loads((EMBEDDED / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["head_dim"] == 64 and config["vocab_size"] <= 4096
    weights = EMBEDDED / "model" / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    with safe_open(weights, "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) <= 6_000_000
    card = (EMBEDDED / "model" / "README.md").read_text().lower()
    assert "never for care" in card and "seed" in card
    assert "never for care" in (EMBEDDED / "rows" / "README.md").read_text().lower()


def test_the_tokenizer_has_the_distill_tokens_and_template():
    from medibuddy.models.loaders import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Is it gout?"}], tokenize=False, add_generation_prompt=True)
    assert text == "<｜begin▁of▁sentence｜><｜User｜>Is it gout?<｜Assistant｜><think>\n"
    for token in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    sample = "Dose 37.5 mg; naïve café – 100 % (β-blocker)"
    assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) == sample


def test_the_facts_behind_the_rows_are_enough():
    import csv

    with open(ROOT / "nbs" / "embedded" / "conditions.csv", encoding="utf-8", newline="") as file:
        conditions = list(csv.DictReader(file))
    with open(ROOT / "nbs" / "embedded" / "drugs.csv", encoding="utf-8", newline="") as file:
        drugs = list(csv.DictReader(file))
    assert len({row["condition"] for row in conditions}) >= 120 and len({row["drug"] for row in drugs}) >= 100
    assert all(all(row[key].strip() for key in ("specialty", "finding_1", "investigation", "treatment", "red_flag")) for row in conditions)
