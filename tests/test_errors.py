"Error types: held to labelled answers, each rule with its precision."

import json
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from medibuddy.data.example import Example
from medibuddy.evaluation.errors import ERROR_TYPES, count_errors, error_types, unsupported_numbers
from medibuddy.evaluation.generate import read_decision

ROWS = [json.loads(line) for line in (Path(__file__).parent / "fixtures" / "errors.jsonl").read_text(encoding="utf-8").splitlines()]


def found_in(row):
    example = Example(id="1", question="?", decision=row["gold"])
    decision = read_decision(example, row["prompt"], row["text"], row["stop_reason"])
    return error_types({**row, "decision": decision}, example)


def test_precision_and_recall_on_labelled_answers():
    right, given_types, labelled = Counter(), Counter(), Counter()
    for row in ROWS:
        found = found_in(row)
        right.update(set(found) & set(row["types"]))
        given_types.update(found)
        labelled.update(row["types"])
    assert len(ROWS) >= 60 and set(labelled) == set(ERROR_TYPES)
    print({name: f"{right[name]} of {given_types[name]} right, {labelled[name] - right[name]} missed" for name in ERROR_TYPES})
    assert sum(right.values()) >= 0.97 * sum(given_types.values())
    assert sum(right.values()) >= 0.97 * sum(labelled.values())
    assert all(right[name] >= 0.9 * given_types[name] for name in ERROR_TYPES)


def test_a_number_of_the_prompt_is_supported_however_it_is_written():
    assert unsupported_numbers("1,200 of 1200.0 took 50 mg", "Of 1200 patients, all took 50.0 mg.") == []
    assert unsupported_numbers("They took 55 mg", "They took 50 mg, 5 times") == ["55"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.sampled_from(["stop", "length"]))
def test_any_text_is_judged_and_counted_once_a_type(text, stop):
    row = {"id": "1", "prompt": "<think>\n", "text": text, "gold": "yes", "decision": None, "stop_reason": stop}
    found = error_types(row, Example(id="1", question="?", decision="yes"))
    assert len(found) == len(set(found)) and set(found) <= set(ERROR_TYPES)
    assert ("truncated" in found) == (stop == "length")
    assert count_errors([row, row], {"1": Example(id="1", question="?", decision="yes")}) == {name: 2 * (name in found) for name in ERROR_TYPES}
