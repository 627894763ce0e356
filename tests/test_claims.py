"Impossible percentages: every impossible one is flagged, no right one ever is."

from decimal import ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import pytest

from medibuddy.evaluation.claims import check_claim, find_claims, to_units


def possible_units(n, decimals):
    "Every percentage that n questions can give, in units of the last decimal, by exact integer arithmetic with both neighbours of a tie"
    scale, found = 100 * 10**decimals, set()
    for k in range(n + 1):
        twice, rest = divmod(2 * k * scale + n, 2 * n)
        found.add(twice)
        if rest == 0:
            found.add(twice - 1)
    return found


@pytest.mark.parametrize("decimals", [1, 2])
def test_no_false_alarm_over_every_count_up_to_two_thousand(decimals):
    "As Python prints it: every k of every n"
    for n in range(1, 2001):
        printed = {f"{100 * k / n:.{decimals}f}" for k in range(n + 1)}
        units = {to_units(text)[0] for text in printed}
        assert units <= possible_units(n, decimals)
        if n % 97 == 0 or n < 30:
            assert all(check_claim(text, n).possible for text in printed)


@pytest.mark.parametrize("n", [1, 3, 7, 8, 64, 100, 161, 500])
@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_possible_exactly_when_some_count_rounds_to_it(n, decimals):
    wanted = possible_units(n, decimals)
    step = max(1, 10**decimals * 100 // 2500)
    for units in range(0, 100 * 10**decimals + 1, step):
        text = f"{Decimal(units) / 10**decimals:.{decimals}f}"
        assert check_claim(text, n).possible == (units in wanted), text


@pytest.mark.parametrize("rounding", [ROUND_HALF_UP, ROUND_HALF_DOWN, ROUND_HALF_EVEN])
def test_every_way_of_rounding_passes(rounding):
    for n in (8, 16, 40, 200, 400, 800, 1600):
        for k in range(n + 1):
            text = str((Decimal(100 * k) / n).quantize(Decimal("0.1"), rounding=rounding))
            assert check_claim(text, n).possible


@pytest.mark.parametrize("text, wanted", [
    ("78.1 % of 100 questions", [("78.1", 100, False)]),
    ("Accuracy: 78.1% (n = 100)", [("78.1", 100, False)]),
    ("Accuracy: 78.1% (n=1,000)", [("78.1", 1000, True)]),
    ("It improved 62.8% → 78.1% on 100 test rows.", [("62.8", 100, False), ("78.1", 100, False)]),
    ("112 of 330 (33.9 %)", [("33.9", 330, True)]),
    ("112/330 = 34.1 %", [("34.1", 330, False)]),
    ("78.1 %", []),
    ("a 95 % interval of 3 questions", []),
    ("macro-F1 61.7 % (n = 100)", []),
    ("about 78.1 % of 100 questions", []),
    ("78.1 % of 2.5 million rows", []),
    ("100 questions, 5 % of 20 % of them", []),
    ("| Accuracy | 62.0 % | 78.0 % |", []),
    ("accuracy of 78.1% on the 100-question test set", [("78.1", 100, False)]),
    ("78.1% accuracy (100 samples)", [("78.1", 100, False)]),
    ("On 100 test questions, accuracy rose from 62.8% to 78.1%.", [("62.8", 100, False), ("78.1", 100, False)]),
    ("| tuned | 78.1 % | n = 100 |", [("78.1", 100, False)]),
    ("n=100, accuracy 78.1%", [("78.1", 100, False)]),
    ("PubMedQA (100 examples): 78.1%", [("78.1", 100, False)]),
    ("accuracy = 78.1% [95% CI 70-85], n = 100", [("78.1", 100, False)]),
    ("On 100 questions, 12.5% of the women answered", []),
    ("100 patients were asked, and scores fell by 3.7 %", []),
    ("Trained on 450 rows, reaching 78.1% accuracy", []),
    ("Of 100 questions answered, F1 43.2%", []),
    ("On 100 questions the answer was right; inflation was 3.7%.", []),
])
def test_reading_claims(text, wanted):
    assert [(c.percentage, c.n, c.possible) for c in find_claims(text)] == wanted


def test_the_command_flags_an_impossible_percentage_in_a_readme(call, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("Accuracy rose from 62.8 % to 78.1 % (n = 100).\n\n78.2 % of 500 questions were right.\n", encoding="utf-8")
    status, out, _ = call("check-claim", page)
    assert status == 1 and "README.md, line 1: 78.1 % of 100" in out and "500 is no" not in out
    page.write_text("78.2 % of 500 questions were right.\n", encoding="utf-8")
    assert call("check-claim", page)[0] == 0
    assert (call("check-claim", "78.1", "100")[0], call("check-claim", "78.0", "100")[0], call("check-claim", "abc", "100")[0], call("check-claim", tmp_path / "nowhere.md")[0]) == (1, 0, 2, 2)
