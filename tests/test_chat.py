"""The chat contract for every supported template, and faults that must not pass it."""

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_rows import real_path
from tiny_tokenizers import FAMILIES, tiny_tokenizer

from medibuddy.data.chat import EncodedChat, check_encoded, completion_text, cut_context, encode_all, encode_chat, encode_prompt, encode_prompts, exchanges, render_prompt, user_text
from medibuddy.data.cleaning import clean
from medibuddy.data.example import Example, Turn
from medibuddy.data.sources import load_examples
from medibuddy.data.template import ChatContractError, chat_frame
from medibuddy.run import UsageError

GRADED = Example(id="g-1", context="RESULTS: It was safe.", question="Is it safe?", reasoning="The results say so.", answer="It is safe.", decision="yes")
PLAIN = Example(id="p-1", question="What is gout?", answer="A disease of the joints.")
CHOICE = Example(id="c-1", question="Which is it?", options=(("A", "gout"), ("B", "sepsis")), answer="It is gout.", decision="A")
ROWS = [GRADED, replace(GRADED, id="g-2", reasoning=None), PLAIN, replace(PLAIN, id="p-2", reasoning="Joints.\n\nCrystals."), CHOICE]
TALK = Example(id="t-1", question="My toe hurts.", reasoning="Ask first.", answer="Since when?", turns=(Turn("Since last night.", "It may be gout.", "Sudden, so crystals."), Turn("What helps?", "Rest and cold.")))
families = pytest.mark.parametrize("family", FAMILIES)
ENDS = {"deepseek": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "qwen2.5": "<|im_end|>", "base": "<|end_of_text|>", "gpt": "<|endoftext|>"}


def labels_text(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def prompt_ids(encoded):
    return [number for number, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == -100]


def test_the_text_of_the_embedded_model():
    tokenizer = tiny_tokenizer("deepseek")
    assert render_prompt(GRADED, tokenizer) == (
        '<｜begin▁of▁sentence｜><｜User｜>RESULTS: It was safe.\n\nIs it safe?\n\nEnd with "Final decision: yes", "Final decision: no" or "Final decision: maybe".<｜Assistant｜><think>\n'
    )
    assert labels_text(encode_chat(GRADED, tokenizer, 1000), tokenizer) == "The results say so.\n</think>\n\nIt is safe.\n\nFinal decision: yes<｜end▁of▁sentence｜>"
    assert labels_text(encode_chat(PLAIN, tokenizer, 1000), tokenizer) == "\n</think>\n\nA disease of the joints.<｜end▁of▁sentence｜>"


def test_other_templates_show_thoughts_only_where_there_are_any():
    tokenizer = tiny_tokenizer("llama3")
    assert labels_text(encode_chat(GRADED, tokenizer, 1000), tokenizer) == "<think>\nThe results say so.\n</think>\n\nIt is safe.\n\nFinal decision: yes<|eot_id|>"
    assert labels_text(encode_chat(PLAIN, tokenizer, 1000), tokenizer) == "A disease of the joints.<|eot_id|>"


@families
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_contract_holds(family, row):
    tokenizer = tiny_tokenizer(family)
    encoded = encode_chat(row, tokenizer, 1000)
    prompt = encode_prompt(row, tokenizer, 1000, 96)
    assert prompt_ids(encoded) == prompt.input_ids  # training and generation see the same prompt
    assert tokenizer.decode(encoded.input_ids) == render_prompt(row, tokenizer) + completion_text(row, chat_frame(tokenizer).thought_open) + ENDS[family]
    assert tokenizer.decode(encoded.labels[-1:]) == ENDS[family]
    text = tokenizer.decode(encoded.input_ids)
    assert text.count("<think>") == (1 if family == "deepseek" or row.reasoning else 0)
    if tokenizer.bos_token and tokenizer.bos_token != tokenizer.eos_token:
        assert text.count(tokenizer.bos_token) == 1 and text.startswith(tokenizer.bos_token)


@families
def test_prompt_bytes_do_not_know_the_gold_answer(family):
    tokenizer = tiny_tokenizer(family)
    for row in ROWS:
        swapped = [replace(row, answer="Other.", reasoning="Other.", decision=label) for label in ("yes", "no", "maybe")] if row.decision in ("yes", "no", "maybe") else [replace(row, answer="Other.", decision="B" if row.decision else None)]
        assert {render_prompt(other, tokenizer) for other in swapped} == {render_prompt(row, tokenizer)}


# ---- faults: each must fail loudly, naming the row ----


def fails(call, clause, row="g-1"):
    with pytest.raises(ChatContractError) as caught:
        call()
    assert clause in str(caught.value) and row in str(caught.value), str(caught.value)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name][1] and FAMILIES[name][0]])
