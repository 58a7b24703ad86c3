import dataclasses

import torch
from torch import Tensor

from tests.parity.toy import toy_batch


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = toy_batch(2)
    moved = batch.to(torch.device("meta"))
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert after.device.type == "meta", field.name
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert {value.device.type for value in moved.cond.values()} == {"meta"}
    assert moved.cond.keys() == batch.cond.keys()
    assert (moved.ids, moved.global_weight) == (batch.ids, batch.global_weight)
    assert batch.mean.device.type == "cpu"


def test_to_keeps_a_missing_standard_deviation() -> None:
    assert dataclasses.replace(toy_batch(2), std=None).to(torch.device("cpu")).std is None
