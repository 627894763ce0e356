"The claim: exact tests, intervals, verdicts, and no false alarms when nothing changed."

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, norm, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from medibuddy.data.example import Example
from medibuddy.evaluation.paired import RESAMPLES, SEED, bootstrap_intervals, compare_paired, compare_texts, macro_f1_of, mcnemar_p, sign_flip_p, tango_interval, tango_score
from medibuddy.run import UsageError

LABELS = ("yes", "no", "maybe")


def make_rows(decisions, gold, texts=None):
    texts = texts or ["It helps."] * len(gold)
    return [
        {"id": f"q{i}", "prompt": f"p{i}", "text": t, "decision": d, "gold": g, "stop_reason": "stop", "prompt_tokens": 3, "new_tokens": 5, "seconds": 0.1}
        for i, (d, g, t) in enumerate(zip(decisions, gold, texts, strict=True))
    ]


def from_counts(both, gained, lost, neither):
    gold = ["yes"] * (both + gained + lost + neither)
    base = ["yes"] * both + ["no"] * gained + ["yes"] * lost + ["no"] * neither
    tuned = ["yes"] * both + ["yes"] * gained + ["no"] * lost + [None] * neither
    return make_rows(base, gold), make_rows(tuned, gold)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda counts: sum(counts) > 0))
def test_numbers_equal_the_references(counts):
    both, gained, lost, neither = counts
    n = sum(counts)
    found = compare_paired(*from_counts(*counts), labels=LABELS)
    assert found["mcnemar_p"] == pytest.approx(binomtest(lost, gained + lost).pvalue if gained + lost else 1.0, abs=1e-9)
    assert found["mcnemar_p"] == pytest.approx(mcnemar([[both, lost], [gained, neither]], exact=True).pvalue, abs=1e-9)
    for side, correct in (("base", both + lost), ("tuned", both + gained)):
        assert found[side]["accuracy_ci"] == pytest.approx(list(proportion_confint(correct, n, method="wilson")), abs=1e-9)
    assert found["flips"] == {"gained": gained, "lost": lost} and found["discordant"] == gained + lost
    assert found["difference"]["accuracy"] == pytest.approx((gained - lost) / n)
    low, high = found["difference"]["accuracy_ci"]
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert found["tuned"]["unparseable"] == neither
    json.dumps(found, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 200))
def test_tango_interval_inverts_the_score_test(gained, lost, rest):
    n = gained + lost + rest
    low, high = tango_interval(gained, lost, n)
    z = norm.ppf(0.975)
    assert tango_score(low, gained, lost, n) == pytest.approx(z, abs=1e-6)
    assert tango_score(high, gained, lost, n) == pytest.approx(-z, abs=1e-6)
    mirrored = tango_interval(lost, gained, n)
    assert [low, high] == pytest.approx([-mirrored[1], -mirrored[0]], abs=1e-9)
    if gained + lost:  # it excludes 0 exactly when McNemar's statistic (without correction) is beyond z
        assert (low > 0 or high < 0) == (abs(gained - lost) / np.sqrt(gained + lost) > z)


def test_tango_interval_covers_the_truth():
    rng = np.random.default_rng(5)
    shares = [0.25, 0.10, 0.65]  # gained, lost, same: a true difference of 0.15
    tables = rng.multinomial(60, shares, size=2000)
    covered = sum(low <= 0.15 <= high for low, high in (tango_interval(int(g), int(lost), 60) for g, lost, _ in tables))
    assert 0.935 <= covered / 2000 <= 0.97


def test_bootstrap_of_accuracy_agrees_with_scipy_and_is_seeded():
    rng = np.random.default_rng(0)
    gold = list(rng.choice(LABELS, 300))
    base = [g if rng.random() < 0.4 else None for g in gold]
    tuned = [g if rng.random() < 0.6 else "no" for g in gold]
    found = bootstrap_intervals(gold, base, tuned, LABELS)
    assert found == bootstrap_intervals(gold, base, tuned, LABELS)
    differences = np.array([(t == g) - (b == g) for g, b, t in zip(gold, base, tuned, strict=True)], float)
    reference = bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert found["accuracy"] == pytest.approx(list(reference), abs=0.006)