def test_template_that_doubles_bos(family):
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "exactly one BOS")


@families
def test_template_without_bos(family):
    tokenizer = tiny_tokenizer(family)
    if tokenizer.bos_token is None:
        pytest.skip("this family has no beginning-of-sequence token")
    chat_frame(tokenizer)  # gives base models their template
    tokenizer.chat_template = tokenizer.chat_template.replace("bos_token", "no_such_token | default('')")
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "exactly one BOS")


def test_template_that_strips_the_thought():
    tokenizer = tiny_tokenizer("deepseek")
    tokenizer.chat_template += "{# unknown to TRL, so no training variant #}"
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "training text = prompt + completion")
    other = tiny_tokenizer("qwen2.5")
    other.chat_template = other.chat_template.replace("message.content + '<|im_end|>'", "message.content.split('</think>')[-1] + '<|im_end|>'")
    fails(lambda: encode_chat(GRADED, other, 1000), "training text = prompt + completion")


def test_template_that_never_ends_the_answer():
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} END {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "the answer's end is a label", "(template)")


def test_template_that_ignores_the_question():
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}hello"
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "question and answer appear", "(template)")


def broken(encoded, fault, tokenizer):
    "Labels and ids as other pipelines make them"
    ids, labels, prompt = encoded.input_ids, encoded.labels, len(prompt_ids(encoded))
    return {
        "pad = eos masking": EncodedChat(ids, [-100 if number == chat_frame(tokenizer).end_id else label for number, label in zip(ids, labels, strict=True)]),
        "completion marker that never occurs": EncodedChat(ids, [-100] * len(ids)),
        "nothing masked": EncodedChat(ids, list(ids)),
        "one prompt token trained": EncodedChat(ids, labels[:prompt - 1] + ids[prompt - 1:]),
        "first answer token masked": EncodedChat(ids, [-100] * (prompt + 1) + labels[prompt + 1:]),
        "cut at the end": EncodedChat(ids[:-3], labels[:-3]),
        "hole in the labels": EncodedChat(ids, labels[:-4] + [-100] + labels[-3:]),
        "labels shifted": EncodedChat(ids, [-100] * (prompt - 1) + ids[prompt:] + [-100]),
        "labels too short": EncodedChat(ids, labels[1:]),
    }[fault]


CLAUSES = {
    "pad = eos masking": "the answer's end is a label",
    "completion marker that never occurs": "at least one label",
    "nothing masked": "prompt tokens are not labels",
    "one prompt token trained": "prompt tokens are not labels",
    "first answer token masked": "labels are the answer's tokens",
    "cut at the end": "the answer's end is a label",
    "hole in the labels": "labels are the answer's tokens",
    "labels shifted": "prompt tokens are not labels",
    "labels too short": "one label a token",
}


@families
@pytest.mark.parametrize("fault", CLAUSES)
def test_faulty_labels(family, fault):
    tokenizer = tiny_tokenizer(family)
    encoded = encode_chat(GRADED, tokenizer, 1000)
    check_encoded(encoded, GRADED, tokenizer)
    fails(lambda: check_encoded(broken(encoded, fault, tokenizer), GRADED, tokenizer), CLAUSES[fault])


def test_thought_twice_or_lost():
    tokenizer = tiny_tokenizer("deepseek")
    encoded = encode_chat(GRADED, tokenizer, 1000)
    think = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    start = len(prompt_ids(encoded))
    twice = EncodedChat(encoded.input_ids[:start] + think + encoded.input_ids[start:], encoded.labels[:start] + think + encoded.labels[start:])
    fails(lambda: check_encoded(twice, GRADED, tokenizer), "the thought is trained once")
    without = encode_chat(replace(GRADED, reasoning=None), tokenizer, 1000)
    fails(lambda: check_encoded(without, GRADED, tokenizer), "the thought is trained once")


def test_gold_answer_in_the_prompt(monkeypatch):
    tokenizer = tiny_tokenizer("deepseek")
    monkeypatch.setattr("medibuddy.data.chat.user_text", lambda row: f"{user_text(row)} (gold: {row.decision})")
    fails(lambda: encode_chat(GRADED, tokenizer, 1000), "the prompt does not know the answer")


@pytest.mark.parametrize("text", ["<｜end▁of▁sentence｜>", "</think>", "<think>", "<｜User｜>"])
@pytest.mark.parametrize("field", ["question", "context", "reasoning", "answer"])
def test_control_tokens_in_the_data(field, text):
    tokenizer = tiny_tokenizer("deepseek")
    row = replace(GRADED, **{field: f"It says {text} here."})
    fails(lambda: encode_chat(row, tokenizer, 1000), "no control token in the text")
    encoded, dropped, _ = encode_all([PLAIN, row], tokenizer, 1000)
    assert [r.id for r in encoded] == ["p-1"] and [(r.id_or_row, r.reason, r.detail) for r in dropped] == [("g-1", "control token in the text", text)]


