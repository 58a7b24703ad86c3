"""Keys and values that users' files have and that this trainer names otherwise, or does not have.

Each has a reason, because a key that is silently ignored makes a user believe in a setting that does nothing. An error
is for a key without which the run would learn something else than the user means; it is only a notice while the value
switches the thing off. A notice is for a key that only changes comfort or speed.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from simpletuner.config.fields import Json
from simpletuner.config.findings import Findings


class Foreign(NamedTuple):
    """What happens to a known key that has no effect here."""

    level: Literal["error", "notice"]
    reason: str
    """Why, and what to use."""


ALIASES = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "checkpointing_total_limit": "checkpoints_total_limit",
    "lora_initialisation_style": "lora_init_type",
    "model_flavor": "model_flavour",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "weight_decay": "adam_weight_decay",
    "learning_rate_end": "lr_end",
    "warmup_steps": "lr_warmup_steps",
    "lora_target_modules": "peft_lora_target_modules",
    "pretrained_model": "pretrained_model_name_or_path",
    "dropout_probability": "caption_dropout_probability",
    "proportion_empty_prompts": "caption_dropout_probability",
    "pretrained_teacher_model": "pretrained_model_name_or_path",
    "teacher_revision": "revision",
    "gradient_clip_method": "grad_clip_method",
}
"""Another name of a key -> the key."""

_FAMILY = "it belongs to other model families, which are not built yet"
_ALREADY = "it is always so here"
_MEMORY = "memory is saved by gradient_checkpointing, train_batch_size 1 and gradient_accumulation_steps"
_TABLES: dict[tuple[Literal["error", "notice"], str], str] = {
    ("notice", "there is no check that it would switch off"): "i_know_what_i_am_doing disable_accelerator",
    ("notice", "the cache holds uncompressed safetensors files, which are read without a copy"): "compress_disk_cache",
    ("notice", "a file that cannot be read is named, counted and left out; no file of yours is ever deleted"): (
        "delete_problematic_images delete_unwanted_images ignore_missing_files"
    ),
    ("notice", "encoders are loaded only while something is missing in the cache, and freed afterwards"): (
        "keep_vae_loaded fully_unload_text_encoder delete_model_after_load offload_during_startup"
    ),
    ("notice", "the VAE encodes vae_batch_size images at once; lower that where memory is short"): (
        "vae_enable_tiling vae_enable_slicing vae_enable_patch_conv vae_cache_preprocess vae_tiling vae_slicing"
    ),
    ("notice", "webhook_config tells of each event once, and runs no program"): (
        "webhook_reporting_interval post_upload_script post_checkpoint_script"
    ),
    ("notice", "the plan and the log say it at all times"): (
        "print_filenames print_sampler_statistics debug_aspect_buckets debug_dataset_loader"
    ),
    (
        "notice",
        "threads and batches of the caches are chosen by the program; vae_batch_size and write_batch_size stay",
    ): (
        "max_workers read_batch_size image_processing_batch_size enable_multiprocessing torch_num_threads "
        "aws_max_pool_connections metadata_update_interval vae_cache_scan_behaviour cache_clear_validation_prompts "
        "aspect_bucket_disable_rebuild override_dataset_config cache_file_suffix text_embed_batch_size"
    ),
    ("notice", "a thread reads batches ahead"): "dataloader_prefetch dataloader_prefetch_qlen",
    ("notice", "small buckets train with short batches, and no image is dropped or repeated for it"): (
        "allow_dataset_oversubscription"
    ),
    ("notice", _ALREADY): (
        "set_grads_to_none checkpointing_use_tempdir disable_segmented_timestep_sampling ignore_final_epochs "
        "ema_foreach_disable"
    ),
    ("notice", "the average is kept where the weights are"): "ema_device ema_cpu_only",
    ("notice", "TensorFloat-32 is on; allow_tf32 false switches it off"): "disable_tf32",
    ("notice", "it changes speed or memory only; PyTorch's fused attention is used"): (
        "sageattention_usage fuse_qkv_projections"
    ),
    ("notice", "the key is attention_mechanism, with the value xformers"): (
        "xformers enable_xformers_memory_efficient_attention"
    ),
    ("notice", _MEMORY): (
        "gradient_checkpointing_backend optimizer_cpu_offload_method "
        "optimizer_offload_gradients optimizer_release_gradients fuse_optimizer "
        "offload_param_path accelerator_cache_clear_interval enable_chunked_feed_forward feed_forward_chunk_size "
        "unet_attention_slice"
    ),
    (
        "notice",
        "the backward pass would miss layers that are moved away; base_model_precision int8-quanto saves memory",
    ): (
        "enable_group_offload group_offload_type group_offload_blocks_per_group group_offload_use_stream "
        "group_offload_to_disk_path"
    ),
    ("notice", "layers are quantized one by one on the device that trains; nothing else is, activations included"): (
        "quantize_via quantization_config base_model_default_dtype quantize_activations"
    ),
    ("notice", "there is one interval of checkpoints: checkpoint_step_interval"): (
        "checkpoint_step_rolling_interval checkpointing_rolling_steps checkpoints_rolling_total_limit "
        "checkpoint_epoch_interval"
    ),
    ("notice", "validation samples validation_prompt and user_prompt_library at the method's own settings"): (
        "validation_using_datasets validation_torch_compile validation_torch_compile_mode validation_preview "
        "validation_preview_steps validation_multigpu validation_method validation_disable_unconditional "
        "validation_epoch_interval validation_prompt_mode validation_num_video_frames validation_audio_only "
        "validation_guidance_real validation_no_cfg_until_timestep validation_guidance_skip_layers "
        "validation_guidance_skip_layers_start validation_guidance_skip_layers_stop validation_guidance_skip_scale "
        "validation_lycoris_strength validation_adapter_path validation_adapter_strength validation_adapter_name "
        "validation_adapter_mode validation_adapter_config validation_randomize validation_timesteps"
    ),
    (
        "notice",
        "datasets of dataset_type eval are measured together, every eval_steps_interval steps",
    ): ("evaluation_type eval_dataset_pooling eval_epoch_interval pretrained_evaluation_model_name_or_path"),
    ("notice", "uploads take the login of `hf auth login` or HF_TOKEN, and need nothing else (see PUBLISHING.md)"): (
        "push_to_hub_background hub_token model_card_safe_for_work modelspec_comment publishing_config"
    ),
    ("notice", "trackers write into output_dir, each picture under a name of its own (see PUBLISHING.md)"): (
        "tracker_image_layout logging_dir tracker_group"
    ),
    ("notice", "accelerate's own settings are used"): "local_rank process_group_init_timeout",
    ("notice", "the caption's length is what the model's tokenizers take"): "tokenizer_max_length",
    ("notice", "offset_noise acts on every sample"): "noise_offset_probability",
    ("error", "this noise is not built; remove the key, or use offset_noise"): ("input_perturbation"),
    ("error", "use snr_gamma (5 is usual); soft and weighted variants are not built"): ("use_soft_min_snr snr_weight"),
    ("error", "the noise schedule is the one of the model's scheduler config; change it there"): (
        "rescale_betas_zero_snr noise_scheduler ddpm_num_steps ddpm_beta_schedule"
    ),
    ("error", "timesteps are drawn as the method says; a bias is not built"): (
        "timestep_bias_strategy scheduled_sampling_max_step_offset"
    ),
    ("error", "set huber_c; it is the same at every timestep"): "huber_schedule",
    ("error", "the text encoders are never trained; remove the key"): ("train_text_encoder"),
    ("error", "layers are chosen by peft_lora_target_modules"): (
        "freeze_unet_strategy layer_freeze_strategy lora_target"
    ),
    ("error", "the learning rate is scaled by scale_lr alone"): "lr_scale lr_scale_sqrt",
    ("error", "weights train in the precision that mixed_precision and the optimizer give"): (
        "gradient_precision weight_dtype"
    ),
    ("notice", "it goes with another key, which is not built"): (
        "init_lokr_norm refiner_training_invert_schedule refiner_training_strength data_aesthetic_score "
        "timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion "
        "scheduled_sampling_probability soft_min_snr_sigma_data input_perturbation_steps text_encoder_lr "
        "text_encoder_limit save_text_encoder freeze_encoder freeze_encoder_strategy freeze_encoder_before "
        "freeze_encoder_after conditioning_multidataset_sampling crepa_lambda slider_strength"
    ),
    ("notice", "training uses every timestep of the model's schedule, and validation the method's own"): (
        "training_scheduler_timestep_spacing inference_scheduler_timestep_spacing"
    ),
    ("error", "the refiner is not built"): "refiner_training sdxl_refiner_uses_full_range",
    ("error", "control networks are not built"): (
        "controlnet control controlnet_model_name_or_path controlnet_custom_config masked_loss_probability"
    ),
    ("error", "it is not built; remove the key"): (
        "tread_config crepa_enabled layersync_enabled slider_lora_target "
        "diff2flow_enabled twinflow_enabled concept_slider audio_only"
    ),
    ("error", "sharding over GPUs is not built; every GPU holds the model"): (
        "fsdp_enable fsdp_version fsdp_reshard_after_forward fsdp_state_dict_type fsdp_auto_wrap_policy "
        "deepspeed_config context_parallel_size ramtorch"
    ),
    ("notice", _FAMILY): (
        "flux_lora_target "
        "pretrained_transformer_model_name_or_path pretrained_transformer_subfolder pretrained_t5_model_name_or_path "
        "flow_matching_loss flow_schedule_shift flow_schedule_auto_shift flow_use_uniform_schedule "
        "flow_use_beta_schedule flow_beta_schedule_alpha flow_beta_schedule_beta flow_sigmoid_scale "
        "flow_matching_sigmoid_scale flow_custom_timesteps flux_guidance_mode flux_guidance_value flux_guidance_min "
        "flux_guidance_max flux_attention_masked_training flux_fast_schedule flux_beta_schedule_alpha "
        "flux_beta_schedule_beta flux_use_beta_schedule flux_use_uniform_schedule flux_schedule_shift "
        "flux_schedule_auto_shift t5_padding sd3_clip_uncond_behaviour sd3_t5_uncond_behaviour sd3_t5_mask_behaviour "
        "sana_complex_human_instruction smoldit smoldit_config framerate ltx_train_mode ltx_i2v_prob "
        "ltx_partial_noise_fraction ltx_protect_first_frame wan_validation_load_other_stage "
        "hidream_use_load_balancing_loss"
    ),
    ("error", "it belongs in the data backend file, in the entry of a dataset"): (
        "instance_data_dir crop crop_style crop_aspect crop_aspect_buckets repeats probability prepend_instance_prompt "
        "only_instance_prompt metadata_backend minimum_aspect_ratio maximum_aspect_ratio disable_multiline_split"
    ),
    ("notice", "it belongs in the data backend file, in the entry of a dataset"): (
        "skip_file_discovery preserve_data_backend_cache vae_cache_clear_each_epoch cache_dir_vae cache_dir_text "
        "dataset_name dataset_config_name parquet_caption_column parquet_filename_column"
    ),
}

_NEUTRAL = {"snr_weight": ("1", "1.0"), "huber_schedule": ("constant",), "gradient_precision": ("unmodified",)}
"""Key -> values that change nothing."""

CONFIG_KEYS: dict[str, Foreign] = {
    key: Foreign(level, reason) for (level, reason), keys in _TABLES.items() for key in keys.split()
}
"""Known key of a config -> what happens to it."""

_DATASET_TABLES: dict[tuple[Literal["error", "notice"], str], str] = {
    ("notice", "the cache is keyed by content, geometry and encoder, so there is nothing to set"): (
        "hash_filenames hash_filename cache_file_suffix scan_for_errors vae_cache_scan_behaviour compress_cache"
    ),
    (
        "notice",
        "caches are filled before the first step; vae_cache_disable and text_cache_disable encode while training",
    ): ("vae_cache_ondemand text_cache_ondemand"),
    ("notice", "a file that cannot be read is named, counted and left out; no file of yours is ever deleted"): (
        "delete_problematic_images delete_unwanted_images"
    ),
    ("notice", "the scan keeps its own manifest beside the latents"): "metadata_update_interval metadata_dir",
    ("notice", "there is one caption cache for all datasets"): "text_embed_cache",
    ("notice", "a dataset of the hub is unpacked once, by one process"): "num_proc auto_load",
    ("error", "captions come from caption_strategy textfile, filename, instanceprompt or parquet"): (
        "caption_column fallback_caption_column csv_caption_column"
    ),
    ("error", "choose by resolution, minimum_image_size and the aspect limits"): "minimum_pixels maximum_pixels",
    ("error", "regularisation data is not built; remove the key"): "is_regularisation_data is_regularization_data",
    ("error", "conditioning data is not built"): (
        "conditioning conditioning_data conditioning_type conditioning_config source_dataset_id mask_data"
    ),
    ("error", "the key is random_flip"): "flip horizontal_flip",
    ("error", "video and audio are not built"): "video audio num_frames min_frames max_frames is_i2v frame_interval",
    ("error", "it is a key of config.json, not of a dataset"): (
        "validation_prompt learning_rate caption_dropout_probability seed model_family"
    ),
}

DATASET_KEYS: dict[str, Foreign] = {
    key: Foreign(level, reason) for (level, reason), keys in _DATASET_TABLES.items() for key in keys.split()
}
"""Known key of a dataset's entry -> what happens to it."""


