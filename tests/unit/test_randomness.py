import torch

from simpletuner.randomness import Randomness, generator

W, NOISE = [0.2000483, 0.6130517], [0.106798, -1.559981, -2.233731]
INDEX = [20, 16, 44, 27, 31, 0]
POSITIONS = torch.tensor([0, 1, 7, 1_000_000])


def test_two_ranks_draw_what_one_draws() -> None:
    randomness = Randomness(42)
    whole = randomness.normal("noise", POSITIONS, (4, 3, 3))
    ranks = [randomness.normal("noise", half, (4, 3, 3)) for half in POSITIONS.chunk(2)]
    assert torch.equal(whole, torch.cat(ranks))
    assert whole.dtype == torch.float32


def test_draws_depend_on_seed_stream_and_position_and_on_nothing_else() -> None:
    first = Randomness(42).uniform("w", POSITIONS)
    torch.manual_seed(0)
    torch.rand(10)
    assert torch.equal(Randomness(42).uniform("w", POSITIONS), first)
    assert torch.equal(Randomness(42).uniform("w", POSITIONS.flip(0)), first.flip(0))
    others = [Randomness(43).uniform("w", POSITIONS), Randomness(42).uniform("index", POSITIONS)]
    everything = torch.cat([first, *others])
    assert len(everything.unique()) == len(everything)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    Randomness(1).normal("noise", POSITIONS, (2, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_are_pinned() -> None:
    """A checkpoint of last month resumes with these numbers; a change of them is a change of every run."""
    randomness = Randomness(42)
    torch.testing.assert_close(randomness.uniform("w", torch.tensor([0, 5])), torch.tensor(W))
    assert randomness.integers("index", torch.arange(6), 50).tolist() == INDEX
    torch.testing.assert_close(randomness.normal("noise", torch.tensor([3]), (3,)), torch.tensor([NOISE]))


def test_distributions() -> None:
    randomness, positions = Randomness(3), torch.arange(4000)
    noise = randomness.normal("noise", positions, (8,))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    # Samples are independent of each other, and streams of each other: correlations stay below 4 / sqrt(n).
    neighbours = torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0], randomness.uniform("w", positions)[1:]]))
    assert neighbours.triu(1).abs().max() < 4 / 4000**0.5
    counts = torch.bincount(randomness.integers("index", positions, 10), minlength=10)
    assert len(counts) == 10
    # Chi-squared with 9 degrees of freedom: above 27.9 once in a thousand.
    assert float(((counts - 400.0) ** 2 / 400).sum()) < 27.9


def test_a_generator_is_made_afresh() -> None:
    one, other = generator(1, "noise", 2), generator(1, "noise", 2)
    torch.rand(3, generator=one)
    assert torch.rand(1, generator=one) != torch.rand(1, generator=other)