# ---- conversations ----


def spans(encoded):
    "Runs of labels and of the tokens between them, as lists of ids"
    return [(trained, [token for token, _ in run]) for trained, run in groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != -100)]


@families
def test_every_answer_of_a_conversation_is_trained(family):
    tokenizer = tiny_tokenizer(family)
    encoded = encode_chat(TALK, tokenizer, 2000)
    opened = chat_frame(tokenizer).thought_open
    pairs, runs = exchanges(TALK, opened), spans(encoded)
    assert [trained for trained, _ in runs] == [False, True] * 3
    assert [tokenizer.decode(ids) for trained, ids in runs if trained] == [answer + ENDS[family] for _, answer in pairs]
    assert all(said in tokenizer.decode(ids) for (said, _), ids in zip(pairs, [ids for trained, ids in runs if not trained], strict=True))
    text = tokenizer.decode(encoded.input_ids)
    assert text.count("<think>") == (3 if opened else 2) == text.count("</think>")
    # the first prompt is the one that generation uses, and the row is what the training template renders
    assert prompt_ids(EncodedChat(runs[0][1], [-100] * len(runs[0][1]))) == encode_prompt(TALK, tokenizer, 2000, 96).input_ids
    opening = "<think>\n" if opened else ""
    messages = [message for said, answer in pairs for message in ({"role": "user", "content": said}, {"role": "assistant", "content": opening + answer})]
    assert tokenizer.apply_chat_template(messages, chat_template=chat_frame(tokenizer).training_template, tokenize=False).rstrip() == text


def broken_talk(encoded, fault, tokenizer):
    "Labels of a conversation as other pipelines make them"
    ids, labels, runs = encoded.input_ids, encoded.labels, spans(encoded)
    lengths = [len(run) for _, run in runs]
    second, third = sum(lengths[:3]), sum(lengths[:5])  # where the later answers begin
    hide = lambda start, end: EncodedChat(ids, labels[:start] + [-100] * (end - start) + labels[end:])
    return {
        "only the last answer trained": lambda: hide(0, third),
        "only the first answer trained": lambda: hide(lengths[0] + lengths[1], len(ids)),
        "a middle answer masked": lambda: hide(second, second + lengths[3]),
        "the end of a middle answer masked": lambda: hide(second + lengths[3] - 1, second + lengths[3]),
        "the start of a middle answer masked": lambda: hide(second, second + 1),
        "a follow-up question trained": lambda: EncodedChat(ids, labels[:second - lengths[2]] + ids[second - lengths[2]:]),
        "two answers exchanged": lambda: EncodedChat(*[part[:second] + part[third:] + part[second + lengths[3]:third] + part[second:second + lengths[3]] for part in (ids, labels)]),
    }[fault]()


TALK_CLAUSES = {
    "only the last answer trained": "every answer is trained", "only the first answer trained": "the answer's end is a label", "a middle answer masked": "every answer is trained",
    "the end of a middle answer masked": "the answer's end is a label", "the start of a middle answer masked": "every answer stands behind its question",
    "a follow-up question trained": "every answer is trained", "two answers exchanged": "",
}


@families
@pytest.mark.parametrize("fault", TALK_CLAUSES)
def test_faulty_labels_of_a_conversation(family, fault):
    tokenizer = tiny_tokenizer(family)
    encoded = encode_chat(TALK, tokenizer, 2000)
    check_encoded(encoded, TALK, tokenizer)
    with pytest.raises(ChatContractError) as caught:
        check_encoded(broken_talk(encoded, fault, tokenizer), TALK, tokenizer)
    # a thought that is cut open is seen before the missing token is
    assert caught.value.row == "t-1" and (TALK_CLAUSES[fault] in caught.value.clause or (fault.startswith("the start") and "thought" in caught.value.clause)), str(caught.value)


def test_template_that_strips_thoughts_from_the_history():
    tokenizer = tiny_tokenizer("qwen2.5")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content + '<|im_end|>'", "(message.content if loop.last else message.content.split('</think>')[-1]) + '<|im_end|>'")
    fails(lambda: encode_chat(TALK, tokenizer, 2000), "training text = prompt + completion", "t-1")
    assert encode_chat(GRADED, tokenizer, 2000)  # single questions are not concerned


@pytest.mark.parametrize("turn", [Turn("Is <think> it?", "It is so."), Turn("Is it?", "It </think> is."), Turn("Is it?", "It is.", "So <｜User｜> it is.")])
def test_control_tokens_in_a_later_turn(turn):
    fails(lambda: encode_chat(replace(TALK, turns=(turn,)), tiny_tokenizer("deepseek"), 2000), "no control token in the text", "t-1")


