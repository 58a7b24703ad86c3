"""Silences what libraries print that nobody here can do anything about; our own lines stay."""

import warnings
from logging import ERROR, getLogger


def quieten_libraries() -> None:
    """Silences progress bars of milliseconds and warnings about our calls; call it before diffusers is imported.

    One of these says that torchvision is missing, which nothing here needs.
    """
    from diffusers.utils import logging as diffusers_logging  # here, because it takes seconds
    from transformers.utils import logging

    for library in (logging, diffusers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    # torchao 0.18, which diffusers imports where it is installed, tells torch 2.13's users of its own code.
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)
    # accelerate 1.15 always passes what torch 2.13 wants to be called otherwise.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
