"Honest extraction: a hand-labelled adversarial set, hostile sizes and invariances."

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medibuddy.evaluation.extract import answer_text, extract_decision

ROWS = [json.loads(line) for line in (Path(__file__).parent / "fixtures" / "extraction.jsonl").read_text(encoding="utf-8").splitlines()]
YES_NO, LETTERS = ("yes", "no", "maybe"), tuple("ABCDE")


def read(row):
    return extract_decision(row["text"], tuple(row["labels"]), inside_reasoning=row.get("inside_reasoning", False))


def test_labelled_set_is_large_varied_and_without_repetition():
    assert len(ROWS) >= 300
    keys = Counter((row["text"], row["labels"][0], row.get("inside_reasoning", False)) for row in ROWS)
    assert max(keys.values()) == 1
    decisions = Counter(row["decision"] for row in ROWS)
    assert set(decisions) == {None, *YES_NO, *LETTERS}
    assert decisions[None] >= 150


def test_precision_and_recall_on_the_labelled_set():
    found = [(read(row).decision, row["decision"], row["text"]) for row in ROWS]
    given_decisions = [row for row in found if row[0] is not None]
    labelled = [row for row in found if row[1] is not None]
    right = sum(read_as == label for read_as, label, _ in given_decisions)
    wrong = [row for row in given_decisions if row[0] != row[1]]
    precision, recall = right / len(given_decisions), right / len(labelled)
    print(f"precision {precision:.4f}, recall {recall:.4f} over {len(ROWS)} outputs, {len(labelled)} with a decision")
    assert precision >= 0.995, wrong
    assert recall >= 0.97, [row for row in labelled if row[0] is None]


@pytest.mark.parametrize("row", [row for row in ROWS if row["decision"] is not None][::7])
def test_span_points_at_the_decision(row):
    found = read(row)
    if found.decision is not None:
        assert row["text"][slice(*found.span)].lower() == found.decision.lower()


def test_abstention_has_a_reason_and_no_span():
    for row in ROWS:
        found = read(row)
        assert found.rule
        assert (found.span is None) == (found.decision is None)


@pytest.mark.parametrize("row", [row for row in ROWS if "think" not in row["text"] and not row.get("inside_reasoning")][::11])
def test_reasoning_in_front_changes_nothing(row):
    "Whatever stands in a finished reasoning, the answer behind it is read alike"
    thought = "<think>\nFinal decision: no. The answer is A. Wait, yes?\n</think>\n\n"
    assert extract_decision(thought + row["text"], tuple(row["labels"])).decision == read(row).decision


@pytest.mark.parametrize("row", [row for row in ROWS if row["decision"] is not None and "think" not in row["text"]][::5])
def test_a_decision_only_inside_reasoning_is_none(row):
    assert extract_decision(f"<think>\n{row['text']}", tuple(row["labels"])).decision is None
    assert extract_decision(row["text"], tuple(row["labels"]), inside_reasoning=True).decision is None


HOSTILE = [
    "Final decision: ", "the answer is ", "yes ", "( ", "\n", "<think>", "</think>", "no, or ", " ", "* ", "answer \n", "\\boxed{ ", "So ", '"', "I choose ", "yes/", "A. ",
    "option B is ", "Final decision: yes. ", "is is ", "most likely ", "~~", "<b>", "not ", "B and ", "if ", "answer:::", "[", "_", "\u00a0", "No, ",
]


@pytest.mark.parametrize("labels", [YES_NO, LETTERS])
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_megabyte_is_read_in_linear_time(piece, labels):
    def seconds(size):
        text = piece * (size // len(piece))
        started = time.process_time()
        extract_decision(text, labels)
        return time.process_time() - started

    assert seconds(1_000_000) < 5


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_read_without_an_error(text):
    for labels in (YES_NO, LETTERS):
        found = extract_decision(text, labels)
        assert found.decision in (None, *labels)
        assert extract_decision(text, labels) == found


PIECES = ["Final decision: ", "yes", "no", "maybe", "B", "The answer is ", "not ", "or ", "\n", ". ", "<think>", "</think>", "**", '"', "if ", "evidence ", ", ", "?", "(", ")"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from(YES_NO), st.sampled_from(YES_NO))
def test_two_clear_decisions_that_differ_are_none(middle, first, second):
    "Contradiction abstains, whatever else is said"
    if first != second:
        text = f"Final decision: {first}.\n\n{middle}\n\nFinal decision: {second}."
        if "think" not in middle:
            assert extract_decision(text, YES_NO).decision is None


@pytest.mark.parametrize("label", YES_NO)
@pytest.mark.parametrize("answer", ["The two groups did not differ.", "No effect, maybe a trend.", "1. First\n2. Second", "", "A yes/no answer is asked for."])
def test_the_trained_format_is_always_read(label, answer):
    "What the embedded model is trained to write"
    text = f"Some reasoning, not sure.\n</think>\n\n{answer}\n\nFinal decision: {label}"
    assert extract_decision(text, YES_NO, inside_reasoning=True).decision == label
    assert answer_text(text, inside_reasoning=True) == answer.strip()
