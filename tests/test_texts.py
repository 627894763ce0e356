"Text measures equal rouge-score and sacrebleu, every measure is tested as a family, and a missing library is said, not hidden."

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from medibuddy.data.example import Example
from medibuddy.evaluation import texts
from medibuddy.evaluation.measures import Measure, compare_measures, holm, mean_measure, text_family
from medibuddy.evaluation.metrics import metrics, pubmedqa_scores
from medibuddy.evaluation.texts import bleu_of, chrf_of, summarise_texts, text_statistics

WORDS = "the drug dose was halved after bleeding stopped; no fever, rest and ice! 20 mg Naïve".split()
texts_of_words = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
pairs_of_texts = st.lists(st.tuples(texts_of_words, texts_of_words.filter(bool)), min_size=1, max_size=8)


@settings(max_examples=120, deadline=None)
@given(pairs_of_texts)
def test_equal_to_the_reference_libraries(pairs):
    found, answers, references = summarise_texts(text_statistics(pairs)), [a for a, _ in pairs], [r for _, r in pairs]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(np.mean([scorer.score(r, a)[name].fmeasure for a, r in pairs]), abs=1e-9)
    assert found["bleu"] == pytest.approx(corpus_bleu(answers, [references]).score / 100, abs=1e-9)
    assert found["chrf"] == pytest.approx(corpus_chrf(answers, [references]).score / 100, abs=1e-9)


def test_many_sums_at_once_equal_one_by_one():
    rng = random.Random(3)
    pairs = [(" ".join(rng.choices(WORDS, k=rng.randint(0, 12))), " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))) for _ in range(30)]
    stats = text_statistics(pairs)
    draws = [[rng.randrange(30) for _ in range(30)] for _ in range(20)]
    for name, value, corpus in (("bleu", bleu_of, corpus_bleu), ("chrf", chrf_of, corpus_chrf)):
        together = value(np.stack([stats[name][draw].sum(0) for draw in draws]))
        alone = [corpus([pairs[i][0] for i in draw], [[pairs[i][1] for i in draw]]).score / 100 for draw in draws]
        assert together == pytest.approx(alone, abs=1e-9)


def test_signatures_name_the_settings():
    signatures = summarise_texts(text_statistics([("a b", "a b")]))["signatures"]
    assert signatures["bleu"].startswith("nrefs:1|") and "tok:13a" in signatures["bleu"] and "version:" in signatures["chrf"]


def test_a_missing_library_is_said_and_no_number_invented(monkeypatch):
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    found = summarise_texts(text_statistics([("rest", "rest")]))
    assert found["token_f1"] == 1.0
    assert not {"rouge1", "rougeL", "bleu", "chrf"} & set(found)
    assert all("is not installed" in found["not_computed"][name] for name in ("rouge1", "rouge2", "rougeL", "bleu", "chrf"))


def test_bertscore_is_named_and_never_a_number():
    assert summarise_texts(text_statistics([("rest", "rest")]))["not_computed"]["bertscore"].startswith("not computed")


def test_same_model_twice_is_rarely_different_in_any_measure():
    "Two answers drawn alike: Holm keeps the whole family at 5 %"
    rejected, runs, rng = 0, 60, random.Random(9)
    for _ in range(runs):
        columns = [[[rng.gauss(0, 1) for _ in range(40)] for _ in range(2)] for _ in range(4)]
        found = holm(compare_measures({str(i): mean_measure(*sides) for i, sides in enumerate(columns)}))
        rejected += any(part["p_holm"] < 0.05 for part in found.values())
    assert rejected <= 7  # P(more than 7 of 60 at 5 %) is below 0.02


def test_a_real_difference_is_found_and_its_interval_holds_it():
    rng = random.Random(5)
    base = [("the dose was halved", "rest and ice and elevation of the leg") for _ in range(60)]
    tuned = [("rest and ice and elevation of the leg" if rng.random() < 0.5 else "the dose was halved", r) for _, r in base]
    found = compare_measures(text_family(base, tuned))
    for name in ("rouge1", "rougeL", "bleu", "chrf", "exact_match"):
        low, high = found[name]["difference_ci"]
        assert low <= found[name]["difference"] <= high and found[name]["p"] < 0.001, name


def test_interval_of_a_mean_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(2)
    base, tuned = rng.random(80), rng.random(80) + 0.1
    found = compare_measures({"m": mean_measure(list(base), list(tuned))})["m"]["difference_ci"]
    expected = bootstrap((tuned - base,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)).confidence_interval
    assert found == pytest.approx([expected.low, expected.high], abs=0.006)


def test_swapping_the_two_models_mirrors_the_result():
    rng = np.random.default_rng(4)
    base, tuned = rng.random((50, 2)), rng.random((50, 2))
    one, other = (compare_measures({"m": Measure(a, b, lambda s: s[..., 0] / s[..., 1])})["m"] for a, b in ((base, tuned), (tuned, base)))
    assert one["difference"] == pytest.approx(-other["difference"]) and one["p"] == pytest.approx(other["p"], abs=0.02)


def rows_of(decisions, gold):
    return [{"id": str(i), "prompt": "", "text": "", "decision": d, "gold": g, "stop_reason": "stop", "new_tokens": 1} for i, (d, g) in enumerate(zip(decisions, gold, strict=True))]


def test_pubmedqa_scores_are_those_of_the_official_script():
    from sklearn.metrics import accuracy_score, f1_score

    rng, labels = random.Random(1), ("yes", "no", "maybe")
    for used in (labels, labels[:2]):  # the official macro-F1 averages over the labels that occur
        gold, found = rng.choices(used, k=200), rng.choices(used, k=200)
        references = {str(i): Example(id=str(i), question="?", decision=g, source="pubmedqa") for i, g in enumerate(gold)}
        scores = pubmedqa_scores(rows_of(found, gold), references)
        assert (scores["accuracy"], scores["macro_f1"]) == pytest.approx((accuracy_score(gold, found), f1_score(gold, found, average="macro")), abs=1e-12)


def test_groups_cover_every_row():
    examples = {"0": Example(id="0", question="Does it help?", answer="It " * 30, decision="yes", source="pubmedqa"), "1": Example(id="1", question="I cough. Which drug?", answer="Rest.")}
    found = metrics(rows_of(["yes", None], ["yes", None]), references=examples)
    assert {name: part["rows"] for name, part in found["by_question_type"].items()} == {"yes/no/maybe": 1, "open: which": 1}
    assert sum(part["rows"] for part in found["by_answer_length"].values()) == 2
    assert found["consultation"]["n"] == 1
