"The red flags, measured on the labelled set, and what they must never do"

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medibuddy.chat.red_flags import load_rules
from medibuddy.chat.safety import DISCLAIMER, check_message, find_red_flags, guard_reply
from medibuddy.run import UsageError

ROWS = [json.loads(line) for line in (Path(__file__).parent / "fixtures" / "safety_messages.jsonl").read_text(encoding="utf-8").splitlines()]
POSITIVE = [row for row in ROWS if row["expected"]]
BENIGN = [row for row in ROWS if not row["expected"]]


def part(row):
    "Which part of the set a row belongs to: fixed by its id, before any rule was tuned"
    batch = row["id"].split("-")[0]
    if batch != "safety":
        return batch
    return "development" if hashlib.sha256(row["id"].encode()).digest()[0] < 128 else "held-out"


def names(message):
    return {flag.name for flag in find_red_flags(message)}


def test_the_set_is_sound():
    assert len(ROWS) >= 450
    assert len({row["id"] for row in ROWS}) == len({row["message"] for row in ROWS}) == len(ROWS)
    assert all(set(row) == {"id", "message", "expected", "kind"} for row in ROWS)
    assert {name for row in ROWS for name in row["expected"]} == set(load_rules().flags)
    halves = [part(row) for row in ROWS if row["id"].startswith("safety-")]
    assert 0.4 < halves.count("development") / len(halves) < 0.6


def test_recall_and_false_alarms():
    missed = [row["message"] for row in POSITIVE if not names(row["message"])]
    alarmed = [row["message"] for row in BENIGN if names(row["message"])]
    assert len(missed) <= 0.01 * len(POSITIVE), missed
    assert len(alarmed) <= 0.03 * len(BENIGN), alarmed


def test_the_right_flag_is_named():
    wrong = [(row["message"], row["expected"]) for row in POSITIVE if not names(row["message"]) & set(row["expected"])]
    assert len(wrong) <= 0.03 * len(POSITIVE), wrong


@pytest.mark.parametrize("name", sorted(load_rules().flags))
def test_every_flag_is_found_somewhere(name):
    rows = [row for row in POSITIVE if name in row["expected"]]
    found = [row for row in rows if name in names(row["message"])]
    assert len(rows) >= 5 and len(found) >= 0.6 * len(rows)


def test_spans_stand_in_the_message():
    for row in POSITIVE:
        for flag in find_red_flags(row["message"]):
            start, end = flag.span
            assert 0 <= start < end <= len(row["message"])


@pytest.mark.parametrize(
    "message",
    [
        "No chest pain, no arm weakness, no slurred speech.",
        "My father died of a heart attack.",
        "What is a stroke?",
        "How is sepsis treated?",
        "I had a stroke in 2010.",
        "the chest pain has gone 3 years ago",
        "chess pain after losing the tournament",
        "My dog is having a seizure",
        "",
        "   \n\t",
        "🙂🙂🙂",
        "胸が痛い",
    ],
)
def test_silence(message):
    assert find_red_flags(message) == []
    assert check_message(message) is None
    assert guard_reply(message, "The reply.") == "The reply."


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("MY WIFE CANNOT MOVE HER ARM", "stroke"),
        ("No fever. No cough. But I can't breathe.", "severe breathing difficulty"),
        ("no fever but the worst headache of my life, came on in seconds", "thunderclap headache"),
        ("I had a stent 3 years ago and now I have crushing chest pain", "myocardial infarction"),
        ("My dog found him: my dad is unconscious.", "unconscious"),
        ("glucose 2.1 mmol/l", "hypoglycaemia"),
        ("glucose 41 mg/dl", "hypoglycaemia"),
        ("My baby is 2 months old and has a temp of 102 F", "feverish child"),
        ("I can’t breathe", "severe breathing difficulty"),
        ("he is having an anaphylactic reaction", "anaphylaxis"),
        ("siezure now, he is having a siezure", "seizure"),
        ("haemorrhaging, won't stop, blood everywhere", "major bleeding"),
        ("hemorrhaging, won't stop, blood everywhere", "major bleeding"),
    ],
)
def test_wording(message, name):
    assert name in names(message)