def test_text_interval_equals_scipy():
    rng = np.random.default_rng(2)
    base, tuned = rng.random(150), rng.random(150)
    found = compare_texts(list(base), list(tuned))
    reference = bootstrap((tuned - base,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=400_000 // 150, rng=np.random.default_rng(SEED)).confidence_interval
    assert found["difference_ci"] == pytest.approx(list(reference), abs=1e-9)
    flips = permutation_test((tuned - base,), np.sum, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(1)).pvalue
    assert found["p"] == pytest.approx(flips, abs=0.03)


def test_sign_flip_is_exact_for_few_answers():
    differences = np.array([0.2, 0.4, -0.1, 0.3, 0.05, 0.6, -0.2])
    assert sign_flip_p(differences) == pytest.approx(permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue, abs=1e-9)


def test_macro_f1_of_many_tables_equals_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(3)
    for _ in range(50):
        gold, predicted = rng.integers(0, 3, 30), rng.integers(0, 4, 30)
        table = np.zeros((3, 4), int)
        np.add.at(table, (gold, predicted), 1)
        assert macro_f1_of(table) == pytest.approx(f1_score(gold, predicted, labels=[0, 1, 2], average="macro", zero_division=0), abs=1e-12)


@pytest.mark.parametrize("counts, verdict", [
    ((100, 120, 10, 100), "better"),
    ((100, 10, 120, 100), "worse"),
    ((150, 30, 28, 122), "no difference shown"),
    ((500, 0, 0, 500), "no difference shown"),
    ((10, 10, 0, 5), "too few questions to tell"),
    ((20, 3, 1, 20), "too few questions to tell"),
    ((0, 29, 0, 0), "too few questions to tell"),
    ((10, 20, 0, 0), "better"),
])
def test_verdicts(counts, verdict):
    found = compare_paired(*from_counts(*counts), labels=LABELS)
    assert found["verdict"] == verdict
    assert str(sum(counts)) in found["verdict_text"]


def test_no_unqualified_win_on_a_hundred_questions():
    found = compare_paired(*from_counts(40, 30, 5, 25), labels=LABELS)
    assert found["verdict"] == "better"
    assert "interval" in found["verdict_text"] and "reliably show a true difference of about" in found["verdict_text"]


@pytest.mark.parametrize("n, accuracy, agreement", [(100, 0.6, 0.7), (330, 0.4, 0.5), (500, 0.8, 0.9)])
def test_same_model_twice_is_rarely_called_different(n, accuracy, agreement):
    "A/A: two runs of equally good models; the exact test rejects at most 5 %"
    rng = np.random.default_rng(n)
    discordant = rng.binomial(n, 1 - agreement, size=2000)
    gained = rng.binomial(discordant, 0.5)
    rejected = np.mean([mcnemar_p(int(g), int(d - g)) < 0.05 for g, d in zip(gained, discordant, strict=True)])
    assert rejected <= 0.05


def test_same_model_twice_through_the_whole_comparison():
    rng = np.random.default_rng(11)
    verdicts = []
    for _ in range(60):
        gold = list(rng.choice(LABELS, 120))
        base, tuned = ([g if rng.random() < 0.6 else str(rng.choice(LABELS)) for g in gold] for _ in range(2))
        verdicts.append(compare_paired(make_rows(base, gold), make_rows(tuned, gold), labels=LABELS)["verdict"])
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= 7  # 60 x 5 % and sampling error


def test_sources_are_adjusted_by_holm():
    gold = ["yes"] * 180
    base = ["no"] * 180
    tuned = [["yes", "no"][i % 60 > 8 + 2 * (i // 60)] for i in range(180)]
    references = {f"q{i}": Example(id=f"q{i}", question="?", answer="It helps.", source="abc"[i // 60]) for i in range(180)}
    found = compare_paired(make_rows(base, gold), make_rows(tuned, gold), references)
    raw = [part["mcnemar_p"] for part in found["by_source"].values()]
    assert [part["p_holm"] for part in found["by_source"].values()] == pytest.approx(list(multipletests(raw, method="holm")[1]), abs=1e-12)
    assert sum(part["n"] for part in found["by_source"].values()) == found["n"]


def test_unlike_questions_are_refused_by_name():
    base, tuned = from_counts(2, 1, 1, 1)
    with pytest.raises(UsageError, match="'q4' was answered by the base model and not by the tuned"):
        compare_paired(base, tuned[:-1])
    with pytest.raises(UsageError, match="'q0' was answered by the tuned model and not by the base"):
        compare_paired(base[1:], tuned)
    for key, value, what in [("prompt", "p1 ", "different prompt"), ("gold", "no", "different gold label")]:
        changed = [dict(row) for row in tuned]
        changed[1][key] = value
        with pytest.raises(UsageError, match=f"'q1' has a {what}"):
            compare_paired(base, changed)


def test_order_of_rows_does_not_matter():
    base, tuned = from_counts(20, 9, 4, 20)
    assert compare_paired(base, tuned) == compare_paired(base, tuned[::-1])


def test_verdict_rests_on_texts_without_graded_rows():
    gold = [None] * 50
    references = {f"q{i}": Example(id=f"q{i}", question="?", answer="Rest and ice.") for i in range(50)}
    found = compare_paired(make_rows(gold, gold), make_rows(gold, gold, ["Rest, ice and time."] * 50), references)
    assert (found["n"], found["mcnemar_p"], found["verdict"], found["verdict_rests_on"]) == (0, None, "better", "texts")
    json.dumps(found, allow_nan=False)
