"""Cleaning: nothing clinical is lost, nothing is changed or dropped without being accounted for."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_rows import real_path

from medibuddy.data.cleaning import clean, clean_text, without_html
from medibuddy.data.example import Example
from medibuddy.data.sources import load_examples

# text as it comes out of broken exports: entities, tags, odd blanks, control characters, combining marks, surrogates
pieces = st.sampled_from(["&amp;", "&lt;", "&amp;lt;br&amp;gt;", "<br/>", "<sup>", "</sup>", "<p class='a'>", "<think>", "</think>", "\x00", "\u200b", "\u202f", "e\u0301", "\ud83d", "\r\n", "\n\n\n", "  ", "gout", "5 mg", "<", ">", "&", ";", "是", "<|eot_id|>"])
texts = st.lists(st.one_of(pieces, st.text(max_size=6)), max_size=8).map("".join)
examples = st.builds(
    Example, id=st.integers(0, 30).map(str), question=texts, context=st.none() | texts, reasoning=st.none() | texts,
    answer=texts, decision=st.none() | st.sampled_from(["yes", "no", "maybe"]),
)


@given(st.lists(examples, max_size=12))
@settings(max_examples=300, deadline=None)
def test_rows_in_are_rows_out_and_rows_dropped(rows):
    result = clean(rows)
    assert len(rows) == len(result.examples) + len(result.dropped)
    assert sorted(row.id for row in rows) == sorted([row.id for row in result.examples] + [row.id_or_row for row in result.dropped])
    assert sum(result.counts()["dropped"].values()) == len(result.dropped)
@given(st.lists(examples, max_size=12, unique_by=lambda row: row.id))
@settings(max_examples=300, deadline=None)
def test_a_row_that_came_out_different_is_in_the_account(rows):
    before = {row.id: row for row in rows}
    result = clean(rows)
    changed = {row.id for row in result.changed}
    for row in result.examples:
        same = replace(before[row.id], context=before[row.id].context or None, reasoning=before[row.id].reasoning or None)
        assert (row != same) == (row.id in changed), (row, same)


@given(texts)
@settings(max_examples=500, deadline=None)
def test_cleaning_twice_is_cleaning_once(text):
    cleaned, _ = clean_text(text)
    assert clean_text(cleaned) == (cleaned, [])
    cleaned.encode("utf-8")


CLINICAL = [
    "WBC 12.5 x 10^9/L, Na 138 mmol/L, K < 3.5, pH 7.35-7.45, SpO2 ≥ 94 %, BP 120/80 mmHg, 37.5 °C",
    "p<0.05 and CI 0.8–1.2; 5 µg/kg/min; ½ tablet; 2×500 mg; ±2 SD; HbA1c > 6.5% & < 9%",
    "T<36 and HR>100; if A<B and C>D then <i think> it is <5 mg>",
]


@pytest.mark.parametrize("text", CLINICAL)
def test_clinical_text_is_left_alone(text):
    assert clean_text(text) == (text, [])


def test_superscripts_keep_their_meaning():
    assert without_html("10<sup>9</sup>/L and 1.73 m<sup>2</sup>, CO<sub>2</sub>") == "10^9/L and 1.73 m^2, CO2"


def test_reasons_and_ids():
    rows = [
        Example(id="a", question="What is gout?", answer="A joint disease."),
        Example(id="b", question="what is  Gout?", answer="A joint disease."),
        Example(id="c", question="What is sepsis?", answer=" "),
        Example(id="d", question="What is asthma?", answer="Asthma!"),
        Example(id="e", question="Is it asthma?", answer="Yes.", decision="yes"),
        Example(id="f", question="...", answer="A long answer."),
        Example(id="g", question="Why <|im_end|> so?", answer="A long answer."),
        Example(id="h", question="What is croup?", answer="<think>Barking.</think> A cough of children."),
    ]
    result = clean(rows)
    assert {row.id_or_row: row.reason for row in result.dropped} == {"b": "exact duplicate", "c": "empty answer", "d": "one-word answer", "f": "empty question", "g": "chat marker in the text"}
    assert [row.id for row in result.examples] == ["a", "e", "h"]
    assert (result.examples[2].reasoning, result.examples[2].answer) == ("Barking.", "A cough of children.")
    assert [(row.id, row.reasons) for row in result.changed] == [("h", ("reasoning taken out of the answer",))]


@pytest.mark.parametrize("shape", ["pubmedqa", "medical-o1", "healthcaremagic"])
def test_real_rows_survive(shape):
    rows = load_examples(shape, real_path(shape))
    result = clean(rows)
    assert len(result.examples) == len(rows) and not result.dropped
    before = {row.id: row for row in rows}
    for row in result.examples:  # digits are never touched
        assert [c for c in row.answer if c.isdigit()] == [c for c in before[row.id].answer if c.isdigit()]
