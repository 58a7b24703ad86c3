"""The whole way of a run: scan, plan, cache, build, train, publish; each arrow is one call."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from simpletuner.chosen import choose
from simpletuner.config.errors import Problems, UserError
from simpletuner.config.schema import Config
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.encode import give_back_memory
from simpletuner.data.identity import Ranks
from simpletuner.data.precompute import Cache, precompute, prepare
from simpletuner.data.summary import DatasetSummary, summarise
from simpletuner.evaluation.evaluate import evaluate, require_scenes
from simpletuner.exporting import export
from simpletuner.hooks.caching import CachingProgress
from simpletuner.hooks.eval_loss import SEED as EVAL_SEED
from simpletuner.hooks.eval_loss import EvalLoss
from simpletuner.hooks.profiling import ProfilingHook
from simpletuner.hooks.progress import ProgressHook
from simpletuner.hooks.report import ReportHook
from simpletuner.hooks.throughput import ThroughputHook
from simpletuner.hooks.tracking import Trackers, start_trackers
from simpletuner.hooks.uploading import CheckpointUpload
from simpletuner.hooks.validation import make_validation
from simpletuner.hooks.webhook import Webhook, read_hooks
from simpletuner.plan import Plan, caches_of, make_plan
from simpletuner.plan_view import cached_lines, plan_text
from simpletuner.publishing.hub import Hub, open_hub
from simpletuner.publishing.push import push_result
from simpletuner.publishing.report import FILE_NAME as REPORT
from simpletuner.publishing.result import disown, result_files, result_step, write_card, write_result
from simpletuner.quiet import quieten_libraries
from simpletuner.training import metrics, resume, run_lock, snapshot
from simpletuner.training.build import Run, build, make_accelerator
from simpletuner.training.checkpoint import Loaded
from simpletuner.training.lr_schedulers import learning_rate
from simpletuner.training.meeting import Meeting, closing
from simpletuner.training.meter import StepMeter, peak_tflops
from simpletuner.training.state import TrainState
from simpletuner.training.trainer import Hook, LoopSettings, Trainer

_LOG = logging.getLogger(__name__)


def train(config: Config) -> TrainState:
    """Runs a config to its last step, or to the signal that stops it, and returns the state it ended in.

    Raises:
        UserError: Something in the config, the model, the data or the checkpoint is wrong.
    """
    accelerator = make_accelerator()
    quieten_libraries()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.allow_tf32
    with ExitStack() as leaving:
        leaving.enter_context(closing(accelerator))
        with Meeting(accelerator).leaving_together():
            if accelerator.is_main_process:
                leaving.callback(run_lock.hold(config.run.output_dir).release)
            prepared = _prepare(config, accelerator, leaving)
        plan, loaded, hub = prepared.plan, prepared.loaded, prepared.hub
        state = TrainState(plan.max_steps, loaded.step if loaded else 0)
        if prepared.dataset is not None:
            try:
                state = _train(prepared, prepared.dataset, accelerator)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    "the device has no memory left; the last checkpoint is whole. Set gradient_checkpointing to true, "
                    "or lower train_batch_size (and raise gradient_accumulation_steps), resolution or lora_rank"
                ) from error
            if accelerator.is_main_process and config.validation.evaluation_prompts and state.stopped_by is None:
                _evaluate(plan)
            if prepared.report is not None:
                prepared.report.write(state)  # with the code of its card, and what was judged
        if hub is not None and state.stopped_by is None and push_result(plan, hub):
            _LOG.info("uploaded: %s", hub.url)
        accelerator.wait_for_everyone()
        if hub is not None and hub.failures:
            where = f"the weights are in {config.run.output_dir}, and the same command uploads them"
            raise UserError(*hub.failures, f"push_to_hub: {where}")
    return state


@dataclass(frozen=True)
class _Prepared:
    """What a run has before any network is loaded."""

    plan: Plan
    loaded: Loaded | None
    """The checkpoint to go on from."""
    dataset: CachedDataset | None
    """What to train on, cached; None when there is nothing left to train."""
    hub: Hub | None
    """Where the main process uploads to, checked."""
    trackers: Trackers
    webhooks: Sequence[Webhook] = ()
    report: ReportHook | None = None
    """Of the main process."""
    held_out: Sequence[CachedDataset] = ()
    """What the loss is measured on."""


def train_with_seeds(config: Config, seeds: Sequence[int]) -> list[Path]:
    """Runs a config once with each seed and returns their output folders; finished runs are kept.

    The config's own seed is its own run; those of other seeds are below it, silent and without pictures.
    """
    folders: list[Path] = []
    for seed in seeds:
        if seed == config.run.seed:
            validation = config.validation.model_copy(update={"evaluation_prompts": 0})
            train(config.model_copy(update={"validation": validation}))
            folders.append(config.run.output_dir)
            continue
        folder = config.run.output_dir / "evaluation" / f"seed-{seed}"
        run = config.run.model_copy(update={"seed": seed, "output_dir": folder, "resume_from_checkpoint": "latest"})
        validation = config.validation.model_copy(update={"validation_disable": True, "evaluation_prompts": 0})
        publish = config.publish.model_copy(update={"push_to_hub": False, "report_to": ()})
        train(config.model_copy(update={"run": run, "validation": validation, "publish": publish}))
        folders.append(folder)
    return folders


def _evaluate(plan: Plan) -> None:
    """Judges the finished run and prints what was found."""
    output_dir = plan.config.run.output_dir
    report = evaluate(plan, [output_dir], plan.config.validation.evaluation_prompts, CachingProgress())
    write_card(plan)
    print(f"\n{report.text()}\n\nside by side: {output_dir / 'evaluation' / 'contact_sheet.png'}", flush=True)


def _prepare(config: Config, accelerator: Accelerator, leaving: ExitStack) -> _Prepared:
    """Returns all that a run needs; whoever is to hear of it is asked before hours are spent on caches."""
    plan = _plan(config, accelerator)
    if config.validation.evaluation_prompts:
        require_scenes(plan)
    loaded, changes = resume.find(plan, _ranks(accelerator), result_files(plan))
    hub = open_hub(plan) if config.publish.push_to_hub and accelerator.is_main_process else None
    if loaded is not None and loaded.step >= plan.max_steps and result_step(plan) == loaded.step:
        _LOG.info(
            "this run is finished: step %d of %d is in %s\nto go on, raise max_train_steps; to start anew, choose "
            "another output_dir or set resume_from_checkpoint to none",
            *(loaded.step, plan.max_steps, loaded.path),
        )
        return _Prepared(plan, loaded, None, hub, Trackers([], loaded.step))
    if loaded is not None:
        _LOG.info("\n  - ".join([f"going on from {loaded.path}", *changes]))
    trackers, webhooks = Trackers([], 0), list[Webhook]()
    if accelerator.is_main_process:
        webhooks = _webhooks(plan)
        for webhook in webhooks:
            leaving.push(webhook.leave)
        trackers = start_trackers(config, loaded.step if loaded else 0)
        leaving.callback(trackers.finish)
    cache, new_ones = _cache(plan, accelerator), _held_out_caches(plan, accelerator)
    # The files of a model from the hub are here by now, and only they say how the family treats empty prompts.
    plan = replace(plan, family=plan.family.for_model(plan.source))
    dataset = _dataset(plan, cache, accelerator)
    held_out = [CachedDataset(each, plan.family.uncond, EVAL_SEED) for each in new_ones]
    del cache, new_ones
    plan = replace(
        plan,
        datasets=tuple(summary.without_rows() for summary in plan.datasets),
        held_out=tuple(summary.without_rows() for summary in plan.held_out),
    )
    give_back_memory()
    report = ReportHook(plan, dataset) if accelerator.is_main_process else None
    return _Prepared(plan, loaded, dataset, hub, trackers, webhooks, report, held_out)


def _webhooks(plan: Plan) -> list[Webhook]:
    """Returns the hooks that the config names. Raises UserError for a mistake in their file."""
    path, settings = plan.config.publish.webhook_config, plan.config.run
    about = {"run": plan.config.hide(settings.output_dir.name), "max_steps": plan.max_steps}
    pictures, interval = settings.output_dir / "validation", settings.checkpoint_step_interval
    found = read_hooks(path, os.environ) if path is not None else []
    return [Webhook(config, about, pictures, interval) for config in found]


def _train(prepared: _Prepared, dataset: CachedDataset, accelerator: Accelerator) -> TrainState:
    """Builds the networks, trains them, and writes the result."""
    plan, loaded = prepared.plan, prepared.loaded
    run = build(plan, accelerator, dataset)
    state = TrainState(plan.max_steps) if loaded is None else snapshot.restore(run, loaded, plan.max_steps)
    if accelerator.is_main_process:
        disown(plan, state.step)
    _trainer(prepared, run, state).train()
    if accelerator.is_main_process:
        _finish(plan, run, state)
    return state


def fill_cache(config: Config) -> Cache:
    """Scans the datasets of a config and fills its caches; returns them."""
    accelerator = make_accelerator()
    quieten_libraries()
    with closing(accelerator), Meeting(accelerator).leaving_together():
        plan = _plan(config, accelerator)
        cache = _cache(plan, accelerator)
        held_out = _held_out_caches(plan, accelerator)
        if accelerator.is_main_process:
            manifests = [*cache.manifests, *(manifest for each in held_out for manifest in each.manifests)]
            print("\n".join(cached_lines(caches_of(plan, manifests))), flush=True)
        return cache


def _plan(config: Config, accelerator: Accelerator) -> Plan:
    """Scans, plans, and says the plan."""
    problems = Problems()
    problems.attempt(partial(choose, config))
    both = (*config.datasets, *config.held_out)
    manifests = problems.attempt(partial(prepare, both, _ranks(accelerator), _caching_progress(accelerator)))
    problems.raise_any()
    summaries, number = [summarise(manifest) for manifest in manifests or ()], len(config.datasets)
    plan = make_plan(config, summaries[:number], accelerator.num_processes, summaries[number:])
    if accelerator.is_main_process:
        print(plan_text(plan), flush=True)
    return plan


def _cache(plan: Plan, accelerator: Accelerator) -> Cache:
    return _filled(plan, accelerator, plan.datasets, plan.prompts)


def _held_out_caches(plan: Plan, accelerator: Accelerator) -> list[Cache]:
    """Returns the caches of the held-out datasets, one by one.

    They are filled apart: captions are encoded several at once, and those to train on must not meet others there, or
    their last bits, and with them the run, would depend on what is held out.
    """
    return [_filled(plan, accelerator, [summary]) for summary in plan.held_out]


def _filled(
    plan: Plan, accelerator: Accelerator, datasets: Sequence[DatasetSummary], prompts: Sequence[str] = ()
) -> Cache:
    return precompute(
        [summary.manifest for summary in datasets],
        plan.config.text_cache,
        plan.encoding(accelerator.device),
        prompts,
        _ranks(accelerator),
        _caching_progress(accelerator),
    )


def _dataset(plan: Plan, cache: Cache, accelerator: Accelerator) -> CachedDataset:
    return CachedDataset(
        cache,
        plan.family.uncond,
        plan.config.run.seed,
        plan.config.data.caption_dropout_probability,
        _ranks(accelerator),
        pin_memory=accelerator.device.type == "cuda",
        encoding=plan.encoding(accelerator.device),
        windows=plan.windows,
    )


def _ranks(accelerator: Accelerator) -> Ranks:
    return Ranks(accelerator.process_index, accelerator.num_processes, Meeting(accelerator).wait)


def _caching_progress(accelerator: Accelerator) -> CachingProgress | None:
    return CachingProgress() if accelerator.is_main_process else None


def _trainer(prepared: _Prepared, run: Run, state: TrainState) -> Trainer:
    """Returns the trainer with its hooks, its metrics file cut back to the step at which it begins."""
    plan, trackers = prepared.plan, prepared.trackers
    main, output_dir = run.accelerator.is_main_process, plan.config.run.output_dir
    rows_path = output_dir / metrics.FILE_NAME
    if main:
        metrics.truncate(rows_path, state.step)

    def write_rows(rows: Sequence[metrics.Row]) -> None:
        if main:
            metrics.append(rows_path, rows)
            trackers.rows(rows)

    rows = metrics.RowsInOrder(write_rows, state.step)
    settings = plan.config.run
    hooks: list[Hook] = [ProgressHook(plan.max_steps, plan.effective_batch), ThroughputHook()] if main else []
    if prepared.held_out:
        levels, interval = plan.config.validation.eval_timesteps, plan.eval_step_interval
        hooks.append(EvalLoss(run, prepared.held_out, levels, interval, settings.train_batch_size, rows.add_early))
    if plan.validation.prompts:
        hooks.append(make_validation(plan, run, trackers.pictures))
    if main and settings.profile_steps:
        hooks.append(ProfilingHook(settings.profile_steps, output_dir))
    if prepared.report is not None:
        hooks.append(prepared.report)
    hooks += prepared.webhooks
    if prepared.hub is not None and plan.config.publish.push_checkpoints_to_hub:
        hooks.append(CheckpointUpload(plan, run, prepared.hub))

    return Trainer(
        run,
        LoopSettings(
            seed=settings.seed,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            max_grad_norm=settings.max_grad_norm,
            clips_values=settings.grad_clip_method == "value",
            checkpoint_step_interval=settings.checkpoint_step_interval,
            logging_steps=settings.logging_steps,
            learning_rate=partial(learning_rate, plan.optimizer_section, plan.max_steps),
        ),
        state,
        hooks,
        save_checkpoint=partial(resume.save, plan, run),
        write_rows=rows.add,
        meter=StepMeter(
            run.accelerator.device,
            peak_tflops(run.accelerator.device, plan.compute_dtype),
            is_compiled=settings.dynamo_backend != "no",
        ),
    )


def _finish(plan: Plan, run: Run, state: TrainState) -> None:
    """Writes the result of a finished run; says where it is, or how a stopped one goes on."""
    output_dir = plan.config.run.output_dir
    if state.stopped_by is not None:
        _LOG.info(
            "stopped by %s after step %d of %d; the checkpoint is saved: the same command goes on from it",
            *(state.stopped_by.name, state.step, plan.max_steps),
        )
        return
    with run.averaged_weights():
        for line in write_result(plan, run, state):
            _LOG.info(line)
    if run.has_adapter and plan.config.lora.lora_format != "diffusers":
        for line in export(output_dir, "kohya", output_dir / "kohya" / f"{output_dir.name}.safetensors", force=True):
            _LOG.info("for other programs: %s", line)
    sheet = output_dir / "validation" / "contact_sheet.png"
    if sheet.is_file():
        _LOG.info("pictures: %s", sheet)
    _LOG.info("all on one page: %s", output_dir / REPORT)
