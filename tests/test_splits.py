"""Splits that depend on content only, and a leak gate that finds what was planted and nothing else."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_rows import real_path

from medibuddy.data.cleaning import clean
from medibuddy.data.example import Example, Turn
from medibuddy.data.gather import Gathered
from medibuddy.data.leaks import find_leaks, one_slip
from medibuddy.data.prepare import clean_sources, mix_sources, split_sources
from medibuddy.data.sources import load_examples, named_splits
from medibuddy.data.splits import group_key, split_examples, stratification
from medibuddy.recipe import DataConfig, MixtureSource
from medibuddy.run import UsageError

ROWS = [Example(id=f"r{n}", question=f"Does drug {n} help in disease {n % 50}?", answer="It does.", decision=("yes", "no", "maybe")[n % 3], group=f"g{n % 200}" if n % 2 else None) for n in range(1000)]


def places(splits):
    return {row.id: name for name, part in splits.items() for row in part}


def test_every_row_is_in_one_split():
    splits = split_examples(ROWS)
    assert sum(map(len, splits.values())) == len(ROWS) == len(places(splits))
    assert 60 < len(splits["test"]) < 140 and 60 < len(splits["validation"]) < 140


def test_written_down_once():
    # the same on every machine and version: these are SHA-256 positions, not a generator's
    splits = places(split_examples(ROWS[:12], (0.4, 0.3, 0.3)))
    assert splits == {"r0": "train", "r1": "train", "r2": "train", "r3": "train", "r6": "train", "r8": "train", "r10": "train", "r11": "train", "r7": "validation", "r9": "validation", "r4": "test", "r5": "test"}


@given(st.randoms(use_true_random=False), st.integers(300, 900))
@settings(max_examples=20, deadline=None)
def test_adding_and_shuffling_rows_moves_none(generator, count):
    whole = places(split_examples(ROWS))
    part = generator.sample(ROWS, count)
    assert all(whole[name] == split for name, split in places(split_examples(part)).items())


def test_groups_stay_together():
    splits = places(split_examples(ROWS))
    for group in {row.group for row in ROWS if row.group}:
        assert len({splits[row.id] for row in ROWS if row.group == group}) == 1


def test_same_question_and_same_article_stay_together():
    abstract = "We studied eighty-three elderly patients who underwent appendectomy and compared their leukocyte counts with those of healthy controls of the same age."
    twins = [Example(id=f"a{n}", question=f"Question number {n}?", context=abstract) for n in range(30)]
    same = [Example(id=f"b{n}", question="what is GOUT" + "?" * (n % 3), answer=f"Answer {n}.") for n in range(30)]
    assert len({group_key(row) for row in twins}) == 1 == len({group_key(row) for row in same})


def test_larger_test_sets_contain_smaller_ones():
    smaller, larger = (places(split_examples(ROWS, fractions)) for fractions in ((0.8, 0.1, 0.1), (0.6, 0.1, 0.3)))
    assert {name for name, split in smaller.items() if split == "test"} <= {name for name, split in larger.items() if split == "test"}


def test_classes_are_balanced_on_average():
    rows = [replace(row, group=None) for row in ROWS]
    shares = stratification(split_examples(rows))["test"]
    assert all(abs(share - 1 / 3) < 0.12 for share in shares.values()), shares


def test_named_test_set_is_exactly_that():
    splits = split_examples(ROWS, named={"test": [f"r{n}" for n in range(100)]})
    assert {row.id for row in splits["test"]} == {f"r{n}" for n in range(100)}
    assert 50 < len(splits["validation"]) < 160
    everything = split_examples(ROWS, named={"validation": ["r900"], "test": ["r1"]})
    assert (len(everything["train"]), len(everything["validation"]), len(everything["test"])) == (998, 1, 1)
    with pytest.raises(UsageError, match="'r1'.* into both validation and test"):
        split_examples(ROWS, named={"validation": ["r900", "r1"], "test": ["r1"]})


def test_too_few_rows():
    for count in range(1, 4):
        with pytest.raises(UsageError, match=r"About \d+ different questions are needed"):
            split_examples([replace(row, group=None) for row in ROWS[4:4 + count]])


# ---- leaks ----


def typos(text, generator):
    words = text.split(" ")
    candidates = [place for place, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for place in generator.sample(candidates, min(len(candidates), max(1, len(words) // 16))):
        word = words[place]
        at = generator.randrange(1, len(word) - 1)
        words[place] = generator.choice([word[:at] + word[at + 1:], word[:at] + word[at] + word[at:], word[:at] + word[at + 1] + word[at] + word[at + 2:], word[:at] + "x" + word[at + 1:]])
    return " ".join(words)


def reordered(text, generator):
    clauses = re.split(r"(?<=[.!?;,])\s+", text.strip())
    if len(clauses) == 1:
        words = text.split()
        cut = generator.randrange(1, max(2, len(words)))
        clauses = [" ".join(words[:cut]), " ".join(words[cut:])]
    cut = generator.randrange(1, max(2, len(clauses)))
    return " ".join(clauses[cut:] + clauses[:cut])


def punctuated(text, generator):
    changed = re.sub(r"[.,;:?!]", lambda _: generator.choice(["", " ;", "!", " ..."]), text)
    return changed.upper() if generator.random() < 0.3 else changed


def appended(text, generator):
    return text + " " + generator.choice(["Please answer carefully.", "I would be grateful for your advice on this matter.", "Thank you very much for your time.", "Explain your answer before the conclusion.", "This has been going on for weeks and I am worried."])


@pytest.fixture(scope="module", params=["pubmedqa", "medical-o1", "healthcaremagic"])
def real(request):
    rows = clean(load_examples(request.param, real_path(request.param))).examples
    random.Random(0).shuffle(rows)
    third = len(rows) // 3
    return rows[third:], rows[:third]


def found(train, planted, test):
    pairs = {(leak.train_id, leak.test_id) for leak in find_leaks(train + planted, test)}
    return sum((copy.id, row.id) in pairs for copy, row in zip(planted, test, strict=True)) / len(test)


def test_planted_exact_leaks_are_all_found(real):
    train, test = real
    copies = [replace(row, id=f"copy-{row.id}") for row in test]
    leaks = find_leaks(train + copies, test)
    assert {leak.test_id for leak in leaks if leak.kind == "exact" and leak.similarity == 1} == {row.id for row in test}
    shouted = [replace(row, id=f"copy-{row.id}", question=row.question.upper() + " !", context=row.context and row.context.replace(" ", "  ")) for row in test]
    assert found(train, shouted, test) == 1


@pytest.mark.parametrize("rewrite", [typos, reordered, punctuated, appended])
def test_planted_paraphrases_are_found(real, rewrite):
    train, test = real
    generator = random.Random(3)
    copies = [replace(row, id=f"copy-{row.id}", question=rewrite(row.question, generator), context=row.context and rewrite(row.context, generator)) for row in test]
    assert found(train, copies, test) >= 0.95


@pytest.mark.parametrize("rewrite", [typos, reordered, punctuated, appended])
def test_the_question_alone_is_enough(real, rewrite):
    train, test = real
    generator = random.Random(4)
    copies = [replace(row, id=f"copy-{row.id}", question=rewrite(row.question, generator), context=None) for row in test]
    assert found(train, copies, test) >= 0.95


def test_a_passage_inside_a_prompt_is_found():
    rows = clean(load_examples("pubmedqa", real_path("pubmedqa"))).examples
    train, test = rows[50:], rows[:50]
    prompts = [Example(id=f"copy-{row.id}", question=f"Read the abstract and answer. {row.context} Question: {row.question}") for row in test]
    assert found(train, prompts, test) == 1


def test_false_alarms_on_real_rows(real):
    rows = real[0] + real[1]
    flagged = asked = 0
    for seed in range(8):
        random.Random(seed).shuffle(rows)
        test, train = rows[:len(rows) // 5], rows[len(rows) // 5:]
        flagged += len({leak.test_id for leak in find_leaks(train, test)})
        asked += len(test)
    assert flagged / asked <= 0.01, (flagged, asked)


def test_one_pattern_is_no_leak():
    # hundreds of questions of one wording about different diseases, with passages of one wording
    names = [first + second for first in ("gout", "croup", "lupus", "sprue", "colic", "ictus", "tetany", "pterygium", "mastitis", "rickets") for second in ("", " minor", " of the hand", " in children", " after surgery")]
    rows = [Example(id=name, question=f"Is joint fluid microscopy the first test for {name}?", context=f"BACKGROUND: People with {name} see a doctor late. FINDINGS: The first test for {name} is imaging of the affected part of the body. It is usually normal in other diseases.") for name in names]
    wordings = [row for row in rows if len(row.id.split()) == 1]
    leaks = find_leaks(wordings[:5], wordings[5:])
    assert not leaks, leaks


def test_embedded_rows_have_no_leak():
    rows = load_examples("embedded")
    splits = split_examples(clean(rows).examples, named=named_splits("embedded"))
    leaks = find_leaks(splits["train"], splits["test"])
    assert len({leak.test_id for leak in leaks}) <= 0.01 * len(splits["test"]), leaks[:5]


@given(st.text("abcde", min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_one_slip_is_symmetric_and_finds_every_slip(word, data):
    at = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from("abcde"))
    for other in (word[:at] + word[at + 1:], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1:], word[:at] + word[at:at + 2][::-1] + word[at + 2:]):
        assert one_slip(word, other) and one_slip(other, word), (word, other)


# ---- conversations ----

CHAT = Example(id="c", question="Hello doctor", answer="Hello.", turns=(Turn("Is joint fluid microscopy the first test for gout?", "It is."), Turn("Thank you", "Take care.")))
OTHERS = [Example(id=f"o{n}", question=f"Is test {n} the first test for disease {n}?") for n in range(30)]


def test_a_later_turn_gives_a_test_question_away():
    asked = Example(id="e", question="is joint fluid microscopy the first test for gout")
    assert [(leak.train_id, leak.test_id) for leak in find_leaks([*OTHERS, CHAT], [asked])] == [("c", "e")]
    assert [(leak.train_id, leak.test_id) for leak in find_leaks([*OTHERS, asked], [CHAT])] == [("e", "c")]


def test_a_greeting_gives_nothing_away_and_binds_nothing():
    other = replace(CHAT, id="d", turns=(Turn("My son has a rash on both arms since Monday.", "Let me see it."),))
    assert find_leaks([*OTHERS, CHAT], [other]) == [] and group_key(CHAT) != group_key(other)
    assert group_key(CHAT) == group_key(Example(id="e", question="Is joint fluid microscopy the first test for gout"))


# ---- mixtures ----


@given(st.lists(st.tuples(st.integers(1, 60), st.none() | st.integers(1, 40), st.none() | st.integers(1, 5), st.integers(0, 8), st.booleans()), min_size=2, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_of_a_mixture_is_in_one_place(shapes, weighted):
    sources, parts = [], []
    for number, (count, cap, weight, official, train_only) in enumerate(shapes):
        rows = [Example(id=f"{number}-{n}", question=f"What is sign {n} of disease {number}?", answer="It is so.") for n in range(count)]
        named = {"test": [row.id for row in rows[:official]]} if official else None
        sources.append(Gathered(rows, [], named, {"source": "plain"}))
        parts.append(MixtureSource(source="plain", path=f"{number}.jsonl", cap=cap, weight=(weight or 1) if weighted else None, train_only=train_only and number > 0))
    by_source, _ = clean_sources(sources, "dialogues")
    kept, left_out = mix_sources(tuple(parts), sources, by_source)
    splits = split_sources(DataConfig(sources=tuple(parts)), sources, kept)
    assert sorted([*places(splits), *(row.id_or_row for row in left_out)]) == sorted(row.id for source in sources for row in source.examples)
    tested = {row.id for row in splits["test"]}
    for part, source, rows in zip(parts, sources, kept, strict=True):
        official = set((source.named or {}).get("test", []))
        assert official.isdisjoint(places(splits)) and tested.isdisjoint(row.id for row in rows) if part.train_only else official <= tested
        assert part.cap is None or len({row.id for row in rows} - official) <= part.cap
