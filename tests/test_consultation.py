"What a doctor's written answer holds: held to a labelled set, and to the mistakes that were made elsewhere."

import json
from pathlib import Path

import pytest

from medibuddy.evaluation.consultation import consultation_scores, has_diagnosis, has_treatment, medical_term_ratio, structure

ROWS = [json.loads(line) for line in (Path(__file__).parent / "fixtures" / "consultation.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS, WORDS = [row for row in ROWS if "text" in row], next(row["words"] for row in ROWS if "words" in row)


@pytest.mark.parametrize(("key", "rule"), [("diagnosis", has_diagnosis), ("treatment", has_treatment), ("structure", lambda text: sorted(structure(text)))])
def test_agreement_with_the_labelled_texts(key, rule):
    wrong = [row["text"] for row in TEXTS if rule(row["text"]) != row[key]]
    assert len(TEXTS) >= 120 and len(wrong) <= 0.03 * len(TEXTS), wrong


def test_medical_words_and_others():
    missed = [word for word in WORDS["medical"] if not medical_term_ratio(word)]
    false = [word for word in WORDS["other"] if medical_term_ratio(word)]
    assert len(missed) <= 0.05 * len(WORDS["medical"]) and len(false) <= 0.02 * len(WORDS["other"]), (missed, false)


@pytest.mark.parametrize("text", ["The explanation is in the plan.", "Your explanation of the treatise was retreating.", "Are you taking insulin?", "There is no need for antibiotics."])
def test_an_explanation_is_no_treatment(text):
    assert not has_treatment(text)


def test_empty_and_long_texts():
    assert consultation_scores("", "Hello. Rest. Regards")["structure"] == 0.0
    assert has_diagnosis("You may have asthma. " * 5000)
    assert 0 <= medical_term_ratio("asthma due to infection, " * 5000) <= 1


def test_a_question_directs_no_treatment():
    assert has_treatment("You should take ibuprofen daily.") and not has_treatment("Did you take ibuprofen daily?")
