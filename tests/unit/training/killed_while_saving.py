"""Saves checkpoints in a child that is killed at random points; run as ``python -m``, with a folder and a seed.

A process of its own, because it forks: torch is imported once for all children. Prints how many checkpoints were seen.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from simpletuner.training import checkpoint

NUM_KILLS = 40


def save_for_ever(root: Path) -> None:
    """Saves one step after another, each a second time over the first; checkpoint N is full of N."""
    newest = checkpoint.find(root, "latest")
    step = checkpoint.load(newest).step if newest else 0
    while True:
        step += 1
        tensors = {"w": {str(i): torch.full((2000,), float(step)) for i in range(20)}, "x": {"a": torch.tensor(step)}}
        for _ in range(2):
            checkpoint.save(root, step, tensors, {"step": step}, keep=2)


def check(root: Path) -> int:
    """Returns the newest step, after every checkpoint has been loaded whole."""
    steps = [0]
    for path in root.glob("checkpoint-*"):
        loaded = checkpoint.load(path)
        steps.append(loaded.step)
        assert path.name == f"checkpoint-{loaded.step}"
        assert loaded.state == {"step": loaded.step}
        assert len(loaded.tensors["w"]) == 20
        assert all(bool((t == loaded.step).all()) for group in loaded.tensors.values() for t in group.values())
    return max(steps)


def main(root: Path, seed: int) -> None:
    """Kills NUM_KILLS children and looks at what they left, before and after the cleaning."""
    chance = random.Random(seed)
    newest = 0
    left_overs = 0
    for _ in range(NUM_KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(root)
        time.sleep(chance.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(root)
        left_overs += sum(1 for path in root.iterdir() if path.name.startswith("."))
        checkpoint.clean(root)
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        step = check(root)
        assert step >= newest, (step, newest)
        newest = step
    # Old checkpoints go only after the new one stands, so each kill may leave one more; a save that ends leaves two.
    checkpoint.save(root, newest + 1, {"w": {"0": torch.zeros(1)}}, {}, keep=2)
    names = sorted(path.name for path in root.iterdir())
    assert names == sorted([f"checkpoint-{newest}", f"checkpoint-{newest + 1}"]), names
    print(newest, left_overs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
