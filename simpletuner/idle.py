"""Settings that have no effect in a run because of its other settings; the plan names them."""

from collections.abc import Callable

from simpletuner.config.schema import Config, inert_options

_Rule = tuple[tuple[str, ...], Callable[[Config, bool], bool], str]
"""Keys, when they are idle (config, whether pictures are guided), and why."""

_ADAPTER = (
    "lora_type",
    "lycoris_config",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_init_type",
    "use_dora",
    "use_rslora",
    "init_lora",
    "lora_format",
)
_STANDARD = ("lora_rank", "lora_alpha", "lora_dropout", "lora_init_type", "use_dora", "use_rslora")
_RULES: tuple[_Rule, ...] = (
    (
        (*_ADAPTER, "peft_lora_target_modules"),
        lambda config, _: config.model.model_type == "full",
        "model_type is full, which has no adapter",
    ),
    (
        (*_STANDARD, "peft_lora_target_modules"),
        lambda config, _: config.lora.lora_type == "lycoris",
        "lycoris_config says it",
    ),
    (
        ("lycoris_config",),
        lambda config, _: config.lora.lora_type == "standard",
        "lora_type is standard",
    ),
    (
        ("export_weights", "export_pipeline"),
        lambda config, _: config.model.model_type == "lora",
        "the result is an adapter, of one kind of weights, to be loaded into its base model",
    ),
    (
        ("push_checkpoints_to_hub", "hub_model_id", "model_card_private"),
        lambda config, _: not config.publish.push_to_hub,
        "push_to_hub is off",
    ),
    (
        ("tracker_project_name", "tracker_run_name"),
        lambda config, _: not config.publish.report_to,
        "report_to names no tracker",
    ),
    (
        ("custom_tracker",),
        lambda config, _: "custom-tracker" not in config.publish.report_to,
        "report_to does not name custom-tracker",
    ),
    (
        ("noise_offset",),
        lambda config, _: not config.objective.offset_noise,
        "offset_noise is off",
    ),
    (
        ("gradient_checkpointing_interval",),
        lambda config, _: not config.model.gradient_checkpointing,
        "gradient_checkpointing is off",
    ),
    (
        ("lr_end",),
        lambda config, _: config.optimizer.lr_scheduler in ("constant", "constant_with_warmup"),
        "lr_scheduler does not decay",
    ),
    (
        ("lr_power",),
        lambda config, _: config.optimizer.lr_scheduler != "polynomial",
        "only lr_scheduler polynomial has a power",
    ),
    (
        ("lr_num_cycles",),
        lambda config, _: config.optimizer.lr_scheduler not in ("cosine_with_restarts", "sine"),
        "only lr_scheduler cosine_with_restarts and sine have cycles",
    ),
    (
        ("validation_negative_prompt", "validation_guidance_rescale"),
        lambda config, guided: not guided,
        "validation pictures are drawn without guidance",
    ),
    (
        ("eval_steps_interval", "eval_timesteps", "num_eval_images", "eval_dataset_id"),
        lambda config, _: not config.held_out,
        "no dataset has dataset_type eval",
    ),
    (
        ("ema_decay",),
        lambda config, _: config.model.model_type == "lora" or config.distillation.distillation_method is None,
        "nothing is averaged in this run",
    ),
)


def idle_settings(config: Config, guided: bool) -> list[str]:
    """Returns a line for each option that the user set and that does nothing in this run.

    Args:
        config: As loaded.
        guided: Whether validation pictures are drawn with guidance.
    """
    found = {key: reason for key, reason in inert_options().items() if _is_set(config, key)}
    for keys, is_idle, reason in _RULES:
        if is_idle(config, guided):
            found |= {key: reason for key in keys if _is_set(config, key)}
    return [f"{key}: has no effect: {reason}" for key, reason in found.items()]


def _is_set(config: Config, key: str) -> bool:
    """Returns whether the user gave an option a value other than its default."""
    return key in config.explicit and config.flat()[key] != config.default_of(key)
