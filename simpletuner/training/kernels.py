"""How networks are computed: the attention kernel, and compiled blocks (``attention_mechanism``, ``dynamo_backend``).

Networks are compiled in place, the blocks that repeat, or the whole where none are named. In place means that the
modules stay who they are: their state dicts, adapters and copies know nothing of it.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

NUM_VARIANTS = 64
"""Versions of one block's code that are kept: adapter on and off, with and without gradient, each width and size.

torch keeps 8, and beyond them runs uncompiled without an error."""


def choose_attention(networks: Iterable[nn.Module], mechanism: str) -> None:
    """Switches the networks to xFormers' attention; ``diffusers`` leaves PyTorch's own."""
    for network in dict.fromkeys(networks) if mechanism == "xformers" else ():
        cast(Any, network).enable_xformers_memory_efficient_attention()


def compile_networks(networks: Iterable[nn.Module], backend: str) -> None:
    """Compiles each network once; ``no`` leaves them as they are.

    A block is compiled anew, which takes seconds to minutes, when it first meets another size, adapter state or dtype.
    """
    if backend == "no":
        return
    torch._dynamo.config.recompile_limit = NUM_VARIANTS  # pyright: ignore[reportPrivateUsage]  (it has no public name)
    for network in dict.fromkeys(networks):
        repeated: Any = network  # Any: diffusers' own base class, which would import diffusers here
        if getattr(network, "_repeated_blocks", None):
            repeated.compile_repeated_blocks(backend=backend)
        else:
            network.compile(backend=backend)
