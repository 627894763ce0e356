"""Length-grouped order: a permutation, deterministic, and worth having. Packs: every row once, and none sees another."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medibuddy.data.chat import EncodedChat
from medibuddy.data.packing import MEGA_BATCHES, first_fit_decreasing, length_grouped_order, make_packs, padding_share

lengths_lists = st.lists(st.integers(1, 4000), max_size=400)


@given(lengths_lists, st.integers(1, 17), st.integers(0, 2**31), st.integers(0, 5))
def test_a_permutation(lengths, batch_size, seed, epoch):
    order = length_grouped_order(lengths, batch_size, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == length_grouped_order(lengths, batch_size, seed, epoch)


@given(lengths_lists, st.integers(1, 9))
def test_batches_hold_neighbours_in_length(lengths, batch_size):
    order = length_grouped_order(lengths, batch_size, 0, 0)
    if len(lengths) > MEGA_BATCHES * batch_size:
        return
    # within one mega-batch the ranges of any two batches do not overlap
    ranges = sorted((min(part), max(part)) for start in range(0, len(order), batch_size) if (part := [lengths[row] for row in order[start:start + batch_size]]))
    assert all(first[1] <= second[0] for first, second in zip(ranges, ranges[1:], strict=False))


def test_fixed_order():
    # written down once: another machine, Python or version must give the same epoch
    assert length_grouped_order([5, 90, 6, 88, 7, 92, 4, 91, 50], 2, seed=42, epoch=0) == [1, 3, 2, 0, 5, 7, 8, 4, 6]


def test_epochs_and_seeds_differ():
    lengths = [n % 97 + 1 for n in range(300)]
    orders = {tuple(length_grouped_order(lengths, 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_long_batches_do_not_come_first():
    lengths = list(range(1, 401))  # as many as are sorted together
    order = length_grouped_order(lengths, 8, 0, 0)
    firsts = [lengths[order[start]] for start in range(0, 400, 8)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert padding_share(lengths, order, 8) < 0.03


# ---- padding-free packs ----


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(300, 2000))
def test_packs_hold_every_row_once_within_the_budget(lengths, budget):
    packs = first_fit_decreasing(lengths, budget)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in pack) <= budget for pack in packs)
    # first fit: no pack could take a row that went into a later one, so all but one are more than half full
    assert sum(sum(lengths[row] for row in pack) <= budget // 2 for pack in packs) <= 1
    assert packs == plain_first_fit(lengths, budget)


def plain_first_fit(lengths, budget):
    "The textbook loop"
    packs = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        pack = next((pack for pack in packs if sum(lengths[other] for other in pack) + lengths[row] <= budget), None)
        if pack is None:
            packs.append(pack := [])
        pack.append(row)
    return packs


def test_packing_many_rows_is_nearly_full():
    generator = random.Random(0)
    lengths = [min(2000, int(generator.lognormvariate(5.3, 0.5)) + 1) for _ in range(100_000)]
    packs = first_fit_decreasing(lengths, 4096)  # a quadratic one would run into the time limit
    assert sum(lengths) / (4096 * len(packs)) > 0.99


def test_the_first_token_of_a_row_is_never_trained():
    pack = make_packs([EncodedChat([1, 2], [1, 2], id="a"), EncodedChat([3, 4], [3, 4], id="b")], 10)[0]
    assert pack.labels == [-100, 2, -100, 4] and pack.lengths == [2, 2] and pack.ids == ["a", "b"]


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


def logits(model, input_ids, position_ids=None):
    import torch

    with torch.no_grad():
        positions = None if position_ids is None else torch.tensor([position_ids])
        return model(input_ids=torch.tensor([input_ids]), position_ids=positions, use_cache=False).logits[0]


def test_no_token_sees_another_row(model):
    import torch

    generator = random.Random(1)
    rows = [EncodedChat(ids := [generator.randrange(101) for _ in range(generator.randint(3, 40))], list(ids), id=str(number)) for number in range(9)]
    for pack in make_packs(rows, 90):
        packed = logits(model, pack.input_ids, pack.position_ids)
        start = 0
        for name, length in zip(pack.ids, pack.lengths, strict=True):
            alone = logits(model, rows[int(name)].input_ids)
            assert torch.allclose(packed[start:start + length], alone, atol=1e-5, rtol=0), (name, (packed[start:start + length] - alone).abs().max())
            start += length
        if len(pack.ids) > 1:  # another first row leaves the others' bits as they were, and the other way round
            changed = [(token + 1) % 101 for token in pack.input_ids[:pack.lengths[0]]] + pack.input_ids[pack.lengths[0]:]
            assert torch.equal(logits(model, changed, pack.position_ids)[pack.lengths[0]:], packed[pack.lengths[0]:])
            changed = pack.input_ids[:pack.lengths[0]] + [(token + 1) % 101 for token in pack.input_ids[pack.lengths[0]:]]
            assert torch.equal(logits(model, changed, pack.position_ids)[:pack.lengths[0]], packed[:pack.lengths[0]])


def test_without_restarting_positions_rows_do_see_each_other(model):
    # the proof can fail: one run of positions makes one row of the pack
    import torch

    ids = list(range(1, 31))
    packed = logits(model, ids, list(range(30)))
    assert not torch.allclose(packed[15:], logits(model, ids[15:]), atol=1e-3)


def test_gradients_of_a_pack_are_those_of_its_rows(model):
    import torch

    rows = [EncodedChat([5, 6, 7, 8], [-100, -100, 7, 8], id="a"), EncodedChat([9, 10, 11], [-100, 10, 11], id="b")]
    pack = make_packs(rows, 7)[0]

    def gradient(batches):
        model.zero_grad()
        for ids, labels, positions in batches:
            output = model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False).logits[0]
            torch.nn.functional.cross_entropy(output[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    together = gradient([(pack.input_ids, pack.labels, pack.position_ids)])
    apart = gradient([(row.input_ids, row.labels, list(range(len(row.input_ids)))) for row in rows])
    assert torch.allclose(together, apart, atol=1e-6)
