"Choices by likelihood: equal to one pass a choice, whatever the tokenizer does to a label; calibration equal to scikit-learn."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from medibuddy.data.chat import encode_prompts
from medibuddy.data.example import Example
from medibuddy.evaluation.calibration import calibration, choice_arrays, risk_coverage
from medibuddy.evaluation.choices import add_choices, cue, encode_choices, force_answers, score_choices
from medibuddy.models.loaders import load_base, load_tokenizer

OPTIONS = (("A", "Metformin"), ("B", "Insulin"), ("C", "Rest"))
EXAMPLES = [
    Example(id="a", question="Does metformin lower blood sugar?", context="RESULTS: it fell in 40 of 50 patients.", decision="yes"),
    Example(id="b", question="What lowers blood sugar?", options=OPTIONS, decision="A"),
    Example(id="open", question="What is metformin?", answer="A drug."),
    Example(id="c", question="Does rest?", decision="maybe"),
]


@pytest.fixture(scope="module")
def embedded():
    tokenizer = load_tokenizer("embedded")
    return load_base("embedded"), tokenizer, encode_prompts(EXAMPLES, tokenizer, 1024, 64)[0]


def alone(model, tokenizer, prompt, label):
    "The label's log-probability by a pass of its own, from the text"
    import torch

    asked, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt + cue(prompt), f"{prompt}{cue(prompt)} {label}"))
    assert whole[: len(asked)] == asked
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(len(asked), len(whole)))


def test_reasoning_that_the_prompt_opened_is_closed_before_the_choice():
    assert cue("Is it so?<think>\n") == "\n</think>\n\nFinal decision:" and cue("Is it so?\n") == "Final decision:"


def test_one_shared_pass_equals_one_pass_a_choice(embedded):
    model, tokenizer, prompts = embedded
    rows = add_choices([{"id": example.id} for example in EXAMPLES], model, tokenizer, EXAMPLES, prompts)
    assert [list(row.get("choices", ())) for row in rows] == [["yes", "no", "maybe"], ["A", "B", "C"], [], ["yes", "no", "maybe"]]
    for row, prompt in zip(rows, prompts, strict=True):
        wanted = {label: alone(model, tokenizer, prompt.text, label) for label in row.get("choices", ())}
        # what all choices share belongs to the prefix and shifts them alike; differences are what decides
        differences = [[value - next(iter(part.values())) for value in part.values()] for part in (row.get("choices", {}), wanted) if part]
        assert differences == [] or differences[0] == pytest.approx(differences[1], abs=1e-4)


def test_a_label_of_several_tokens_is_read_whole_and_batches_do_not_matter(embedded):
    "A tokenizer without merges spells every label letter by letter"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, tokenizer, prompts = embedded
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"abc"})
    plain = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    spelled = PreTrainedTokenizerFast(tokenizer_object=plain)
    questions = encode_choices(EXAMPLES, prompts, spelled)
    assert [len(tail) for tail in questions[0].tails] == [3, 2, 5]
    together, apart = score_choices(model, questions), [score_choices(model, [question])[0] for question in questions]
    for found, other, prompt in zip(together, apart, (prompts[0], prompts[1], prompts[3]), strict=True):
        assert list(found.values()) == pytest.approx(list(other.values()), abs=1e-4)
        wanted = {label: alone(model, spelled, prompt.text, label) for label in found}
        assert [value - max(found.values()) for value in found.values()] == pytest.approx([value - max(wanted.values()) for value in wanted.values()], abs=1e-3)


@pytest.mark.parametrize(("prompt", "text", "closing"), [("Is it so?<think>\n", "It fell in 40", "\n</think>\n\n"), ("Is it so?<think>\n", "It fell.</think>\n\nThe drug", "\n\n"), ("Is it so?\n", "The drug works, since it", "\n\n")])
def test_a_forced_answer_is_the_likeliest_behind_what_was_written(embedded, monkeypatch, prompt, text, closing):
    model, tokenizer, _ = embedded
    row = {"id": "a", "prompt": prompt, "text": text, "stop_reason": "length", "gold": "yes", "decision": None}
    others = [row | {"id": "c", "stop_reason": "stop"}, row | {"id": "open", "gold": None}]
    asked = []
    monkeypatch.setattr("medibuddy.evaluation.choices.score_choices", lambda model, questions: asked.extend(questions) or score_choices(model, questions))
    (forced, *untouched) = force_answers([row, *others], model, tokenizer, [EXAMPLES[0], EXAMPLES[3], EXAMPLES[2]])
    chances = {label: alone(model, tokenizer, prompt + text + closing, label) for label in ("yes", "no", "maybe")}
    assert tokenizer.decode(asked[0].input_ids).endswith(f"{prompt}{text}{closing}Final decision:") and len(asked) == 1
    assert forced == row | {"forced": max(chances, key=chances.get)} and untouched == others


chances = st.lists(st.tuples(st.lists(st.floats(-8, 0), min_size=3, max_size=3), st.sampled_from("ABC")), min_size=2, max_size=40)


@settings(max_examples=25, deadline=None)
@given(chances)
def test_brier_score_is_scikit_learns(drawn):
    rows = [{"gold": gold, "choices": dict(zip("ABC", values, strict=True))} for values, gold in drawn]
    found = np.array([list(part.values()) for part, _ in choice_arrays(rows)])
    found /= found.sum(1, keepdims=True)
    assert calibration(rows)["brier"] == pytest.approx(brier_score_loss([gold for _, gold in drawn], found, labels=list("ABC"), scale_by_half=False), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(st.floats(-8, 0), min_size=3, max_size=3), st.sampled_from("ABC")), min_size=30, max_size=60))
def test_bins_hold_every_question_once_and_risk_ends_at_the_error_rate(drawn):
    found = calibration([{"gold": gold, "choices": dict(zip("ABC", values, strict=True))} for values, gold in drawn])
    sizes = [part["n"] for part in found["bins"]]
    assert sum(sizes) == len(drawn) and max(sizes) - min(sizes) <= 1
    assert [part["confidence"] for part in found["bins"]] == sorted(part["confidence"] for part in found["bins"])
    assert found["risk_coverage"]["curve"][-1]["risk"] == pytest.approx(1 - found["accuracy"])
    assert 0 <= found["ece"] <= 1


def test_risk_does_not_depend_on_the_order_of_equals():
    right = np.array([True] * 5 + [False] * 5)
    assert risk_coverage(np.full(10, 0.5), right) == risk_coverage(np.full(10, 0.5), right[::-1])
