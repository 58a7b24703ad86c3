"""Looks ahead: scans as far as a few seconds go and plans, without writing anything."""

import os
import time
from functools import partial

from simpletuner.chosen import choose
from simpletuner.config.errors import Problems, UserError
from simpletuner.config.schema import Config
from simpletuner.data.captions import read_captions
from simpletuner.data.manifest import scan
from simpletuner.data.summary import DatasetSummary, summarise
from simpletuner.plan import Plan, make_plan

SCAN_SECONDS = 2.0
"""What counting the images of folders that were never scanned may take; then the plan says "so far"."""


def look_ahead(config: Config) -> Plan:
    """Returns the plan of a config on this machine.

    Raises:
        UserError: One line for each mistake in the config, the model and the data.
    """
    problems = Problems()
    problems.attempt(partial(choose, config))
    end = time.monotonic() + SCAN_SECONDS
    found: dict[str, DatasetSummary] = {}
    for dataset in (*config.datasets, *config.held_out):
        manifest = problems.attempt(partial(scan, dataset, max(0.1, end - time.monotonic()), write=False))
        if manifest is not None:
            named = problems.attempt(partial(read_captions, manifest, max(0.1, end - time.monotonic())))
            found |= {dataset.id: summarise(named)} if named is not None else {}
    problems.raise_any()
    datasets, held_out = ([found[dataset.id] for dataset in kind] for kind in (config.datasets, config.held_out))
    return make_plan(config, datasets, num_processes(), held_out)


def num_processes() -> int:
    """Returns how many processes the run has, or would have if it were started as the environment says.

    Raises:
        UserError: The environment says no number.
    """
    text = os.environ.get("WORLD_SIZE") or os.environ.get("TRAINING_NUM_PROCESSES") or "1"
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"num_processes: '{text}' must be a whole number, 1 or more")
    return int(text)
