"""Rows of an evaluation: means, intervals, comparisons, JSON."""

import math

import numpy as np
import pytest

from simpletuner.evaluation.report import Report
from simpletuner.evaluation.scores import Row, best


def row(label: str, num_steps: int, right: list[list[int]], frechet: float = 1.0) -> Row:
    array = np.array(right, np.bool_)
    return Row(label, num_steps, array, {array.shape[1]: (frechet,) * len(right)})


def of_rate(rate: float, num_prompts: int = 400, num_seeds: int = 1, seed: int = 0) -> list[list[int]]:
    dice = np.random.default_rng(seed)
    return (dice.random((num_seeds, num_prompts)) < rate).astype(int).tolist()


def test_the_interval_of_one_seed_is_that_of_a_proportion():
    found = row("", 1, of_rate(0.8))
    width = 2 * 1.96 * math.sqrt(found.accuracy * (1 - found.accuracy) / 400)
    assert found.interval[0] < found.accuracy < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(width, rel=0.1)


def test_seeds_that_disagree_widen_the_interval():
    agree = row("", 1, [[1] * 150 + [0] * 150] * 2)
    disagree = row("", 1, [[1] * 300, [0] * 300])
    assert disagree.accuracy == agree.accuracy
    assert disagree.interval == (0.0, 1.0)
    assert agree.interval[1] - agree.interval[0] < 0.13


def test_comparisons_are_paired_by_prompt():
    right = of_rate(0.7)
    one = row("one", 1, right)
    assert one.ratio(row("two", 1, right)) == (1.0, (1.0, 1.0))
    worse = [[0 if index < 20 else each for index, each in enumerate(right[0])]]
    lead, (low, high) = one.lead(row("worse", 1, worse))
    assert lead == pytest.approx(sum(right[0][:20]) / 400)
    # Unpaired, two rates near 0.7 of 400 pictures would be known to 6 points.
    assert high - low < 0.04


def test_a_row_survives_json_and_its_first_prompts_stand_alone():
    found = Row("x", 4, np.array(of_rate(0.5, 64, 3), np.bool_), {64: (1.0, 2.0, 3.0), 16: (4.0, 5.0, 6.0)})
    again = Row.from_json(found.to_json())
    assert (again.right == found.right).all()
    assert again.frechet == found.frechet
    assert again.interval == found.interval
    first = again.first(16)
    assert first.accuracy == found.right[:, :16].mean()
    assert (found.distance, first.distance) == (2.0, 5.0)


def test_the_report_sets_the_student_beside_the_best_rival_of_as_many_steps():
    steps = (1, 2, 4, 8)
    rivals = [
        row(f"{name}-{n}", n, [[1] * count + [0] * (20 - count)])
        for n in steps
        for name, count in (("bad", 2), ("good", 8))
    ]
    report = Report(
        real=row("real", 0, [[1] * 20], 0.5),
        teacher=row("teacher", 25, [[1] * 16 + [0] * 4], 2.0),
        undistilled=rivals,
        student=[row(f"student-{n}", n, [[1] * 12 + [0] * 8], 3.0) for n in steps],
    )
    assert best(rivals, 4).label == "good-4"
    assert "student-2: 0.75 (" in report.text()
    assert "+20 points" in report.text()
    assert "1.50 times the teacher's" in report.text()
    assert "bad-4" not in report.text()
    assert "| good-4 | 40.0 % |" in report.markdown()
    assert len(report.json()["undistilled"]) == 8