def is_inert(key: str) -> bool:
    """Returns whether a key of a dataset is known and has no effect, whatever its backend."""
    foreign = DATASET_KEYS.get(key)
    return foreign is not None and foreign.level == "notice"


DATASET_TYPES = {
    kind: f"'{kind}' is not built yet; use image or text_embeds, or set `disabled: true`"
    for kind in ("conditioning", "conditioning_image_embeds", "video", "audio", "caption", "distillation_cache")
}
"""Known dataset_type that is not built -> what to do."""

_CAPTIONS = "a dataset of that type has its captions beside the images"
_ATTENTION = "it changes speed only"
_OPTIMIZERS = {
    "muon": "soap",
    "optimi-lion": "bnb-lion bnb-lion8bit bnb-lion-paged bnb-lion8bit-paged",
    "bnb-adamw8bit": "bnb-adam8bit bnb-adamw8bit-paged bnb-ademamix8bit bnb-ademamix8bit-paged adamw8bit",
    "torch-adagrad": "bnb-adagrad bnb-adagrad8bit",
    "torch-adam": "bnb-adam torch-sparseadam",
    "adamw": "bnb-adamw bnb-adamw-paged bnb-ademamix bnb-ademamix-paged deepspeed-adamw",
    "adamw_schedulefree": "adamw_schedulefree+aggressive adamw_schedulefree+no_kahan",
    "torch-sgd": "torch-asgd",
}
"""Optimizer -> names of others that it is the nearest to."""
_VALUES: dict[str, dict[str, tuple[str | None, str]]] = {
    "model_type": {"controlnet": (None, "control networks are not built"), "deepfloyd-lora": (None, _FAMILY)},
    "mixed_precision": {"fp32": ("no", "it is another name"), "fp8": (None, "use bf16")},
    "lora_init_type": {
        name: (None, "it changes the base weights, which are the teacher; use default or gaussian")
        for name in ("loftq", "olora", "pissa", "eva", "corda")
    },
    "caption_strategy": {
        **{name: ("textfile", _CAPTIONS) for name in ("csv", "huggingface", "webdataset")},
    },
    "metadata_backend": {
        "json": ("discovery", "the scan keeps its own manifest"),
        "huggingface": ("discovery", "sizes come from the images' headers"),
    },
    "crop_style": {
        "centre": ("center", "it is another name"),
        "face": (None, "it is not built; use center or random"),
    },
    "crop_aspect": {"random": (None, "it is not built; use closest or preserve")},
    "attention_mechanism": {
        name: ("diffusers", _ATTENTION)
        for name in ("sageattention", "sageattention-int8-fp16-triton", "flash-attn-2", "flash-attn-3")
    },
    "validation_noise_scheduler": {"none": ("", "it is another word for the default")},
    "loss_type": {"huber_loss": ("huber", "it is another name"), "mse": ("l2", "it is another name")},
    "optimizer": {
        name: (None, f"it is not built; '{near}' is the nearest")
        for near, names in _OPTIMIZERS.items()
        for name in names.split()
    },
    "distillation_method": {"none": ("", "it is another word for the default")},
}
"""Key -> value -> (the value that it is read as, or None where it is refused; why)."""