turns = st.builds(Turn, question=st.text("ab c\n", min_size=1).map(lambda text: f"q{text}q"), answer=st.text("ab c\n", min_size=1).map(lambda text: f"a{text}a"), reasoning=st.none() | st.just("because it is"))


@given(st.lists(turns, max_size=4), st.sampled_from(["deepseek", "llama3", "qwen2.5", "base", "gpt"]))
@settings(max_examples=60, deadline=None)
def test_conversations_of_any_length(more, family):
    tokenizer = tiny_tokenizer(family)
    row = replace(TALK, turns=tuple(more) or None)
    encoded = encode_chat(row, tokenizer, 5000)
    assert len([run for run in spans(encoded) if run[0]]) == 1 + len(more)


# ---- length ----

LONG = Example(id="l-1", context="METHODS: " + " ".join(f"Patient {n} was seen." for n in range(60)) + "\nRESULTS: It was safe.", question="Is it safe?", answer="It is safe.", decision="yes")


@families
def test_long_rows_lose_sentences_from_the_front_and_say_so(family):
    tokenizer = tiny_tokenizer(family)
    whole = encode_chat(LONG, tokenizer, 10_000)
    encoded = encode_chat(LONG, tokenizer, 700)
    assert len(encoded.input_ids) <= 700 and encoded.cut_tokens == len(whole.input_ids) - len(encoded.input_ids) > 0
    text = tokenizer.decode(encoded.input_ids)
    assert "RESULTS: It was safe." in text and "METHODS: Patient" in text and "Patient 59" in text and "Patient 0 " not in text
    prompt = encode_prompt(LONG, tokenizer, 700, 96)
    assert len(prompt.input_ids) <= 604 and prompt.cut_tokens > 0 and prompt.text.endswith(text[len(text.rpartition("Is it safe?")[0]):][:11] + prompt.text.rpartition("Is it safe?")[2])
    _, _, cut = encode_all([PLAIN, LONG], tokenizer, 700)
    assert cut == {"l-1": encoded.cut_tokens}


def test_rows_that_do_not_fit_are_dropped_and_counted():
    tokenizer = tiny_tokenizer("llama3")
    rows = [PLAIN, replace(PLAIN, id="long", answer="word " * 500), replace(LONG, id="one", context="A sentence without an end " * 60)]
    encoded, dropped, cut = encode_all(rows, tokenizer, 600)
    assert [row.id for row in encoded] == ["p-1"] and [row.id_or_row for row in dropped] == ["long", "one"] and cut == {}
    assert {row.reason for row in dropped} == {"longer than max_seq_length"}
    prompts, dropped, _ = encode_prompts(rows, tokenizer, 600, 96)
    assert [row.id for row in prompts] == ["p-1", "long"] and [row.id_or_row for row in dropped] == ["one"]
    with pytest.raises(UsageError, match="'long' is too long"):
        encode_chat(rows[1], tokenizer, 600)


@given(st.lists(st.lists(st.sampled_from(["It is so.", "Was 0.5 mg vs. 2 mg better?", "Yes!", "所以。", "no end"]), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 20))
@settings(deadline=None)
def test_what_is_left_of_a_context_is_its_end(lines, sentences):
    context = "\n".join("RESULTS: " + " ".join(line) for line in lines)
    left = cut_context(context, sentences)
    if left is None:
        return
    assert left.startswith("RESULTS: ") and context.endswith(left.removeprefix("RESULTS: "))
    assert (left == context) == (sentences == 0)


def test_many_rows_are_encoded_like_single_ones():
    tokenizer = tiny_tokenizer("qwen2.5")
    rows = [replace(row, id=f"{row.id}-{n}", question=f"{row.question} ({n})") for n in range(450) for row in ROWS]
    encoded, dropped, _ = encode_all(rows, tokenizer, 1000)
    assert len(encoded) == len(rows) and not dropped
    for number in (0, 999, 1000, 2249):
        assert encoded[number] == encode_chat(rows[number], tokenizer, 1000)


@families
@pytest.mark.parametrize("shape", ["pubmedqa", "medical-o1", "healthcaremagic"])
def test_real_rows_keep_the_contract(family, shape):
    rows = clean(load_examples(shape, real_path(shape))).examples[:120]
    tokenizer = tiny_tokenizer(family)
    encoded, dropped, _ = encode_all(rows, tokenizer, 3000)
    assert len(encoded) + len(dropped) == len(rows)
    prompts, left_out, _ = encode_prompts(rows, tokenizer, 6000, 96)
    assert len(prompts) == len(rows) and not left_out
    by_id = {row.id: row for row in prompts}
    assert all(prompt_ids(row) == by_id[row.id].input_ids for row in encoded if not row.cut_tokens)
