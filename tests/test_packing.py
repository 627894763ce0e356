"""Length-grouped order: a permutation, deterministic, and worth having."""

from hypothesis import given
from hypothesis import strategies as st

from medibuddy.data.packing import MEGA_BATCHES, length_grouped_order, padding_share

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
    lengths = list(range(1, 1001))
    order = length_grouped_order(lengths, 8, 0, 0)
    firsts = [lengths[order[start]] for start in range(0, 1000, 8)]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert padding_share(lengths, order, 8) < 0.03
