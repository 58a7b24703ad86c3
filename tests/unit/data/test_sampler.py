import json
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.data import sampler
from simpletuner.data.sampler import Draw, Position, SampledDataset, Sampler, Shuffle, Window, share

PUBLISHED = [(100, 6, 100), (1000, 5, 7, 33)]
ORDER_OF_MANY = [4340862, 7502359, 6780243, 1613479]


def draws(source: Sampler, count: int, position: Position | None = None, drawn: int = 0) -> tuple[list[Draw], Position]:
    position = source.start(position)
    found: list[Draw] = []
    for number in range(count):
        draw, position = source.next(position, drawn + number)
        found.append(draw)
    return found, position


def order(sizes: tuple[int, ...], batch: int, epochs: int = 1, repeats: int = 0, seed: int = 42) -> list[list[str]]:
    """Returns the ids (bucket/member) of each batch."""
    dataset = SampledDataset("d", sizes, batch, repeats)
    found, _ = draws(Sampler([dataset], seed), dataset.num_batches * epochs)
    return [[f"{draw.bucket}/{member}" for member in draw.members] for draw in found]


@pytest.mark.parametrize("sizes", PUBLISHED)
@pytest.mark.parametrize("repeats", [0, 2])
def test_an_epoch_shows_each_image_exactly_so_often(sizes: tuple[int, ...], repeats: int):
    batches = order(sizes, 4, repeats=repeats)
    shown = Counter(name for batch in batches for name in batch)
    assert shown == {f"{b}/{m}": 1 + repeats for b, size in enumerate(sizes) for m in range(size)}
    assert len(batches) == sum(-(-size * (1 + repeats) // 4) for size in sizes)
    assert all(len({name.split("/")[0] for name in batch}) == 1 for batch in batches)
    assert len([batch for batch in batches if len(batch) < 4]) <= len(sizes)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_is_exact_for_any_buckets(sizes: list[int], batch: int, repeats: int):
    shown = Counter(name for names in order(tuple(sizes), batch, repeats=repeats) for name in names)
    assert shown == {f"{b}/{m}": 1 + repeats for b, size in enumerate(sizes) for m in range(size)}


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(sum),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
    repeats=st.integers(0, 3),
    epoch=st.integers(0, 3),
    held=st.sampled_from([0, 7, 4096]),
)
def test_ranks_together_show_each_image_exactly_so_often(
    sizes: list[int], batch: int, world: int, repeats: int, epoch: int, held: int
):
    """``held``: up to which length orders are sorted; longer ones are computed place by place."""
    with patch.object(sampler, "LARGEST_SORTED", held):
        dataset = SampledDataset("d", tuple(sizes), batch * world, repeats)
        position: Position = {"samples": 0, "datasets": {"d": {"epoch": epoch, "batch": 0, "turns": 0}}}
        found, after = draws(Sampler([dataset], 3), dataset.num_batches, position)
    parts = [[draw.members[share(len(draw.members), r, world)] for draw in found] for r in range(world)]
    shown = Counter((draw.bucket, int(m)) for part in parts for draw, own in zip(found, part, strict=True) for m in own)
    assert shown == {(b, m): 1 + repeats for b, size in enumerate(sizes) for m in range(size)}
    assert all(len(own) <= batch for part in parts for own in part)
    assert after["samples"] == dataset.num_samples


@pytest.mark.parametrize("count", [4097, 100_003])
def test_a_long_order_is_as_random_as_a_sorted_one(count: int):
    order = Shuffle(count, "7/d/0/0")[np.arange(count)]
    assert np.array_equal(np.sort(order), np.arange(count))
    assert not np.array_equal(order, Shuffle(count, "7/d/1/0")[np.arange(count)])
    steps = np.diff(order) % count  # uniform, were they independent
    expected = len(steps) / 50
    chi_squared = float(((np.bincount(steps * 50 // count, minlength=50) - expected) ** 2 / expected).sum())
    assert chi_squared < 94.0  # one in ten thousand of 49 degrees of freedom
    first = [int(Shuffle(count, f"{seed}")[np.array([0])][0]) * 50 // count for seed in range(2000)]
    assert float(((np.bincount(first, minlength=50) - 40) ** 2 / 40).sum()) < 94.0


@pytest.mark.parametrize("sizes", PUBLISHED)
def test_two_ranks_of_two_show_what_one_rank_of_four_shows(sizes: tuple[int, ...]):
    one = order(sizes, 4)
    shares = [[[batch[i] for i in share(len(batch), rank, 2)] for batch in order(sizes, 2 * 2)] for rank in (0, 1)]
    print(f"{sizes}: {len(one)} batches, the first:", *one[:3], "the last:", one[-1])
    assert [first + second for first, second in zip(*shares, strict=True)] == one
    assert all(0 <= len(first) - len(second) <= 1 for first, second in zip(*shares, strict=True))


def test_epochs_and_seeds_differ_and_buckets_are_mixed():
    first, second = order((100, 6, 100), 4, epochs=2)[:52], order((100, 6, 100), 4, epochs=2)[52:]
    assert first != second
    assert order((100, 6, 100), 4, seed=43) != first
    buckets = [batch[0][0] for batch in first]
    changes = sum(a != b for a, b in zip(buckets, buckets[1:], strict=False))
    assert changes > 15  # in the order of the buckets there were 2


def test_the_order_never_changes():
    # A resumed run must go on in the order it was in, whatever the versions of its libraries.
    assert Shuffle(10_000_000, "42/d/0/0")[np.arange(4)].tolist() == ORDER_OF_MANY
    assert order((5, 3), 2) == [["1/0"], ["1/2", "1/1"], ["0/3", "0/0"], ["0/2"], ["0/1", "0/4"]]


@pytest.mark.parametrize("cut", [0, 1, 25, 51, 52, 53, 130])
def test_resumes_anywhere_from_json(cut: int):
    datasets = [SampledDataset("a", (100, 6, 100), 4), SampledDataset("b", (9,), 2, probability=0.3)]
    straight, _ = draws(Sampler(datasets, 7), 160)
    _, position = draws(Sampler(datasets, 7), cut)
    resumed, _ = draws(Sampler(datasets, 7), 160 - cut, json.loads(json.dumps(position)))
    for a, b in zip(straight[cut:], resumed, strict=True):
        assert (a.dataset, a.bucket, a.first_sample, a.members.tolist()) == (
            b.dataset,
            b.bucket,
            b.first_sample,
            b.members.tolist(),
        )


def test_a_position_is_small_and_its_cost_does_not_grow():
    sampler = Sampler([SampledDataset("a", (1_000_000,), 4)], 0)
    far: Position = {"samples": 999_996, "datasets": {"a": {"epoch": 3, "batch": 249_999, "turns": 999_999}}}
    draw, after = sampler.next(far)
    assert len(draw.members) == 4
    assert len(json.dumps(after)) < 120
    assert sampler.next(after)[1]["datasets"]["a"] == {"epoch": 4, "batch": 1, "turns": 1_000_001}


def test_samples_are_counted_over_short_batches():
    found, position = draws(Sampler([SampledDataset("a", (3,), 2)], 0), 4)
    assert [draw.first_sample for draw in found] == list(np.cumsum([0] + [len(d.members) for d in found[:-1]]))
    assert position["samples"] == 6


def test_datasets_take_turns_by_probability_and_keep_their_own_epochs():
    datasets = [SampledDataset("a", (8,), 4, probability=3.0), SampledDataset("b", (100,), 4, probability=1.0)]
    found, position = draws(Sampler(datasets, 0), 80)
    for start in range(0, 80, 4):  # never further from 3 : 1 than one batch
        assert [draw.dataset for draw in found[start : start + 4]].count(0) == 3
    assert position["datasets"] == {
        "a": {"epoch": 29, "batch": 2, "turns": 60},
        "b": {"epoch": 0, "batch": 20, "turns": 20},
    }
    assert sorted(np.concatenate([d.members for d in found if d.dataset == 0][2:4])) == list(range(8))


def test_a_dataset_of_probability_zero_is_never_drawn():
    datasets = [SampledDataset("a", (8,), 4, probability=0.0), SampledDataset("b", (8,), 4)]
    assert {draw.dataset for draw in draws(Sampler(datasets, 0), 10)[0]} == {1}


def test_a_dataset_that_joins_does_not_crowd_out_the_others():
    old = SampledDataset("old", (50,), 1)
    _, position = draws(Sampler([old], 0), 100)
    found, _ = draws(Sampler([old, SampledDataset("new", (50,), 1)], 0), 20, position)
    assert [draw.dataset for draw in found].count(1) == 10


STAGES = [
    SampledDataset("small", (50, 3), 2, window=Window(0, 30)),
    SampledDataset("always", (40,), 2, probability=0.5),
    SampledDataset("large", (50,), 2, window=Window(20)),
]


def test_datasets_are_shown_in_their_windows_only():
    shown = [draw.dataset for draw in draws(Sampler(STAGES, 0), 60)[0]]
    assert [shown[:20].count(n) for n in range(3)] == pytest.approx([13, 7, 0], abs=1)
    assert [shown[20:30].count(n) for n in range(3)] == pytest.approx([4, 2, 4], abs=1)
    assert [shown[30:].count(n) for n in range(3)] == pytest.approx([0, 10, 20], abs=1)
    never = Sampler([STAGES[0]], 0)
    assert [never.shows(drawn) for drawn in (0, 29, 30, 99)] == [True, True, False, False]
    assert not Sampler([SampledDataset("a", (8,), 4, probability=0.0)], 0).shows(0)


@pytest.mark.parametrize("cut", [0, 19, 20, 21, 29, 30, 45])
def test_a_run_of_stages_resumes_anywhere(cut: int):
    straight, _ = draws(Sampler(STAGES, 7), 60)
    _, position = draws(Sampler(STAGES, 7), cut)
    resumed, _ = draws(Sampler(STAGES, 7), 60 - cut, json.loads(json.dumps(position)), cut)
    assert [(d.dataset, d.members.tolist()) for d in straight[cut:]] == [
        (d.dataset, d.members.tolist()) for d in resumed
    ]


def test_a_shrunken_dataset_goes_on_with_its_next_epoch():
    _, position = draws(Sampler([SampledDataset("a", (40,), 4)], 0), 9)
    found, after = draws(Sampler([SampledDataset("a", (8,), 4)], 0), 1, position)
    assert after["datasets"]["a"] == {"epoch": 1, "batch": 1, "turns": 10}
    assert set(found[0].members) <= set(range(8))


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_are_even_and_lose_nothing(count: int, world: int):
    shares = [share(count, rank, world) for rank in range(world)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(map(len, shares), reverse=True) == [len(part) for part in shares]