@pytest.mark.parametrize(("reading", "found"), [("2.1", True), ("6.1", False)])
def test_a_blood_sugar_turns_the_answer(reading, found):
    assert ("hypoglycaemia" in names(f"my sugar is {reading} and I'm asking what to eat")) is found


@pytest.mark.parametrize(("reading", "found"), [("36.9", False), ("38.4", True)])
def test_a_temperature_turns_the_answer(reading, found):
    assert ("feverish child" in names(f"My baby is 6 weeks old, temperature {reading}")) is found


def test_emergency_advice_comes_before_the_model():
    reply = guard_reply("My husband's face is drooping and his arm is weak", "MODEL")
    assert reply.endswith("\n\nMODEL") and "seek emergency care now" in reply.lower().split("model")[0]


def test_crisis_has_words_of_its_own():
    reply = check_message("I want to kill myself")
    assert reply.ask_model and "988" in reply.text and "116 123" in reply.text
    assert "This may be an emergency" not in reply.text


@pytest.mark.parametrize("message", [row["message"] for row in POSITIVE if row["expected"] == ["harmful request"]][::3])
def test_harmful_requests_never_reach_the_model(message):
    reply = check_message(message)
    if "harmful request" in names(message):
        assert not reply.ask_model and "MODEL" not in guard_reply(message, "MODEL")


def test_the_flag_at_the_end_of_a_long_message_is_found():
    filler = "We went to the market and bought apples, pears and a new kettle for my sister. " * 400
    assert "stroke" in names(filler + "Now the right side of her face has dropped.")


def test_every_answer_cites_its_source():
    for flag in load_rules().flags.values():
        assert flag.source and "http" not in flag.source
    for row in POSITIVE[::10]:
        assert all(flag.source and "{" not in flag.advice for flag in find_red_flags(row["message"]))


def test_the_same_message_gets_the_same_answer():
    for row in ROWS[::7]:
        assert find_red_flags(row["message"]) == find_red_flags(row["message"])


def million(kind):
    "A hostile or ordinary message of about a million characters"
    dice = random.Random(0)
    if kind == "letters":
        return "".join(dice.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(1_000_000))
    unit = {
        "spaces": " ",
        "one word": "a",
        "no stop": "chest ",
        "denials": "no chest pain, ",
        "gaps": "pain in the arm my face ",
        "digits": "1.",
        "brackets": "((((",
        "sentences": "My tummy aches a bit after the gym. ",
        "numbers": None,
    }[kind]
    if unit is None:
        return " ".join(f"no chest pain on day {at}." for at in range(40_000))
    return (unit * (1_000_000 // len(unit) + 1))[:1_000_000]


@pytest.mark.parametrize("kind", ["spaces", "one word", "no stop", "denials", "gaps", "digits", "brackets", "sentences", "numbers", "letters"])
def test_a_megabyte_is_read_in_linear_time(kind):
    load_rules()
    message = million(kind)

    def fastest(text):  # the fastest of three: other work on the machine slows single runs
        times = []
        for _ in range(3):
            start = time.process_time()
            check_message(text)
            times.append(time.process_time() - start)
        return min(times)

    whole, quarter = fastest(message), fastest(message[: len(message) // 4])
    # four times the text: 4 in linear time, 16 in quadratic
    assert whole < 8 * quarter + 0.1, f"{kind}: {whole:.2f} s for the whole, {quarter:.2f} s for a quarter"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_no_text_breaks_it(message):
    for flag in find_red_flags(message):
        assert 0 <= flag.span[0] < flag.span[1] <= len(message)


@pytest.mark.parametrize("message", [None, 3, b"chest pain", ["chest pain"]])
def test_no_text_at_all_is_refused(message):
    with pytest.raises(UsageError, match="`message`"):
        check_message(message)


def test_import_is_light():
    code = "import sys, medibuddy.chat.safety; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_disclaimer_says_what_it_must():
    assert "research only" in DISCLAIMER and "not for care" in DISCLAIMER