def judge(key: str, value: Json, table: Mapping[str, Foreign], where: str, findings: Findings) -> bool:
    """Returns whether a key stands in a table; then its problem or notice is added."""
    foreign = table.get(key)
    if foreign is None:
        return False
    if foreign.level == "error" and not _is_off(key, value):
        findings.problems.append(f"{where}{key}: not supported: {foreign.reason}")
    else:
        findings.notices.append(f"{where}{key}: has no effect: {foreign.reason}")
    return True


def _is_off(key: str, value: Json) -> bool:
    """Returns whether a value switches a thing off."""
    word = str(value).strip().lower()
    return not value or word in ("false", "0", "0.0", "none", "no", "null") or word in _NEUTRAL.get(key, ())


def rename(flat: dict[str, Json], findings: Findings) -> None:
    """Renames the aliases in place."""
    for alias in [key for key in flat if key in ALIASES]:
        key, value = ALIASES[alias], flat.pop(alias)
        if key in flat and flat[key] != value:
            findings.problems.append(f"{alias}: it is another name of {key}, which is given too; keep one of them")
            continue
        flat[key] = value
        findings.notices.append(f"{alias}: read as {key}")


def replace_values(values: dict[str, Json], where: str, findings: Findings) -> None:
    """Replaces the values that are spelt otherwise here and refuses those that are not built, in place."""
    for key, table in _VALUES.items():
        word = str(values.get(key, "")).strip().lower()
        if word not in table:
            continue
        read_as, reason = table[word]
        del values[key]
        if read_as is None:
            findings.problems.append(f"{where}{key}: '{word}' is not supported: {reason}")
            continue
        if read_as:
            values[key] = read_as
        findings.notices.append(f"{where}{key}: '{word}' is read as {read_as or 'the default'}: {reason}")
