"""What each flag of the five scripts, and of ``accelerate launch``, becomes here.

The scripts are those of huggingface/diffusers, examples/consistency_distillation. ``documentation/distillers/
CONVERSION.md`` is generated from these tables.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from simpletuner.config.fields import Json

Target = Literal["config", "method", "dataset", "by rule", "nothing"]
"""Where a flag goes: a key of config.json, of distillation_config, of the dataset's entry; a rule of ``rules.py``; or
nowhere, for the reason that stands beside it."""


@dataclass(frozen=True)
class Script:
    """One of the five scripts."""

    model_family: Literal["sd1x", "sdxl"]
    model_type: Literal["lora", "full"]
    shards: bool
    """Whether it reads WebDataset shards, or a dataset of the hub or a folder."""
    defaults: dict[str, Json] = field(default_factory=dict[str, Json])
    """Its own defaults of flags whose default differs between the scripts."""
    ignored: frozenset[str] = frozenset()
    """Flags that it takes and never reads."""


_UNREAD = frozenset({"cache_dir", "center_crop", "random_flip", "proportion_empty_prompts"})
_SD: dict[str, Json] = {"resolution": 512, "w_min": 5.0, "vae_encode_batch_size": 32}
_SDXL: dict[str, Json] = {"resolution": 1024, "w_min": 3.0, "vae_encode_batch_size": 8}

SCRIPTS = {
    "train_lcm_distill_sd_wds.py": Script("sd1x", "full", True, _SD, _UNREAD | {"scale_lr"}),
    "train_lcm_distill_sdxl_wds.py": Script("sdxl", "full", True, _SDXL, _UNREAD),
    "train_lcm_distill_lora_sd_wds.py": Script("sd1x", "lora", True, _SD, _UNREAD | {"scale_lr"}),
    "train_lcm_distill_lora_sdxl_wds.py": Script("sdxl", "lora", True, _SDXL, _UNREAD),
    "train_lcm_distill_lora_sdxl.py": Script(
        "sdxl", "lora", False, _SDXL | {"learning_rate": 1e-6}, frozenset({"encode_batch_size"})
    ),
}
"""File name -> what the script trains."""


class Flag(NamedTuple):
    """One flag of the scripts."""

    target: Target
    key: str = ""
    """The key that it becomes; for a rule, the keys that it decides."""
    note: str = ""
    """Why it needs nothing here, or what is different."""
    default: Json = None
    """Of the scripts; ``Script.defaults`` goes before it."""
    switch: bool = False
    """Whether it stands without a value."""
    only: Literal["all", "full", "lora", "shards", "folder", "sdxl shards"] = "all"
    """Which of the scripts have it."""


_TRUTH = "the network is always told what was really cut"
_EXPORT = "the dataset is written into a folder once, by the command that is printed"

FLAGS: dict[str, Flag] = {
    "pretrained_teacher_model": Flag("config", "pretrained_model_name_or_path"),
    "pretrained_vae_model_name_or_path": Flag("config", "pretrained_vae_model_name_or_path"),
    "teacher_revision": Flag("config", "revision"),
    "revision": Flag(
        "nothing", note="the scripts validate with it; here teacher, student and pictures are of one revision"
    ),
    "output_dir": Flag("config", "output_dir", default="lcm-xl-distilled"),
    "cache_dir": Flag("nothing", note="HF_HOME says where downloads are kept; `cache_dir` is the folder of latents"),
    "seed": Flag("config", "seed", "the scripts draw another one each time when it is not given"),
    "logging_dir": Flag("nothing", note="what is logged goes to output_dir", default="logs"),
    "report_to": Flag("config", "report_to", default="tensorboard"),
    "tracker_project_name": Flag("config", "tracker_project_name", default="text2image-fine-tune"),
    "checkpointing_steps": Flag("config", "checkpoint_step_interval", default=500),
    "checkpoints_total_limit": Flag("by rule", "checkpoints_total_limit", "without it all are kept: 0"),
    "resume_from_checkpoint": Flag("by rule", "resume_from_checkpoint", "without it a run starts anew: none"),
    "train_shards_path_or_url": Flag(
        "by rule", "shards", "a dataset of type webdataset; `pipe:curl URL` becomes the url", only="shards"
    ),
    "dataset_name": Flag("by rule", "instance_data_dir", _EXPORT, only="folder"),
    "dataset_config_name": Flag("by rule", "instance_data_dir", _EXPORT, only="folder"),
    "train_data_dir": Flag("by rule", "instance_data_dir", _EXPORT, only="folder"),
    "image_column": Flag("by rule", "instance_data_dir", _EXPORT, default="image", only="folder"),
    "caption_column": Flag("by rule", "instance_data_dir", _EXPORT, default="text", only="folder"),
    "encode_batch_size": Flag("nothing", note="captions are encoded once, before training", default=8, only="folder"),
    "resolution": Flag(
        "by rule", "resolution, resolution_type, crop", "the shorter edge is scaled to it, and a square cut"
    ),
    "interpolation_type": Flag("nothing", note="pictures are always scaled by Lanczos", default="bilinear"),
    "use_fix_crop_and_size": Flag("nothing", note=_TRUTH, default=False, switch=True, only="sdxl shards"),
    "center_crop": Flag("by rule", "crop_style", "center, otherwise random", default=False, switch=True),
    "random_flip": Flag("dataset", "random_flip", default=False, switch=True),
    "dataloader_num_workers": Flag("config", "dataloader_num_workers", default=0),
    "train_batch_size": Flag("config", "train_batch_size", default=16),
    "num_train_epochs": Flag("by rule", "max_train_steps or num_train_epochs", "max_train_steps decides", default=100),
    "max_train_steps": Flag("by rule", "max_train_steps"),
    "max_train_samples": Flag(
        "by rule",
        "max_train_steps or max_train_samples",
        "with shards only the length of an epoch, by which max_train_steps is counted when it is not given",
    ),
    "learning_rate": Flag("config", "learning_rate", default=1e-4),
    "scale_lr": Flag("config", "scale_lr", default=False, switch=True),
    "lr_scheduler": Flag("config", "lr_scheduler", default="constant"),
    "lr_warmup_steps": Flag(
        "by rule", "lr_warmup_steps", "0 with `constant`, which has no warmup in the scripts", default=500
    ),
    "gradient_accumulation_steps": Flag("config", "gradient_accumulation_steps", default=1),
    "use_8bit_adam": Flag("by rule", "optimizer", "bnb-adamw8bit, otherwise adamw", default=False, switch=True),
    "adam_beta1": Flag("config", "adam_beta1", default=0.9),
    "adam_beta2": Flag("config", "adam_beta2", default=0.999),
    "adam_weight_decay": Flag("config", "adam_weight_decay", default=0.01),
    "adam_epsilon": Flag("config", "adam_epsilon", default=1e-8),
    "max_grad_norm": Flag("config", "max_grad_norm", default=1.0),
    "proportion_empty_prompts": Flag("config", "caption_dropout_probability", default=0, only="shards"),
    "w_min": Flag("method", "w_min"),
    "w_max": Flag("method", "w_max", default=15.0),
    "num_ddim_timesteps": Flag("method", "num_ddim_timesteps", default=50),
    "loss_type": Flag("method", "loss_type", default="l2"),
    "huber_c": Flag("method", "huber_c", default=0.001),
    "timestep_scaling_factor": Flag("method", "timestep_scaling_factor", default=10.0),
    "unet_time_cond_proj_dim": Flag(
        "by rule", note="256 as here, or what the teacher has; another value is refused", default=256, only="full"
    ),
    "ema_decay": Flag("method", "ema_decay", default=0.95, only="full"),
    "lora_rank": Flag("config", "lora_rank", default=64, only="lora"),
    "lora_alpha": Flag("config", "lora_alpha", default=64, only="lora"),
    "lora_dropout": Flag("config", "lora_dropout", default=0.0, only="lora"),
    "lora_target_modules": Flag(
        "by rule", "peft_lora_target_modules", "without it the same layers as there", only="lora"
    ),
    "vae_encode_batch_size": Flag("config", "vae_batch_size"),
    "mixed_precision": Flag("by rule", "mixed_precision", "without it accelerate's, else no"),
    "allow_tf32": Flag("config", "allow_tf32", default=False, switch=True),
    "cast_teacher_unet": Flag(
        "nothing", note="the teacher is always in the compute dtype", default=False, switch=True, only="shards"
    ),
    "enable_xformers_memory_efficient_attention": Flag(
        "by rule", "attention_mechanism", "xformers", default=False, switch=True
    ),
    "gradient_checkpointing": Flag("config", "gradient_checkpointing", default=False, switch=True),
    "local_rank": Flag("nothing", note="each process learns its rank from the launcher", default=-1),
    "validation_steps": Flag(
        "config", "validation_step_interval", "the scripts' prompts are fixed; write yours as validation_prompt", 200
    ),
    "push_to_hub": Flag("config", "push_to_hub", default=False, switch=True),
    "hub_token": Flag("nothing", note="a secret does not belong into a file: log in with `hf auth login`"),
    "hub_model_id": Flag("config", "hub_model_id"),
}
"""Flag of the scripts -> what it becomes."""


class LaunchFlag(NamedTuple):
    """One flag of ``accelerate launch``."""

    target: Literal["config", "environment", "extra", "nothing", "refused"]
    key: str = ""
    """The key of config.json, or the environment variable."""
    note: str = ""
    switch: bool = False


_SPEED = "it changes speed only"
_OUTSIDE = "processes are started by `bash train.sh`, which needs none of it"
_SHARDING = "sharding over GPUs is not built; every GPU holds the model"

LAUNCH_FLAGS: dict[str, LaunchFlag] = {
    "mixed_precision": LaunchFlag("config", "mixed_precision", "the script's own flag goes before it"),
    "dynamo_backend": LaunchFlag("config", "dynamo_backend"),
    "num_processes": LaunchFlag("environment", "TRAINING_NUM_PROCESSES"),
    "num_machines": LaunchFlag("environment", "TRAINING_NUM_MACHINES"),
    "config_file": LaunchFlag("environment", "ACCELERATE_CONFIG_PATH"),
    **dict.fromkeys(
        ("machine_rank", "main_process_ip", "main_process_port", "gpu_ids", "num_cpu_threads_per_process"),
        LaunchFlag("extra", "ACCELERATE_EXTRA_ARGS"),
    ),
    "cpu": LaunchFlag("extra", "ACCELERATE_EXTRA_ARGS", switch=True),
    **dict.fromkeys(
        ("multi_gpu", "same_network", "quiet", "debug", "enable_cpu_affinity"),
        LaunchFlag("nothing", note=_OUTSIDE, switch=True),
    ),
    **dict.fromkeys(
        ("tee", "log_dir", "role", "rdzv_backend", "rdzv_conf", "max_restarts", "monitor_interval", "env", "vm")
        + ("main_training_function", "mpirun_hostfile"),
        LaunchFlag("nothing", note=_OUTSIDE),
    ),
    "dynamo_mode": LaunchFlag("nothing", note=_SPEED),
    **dict.fromkeys(
        ("dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"),
        LaunchFlag("nothing", note=_SPEED, switch=True),
    ),
    "gradient_accumulation_steps": LaunchFlag("nothing", note="accelerate hands it to DeepSpeed alone"),
    "gradient_clipping": LaunchFlag("nothing", note="accelerate hands it to DeepSpeed alone"),
    **dict.fromkeys(
        ("use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config"),
        LaunchFlag("refused", note=_SHARDING, switch=True),
    ),
    **dict.fromkeys(
        ("tpu", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "downcast_bf16"),
        LaunchFlag("refused", note="TPUs are not supported", switch=True),
    ),
    **dict.fromkeys(("module", "no_python"), LaunchFlag("refused", note="name the script's file", switch=True)),
}
"""Flag of ``accelerate launch`` -> what it becomes."""

LAUNCH_GROUPS = {
    "deepspeed_": _SHARDING,
    "zero": _SHARDING,
    "offload_": _SHARDING,
    "fsdp_": _SHARDING,
    "megatron_lm_": _SHARDING,
    "parallelism_config_": _SHARDING,
    "fp8_": "training in 8 bits is not built; use mixed_precision bf16",
    "aws_": "machines are not rented from here",
}
"""How refused flags of ``accelerate launch`` begin -> why."""


def flags_of(script: Script) -> dict[str, Flag]:
    """Returns the flags that a script has."""
    kinds = {"all", script.model_type, "shards" if script.shards else "folder"}
    if script.shards and script.model_family == "sdxl":
        kinds.add("sdxl shards")
    return {name: flag for name, flag in FLAGS.items() if flag.only in kinds}
