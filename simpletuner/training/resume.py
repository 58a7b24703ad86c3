"""Where a run goes on: finds, checks and writes its checkpoints."""

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simpletuner.config.errors import UserError
from simpletuner.config.fields import rule_of
from simpletuner.config.schema import resume_rules
from simpletuner.data.identity import Ranks
from simpletuner.plan import Plan
from simpletuner.training import checkpoint, snapshot
from simpletuner.training.build import Run
from simpletuner.training.checkpoint import Loaded
from simpletuner.training.resume_rules import Rule, compare
from simpletuner.training.state import TrainState

_LOG = logging.getLogger(__name__)
_ORDER = ("train_batch_size", "repeats", "probability", "start_step", "end_step", "start_epoch", "end_epoch")
"""Keys of a dataset that the order of a run depends on."""


def save(plan: Plan, run: Run, state: TrainState) -> None:
    """Writes a checkpoint; every rank calls it, the main one writes."""
    if run.accelerator.is_main_process:
        config = plan.config
        data = {"datasets": _datasets(plan), "processes": plan.world}
        asked = {"config": config.flat(), "method": _method(plan)}
        keep = config.run.checkpoints_total_limit or None
        try:
            with run.averaged_weights():
                tensors, values = snapshot.take(run, state)
                document = {**values, **asked, **data, **checkpoint.provenance()}
                checkpoint.save(config.run.output_dir, state.step, tensors, document, keep)
        except OSError as error:
            raise UserError(
                f"output_dir: the checkpoint of step {state.step} cannot be written ({error.strerror}); "
                "the ones before are whole: make room, and the same command goes on"
            ) from error
    run.accelerator.wait_for_everyone()


def find(plan: Plan, ranks: Ranks, result: Iterable[Path]) -> tuple[Loaded | None, list[str]]:
    """Returns the checkpoint to go on from (None: begin), and a notice for each thing that has changed since.

    Args:
        plan: Of this run.
        ranks: Which of the processes this one is.
        result: The files of a finished run in output_dir, which ``resume_from_checkpoint: none`` sets aside too.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or the config differs where it must not.
    """
    run = plan.config.run
    if ranks.rank == 0:
        checkpoint.clean(run.output_dir)
        if run.resume_from_checkpoint is None:
            _set_aside(plan, result)
    ranks.barrier()
    path = checkpoint.find(run.output_dir, run.resume_from_checkpoint or "latest")
    if path is None:
        return None, []
    loaded = checkpoint.load(path)
    # The method's own options are compared one by one, by its own rules.
    rules: dict[str, Rule] = {**resume_rules(), "distillation_config": "free"}
    changed = [
        *compare(loaded.state["config"], plan.config.flat(), rules),
        *compare(loaded.state["method"], _method(plan), _method_rules(plan)),
    ]
    if ranks.rank == 0:
        checkpoint.set_aside(run.output_dir, loaded.step)
    ranks.barrier()
    return loaded, [*changed, *_changed_data(plan, loaded)]


def _method(plan: Plan) -> dict[str, Any]:  # Any: JSON
    """Returns the method's own options by key, defaults included; plain fine-tuning has none beside the config's."""
    if plan.config.distillation.distillation_method is None:
        return {}
    return {f"distillation_config.{key}": value for key, value in plan.method_config.model_dump(mode="json").items()}


def _method_rules(plan: Plan) -> dict[str, Rule]:
    """Returns what resuming with another value of the method's options means."""
    section = type(plan.method_config)
    rules: dict[str, Rule] = {}
    for key in section.model_fields:
        rule = rule_of(section, key, "resume")
        assert rule in ("must_match", "may_change", "free"), key
        rules[f"distillation_config.{key}"] = rule
    return rules


def _datasets(plan: Plan) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Returns what a resumed run compares its data with: all that the order of an epoch depends on."""
    return {
        summary.config.id: {"images": summary.num_images, **{key: getattr(summary.config, key) for key in _ORDER}}
        for summary in plan.datasets
    }


def _changed_data(plan: Plan, loaded: Loaded) -> list[str]:
    """Returns a notice for each thing that makes the epoch go on in another order."""
    before, now = loaded.state["datasets"], _datasets(plan)
    processes = loaded.state["processes"]
    batches = f"{processes} processes until the checkpoint, {plan.world} from here on: the order of the epoch changes"
    keys = ("images", *_ORDER)
    pairs = [
        (name, key, before.get(name, {}).get(key, "none"), now.get(name, {}).get(key, "none"))
        for name in sorted(before.keys() | now.keys())
        for key in (keys if name in before and name in now else keys[:1])
    ]
    return [batches] * (processes != plan.world) + [
        f"dataset '{name}': {key} {then} until the checkpoint, {later} from here on: the order of the epoch changes"
        for name, key, then, later in pairs
        if then != later
    ]


def _set_aside(plan: Plan, result: Iterable[Path]) -> None:
    """Moves what an earlier run left in output_dir into ``previous-<n>``, so that nothing of two runs is mixed."""
    root = plan.config.run.output_dir
    written = (root / name for name in ("validation", "metrics.jsonl", "tensorboard"))
    left = [*root.glob("checkpoint-*"), *written, *result]
    left = [path for path in left if path.exists()]
    if not left:
        return
    target = next(path for number in itertools.count(1) if not (path := root / f"previous-{number}").exists())
    target.mkdir()
    for path in left:
        path.rename(target / path.name)
    _LOG.info("resume_from_checkpoint is none: the earlier run's files are in %s", target)
