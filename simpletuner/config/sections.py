"""Every option of the config file, in sections: type, bounds, default, resume rule and description."""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from simpletuner.config.backends import CaptionStrategy, ResolutionType
from simpletuner.config.fields import Json, Section, setting
from simpletuner.config.trackers import Tracker, named

_Quanto = Literal["int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto"]
_Torchao = Literal["int8-torchao", "int4-torchao", "fp8-torchao"]
Precision = Literal["no_change", _Quanto, _Torchao, "nf4-bnb"]

_NO_EMA = "averaged weights are not built yet; the trained weights are saved"


class ModelSection(Section):
    """Which model is trained, and how it is loaded."""

    model_family: str = setting(..., "must_match", "Architecture of the model, such as sdxl.")
    model_type: Literal["lora", "full"] = setting("lora", "must_match", "Train an adapter, or all weights.")
    model_flavour: str | None = setting(
        None,
        "free",
        "Name of a published variant of the family.",
        inert="the model is the one that pretrained_model_name_or_path names",
    )
    pretrained_model_name_or_path: str = setting(
        ..., "must_match", "The base model: a hub id, a diffusers folder, or one .safetensors file."
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "may_change",
        "Another VAE than the model's own: a hub id, folder or file. A change recomputes the cached latents.",
    )
    pretrained_unet_model_name_or_path: str | None = setting(
        None, "must_match", "Another UNet than the model's own: a hub id or a folder."
    )
    revision: str | None = setting(None, "must_match", "Branch, tag or commit of the model's hub repository.")
    variant: str | None = setting(None, "may_change", "Variant of the weight files in the repository, such as fp16.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None, "must_match", "What the network predicts. Default: what the model's own scheduler config says."
    )
    vae_dtype: Literal["default", "fp32", "bf16", "fp16"] = setting(
        "default", "may_change", "Precision of the VAE. default: the one that is safe for the family."
    )
    base_model_precision: Precision = setting(
        "no_change", "may_change", "Quantization of the frozen base weights under an adapter; see QUANTIZATION.md."
    )
    text_encoder_1_precision: Precision = setting("no_change", "may_change", "Quantization of the first text encoder.")
    text_encoder_2_precision: Precision = setting("no_change", "may_change", "Quantization of the second text encoder.")
    text_encoder_3_precision: Precision = setting("no_change", "may_change", "Quantization of the third text encoder.")
    text_encoder_4_precision: Precision = setting("no_change", "may_change", "Quantization of the fourth text encoder.")
    attention_mechanism: Literal["diffusers", "xformers"] = setting(
        "diffusers", "free", "Attention kernel. diffusers: PyTorch's own fused attention; xformers: of that package."
    )
    gradient_checkpointing: bool = setting(
        True, "free", "Recompute activations in the backward pass: less memory, about 20 % more time."
    )
    gradient_checkpointing_interval: int = setting(
        1, "free", "Recompute each so many-th block only: more memory, less time.", ge=1
    )
    single_file_config: str | None = setting(
        None,
        "free",
        "Folder or hub id with the component configs of a single-file model. Default: recognised from its weights.",
    )


class RunSection(Section):
    """Where the run writes, how long it is and how it uses the machine."""

    output_dir: Path = setting(
        Path("simpletuner-results"), "free", "Folder for checkpoints, images, metrics and the result."
    )
    cache_dir: Path | None = setting(None, "free", "Folder for caches. Default: `cache` in output_dir.")
    seed: int = setting(42, "must_match", "Seed of every random draw and of the data order.", ge=0, lt=2**63)
    mixed_precision: Literal["no", "fp16", "bf16"] = setting(
        "bf16", "may_change", "Precision of the network's forward pass; no: float32."
    )
    dynamo_backend: Literal["no", "inductor", "eager", "aot_eager", "cudagraphs"] = setting(
        "no", "free", "Backend of torch.compile for the networks; the first steps then take minutes."
    )
    allow_tf32: bool = setting(True, "may_change", "Let CUDA multiply float32 matrices in TensorFloat-32.")
    resume_from_checkpoint: str | None = setting(
        "latest",
        "free",
        "latest, the name of a checkpoint in output_dir, or its path. latest starts anew where there is none; "
        "none always starts anew.",
    )
    checkpoint_step_interval: int = setting(500, "free", "Steps between two checkpoints; 0: only at the end.", ge=0)
    checkpoints_total_limit: int = setting(5, "free", "Checkpoints to keep, the newest ones; 0: all.", ge=0)
    max_train_steps: int | None = setting(
        None, "free", "Optimizer steps of the run. This or num_train_epochs is required; of both the smaller.", ge=1
    )
    num_train_epochs: int | None = setting(
        None, "free", "Passes over the data. This or max_train_steps is required; of both the smaller.", ge=1
    )
    train_batch_size: int = setting(1, "must_match", "Images of one batch on one device.", ge=1)
    gradient_accumulation_steps: int = setting(1, "may_change", "Batches of one optimizer step.", ge=1)
    max_grad_norm: float = setting(1.0, "may_change", "Limit of the gradient's norm (or value); 0: no limit.", ge=0)
    grad_clip_method: Literal["norm", "value"] = setting(
        "norm", "may_change", "Limit the norm of the whole gradient, or each of its values."
    )
    dataloader_num_workers: int = setting(
        0,
        "free",
        "Worker processes that read batches ahead.",
        ge=0,
        le=64,
        inert="threads of the process read batches ahead, and decode what is not cached",
    )
    disable_benchmark: bool = setting(False, "free", "Do not sample the base model before training, for comparison.")
    logging_steps: int = setting(10, "free", "Steps between two readings of the metrics from the device.", ge=1)
    profile_steps: int = setting(
        0, "free", "Steps to trace with torch's profiler, after two to settle; the trace is a file in output_dir.", ge=0
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _spelt_as_switch(cls, value: Json) -> Json:
        """Reads the ways to say yes and no."""
        word = str(value).strip().lower()
        return None if word in {"none", "no", "false", "never"} else "latest" if word in {"true", "yes"} else value


class OptimizerSection(Section):
    """The optimizer and the course of the learning rate."""

    optimizer: str = setting("adamw_bf16", "must_match", "Optimizer; see OPTIMIZERS.md.")
    optimizer_config: dict[str, str | int | float | bool | list[float]] = setting(
        {}, "may_change", "Further options of the optimizer: an object, or `key=value,key=value`."
    )
    learning_rate: float = setting(1e-4, "may_change", "Peak learning rate.", gt=0)
    scale_lr: bool = setting(
        False, "may_change", "Multiply the learning rate by accumulation steps x batch size x devices."
    )
    adam_beta1: float = setting(0.9, "may_change", "Decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "may_change", "Decay of the second moment.", ge=0, lt=1)
    adam_weight_decay: float = setting(1e-2, "may_change", "Decoupled weight decay.", ge=0)
    adam_epsilon: float = setting(1e-8, "may_change", "Added to the root of the second moment.", gt=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = setting("constant_with_warmup", "may_change", "Course of the learning rate after the warmup.")
    lr_warmup_steps: int = setting(0, "may_change", "Optimizer steps in which the learning rate rises from 0.", ge=0)
    lr_end: float = setting(0.0, "may_change", "Learning rate at the end of a decay.", ge=0)
    lr_num_cycles: float = setting(1.0, "may_change", "Cycles of cosine_with_restarts and sine.", gt=0)
    lr_power: float = setting(1.0, "may_change", "Exponent of polynomial.", gt=0)


class LoraSection(Section):
    """The adapter, when model_type is lora."""

    lora_type: Literal["standard", "lycoris"] = setting(
        "standard",
        "must_match",
        "Kind of adapter: standard, a LoRA; lycoris, what lycoris_config says.",
    )
    lycoris_config: Path | None = setting(
        None,
        "must_match",
        "JSON file of the LyCORIS adapter: algo, linear_dim, factor, apply_preset, ...",
    )
    lora_rank: int = setting(16, "must_match", "Rank of the adapter's matrices.", ge=1, le=4096)
    lora_alpha: float | None = setting(
        None, "must_match", "The adapter is scaled by lora_alpha / lora_rank. Default: lora_rank.", gt=0
    )
    use_rslora: bool = setting(
        False, "must_match", "Scale the adapter by lora_alpha / sqrt(lora_rank), for high ranks (rsLoRA)."
    )
    lora_dropout: float = setting(0.0, "may_change", "Dropout before the adapter.", ge=0, lt=1)
    lora_init_type: Literal["default", "gaussian"] = setting(
        "default", "free", "How a new adapter starts. Both start as the unchanged base model."
    )
    use_dora: bool = setting(False, "must_match", "Train magnitude and direction of the weights apart (DoRA).")
    peft_lora_target_modules: tuple[str, ...] | None = setting(
        None,
        "must_match",
        "Names of the layers to adapt: a list, or a preset: attention, attention-ff, all-linear, lcm (those of the "
        "published LCM-LoRAs). Default: what the family and the method advise.",
    )
    lora_format: Literal["diffusers", "kohya", "comfyui"] = setting(
        "diffusers",
        "free",
        "Layout of the saved file; another than diffusers' is written beside it, in output_dir/kohya.",
    )
    init_lora: str | None = setting(None, "free", "Adapter file to start from, instead of a new adapter.")


class ObjectiveSection(Section):
    """What the loss compares; keys of the same name inside distillation_config win."""

    loss_type: Literal["l2", "huber", "cauchy", "smooth_l1"] = setting(
        "l2", "may_change", "Distance of prediction and target."
    )
    huber_c: float = setting(
        0.1, "may_change", "Where huber and smooth_l1 turn from square to linear, cauchy to logarithm.", gt=0
    )
    snr_gamma: float | None = setting(
        None, "may_change", "Weigh timesteps by min(SNR, gamma); 5 is usual. Default: all weigh the same.", gt=0
    )
    offset_noise: bool = setting(False, "may_change", "Add noise that is the same over the whole picture.")
    noise_offset: float = setting(0.1, "may_change", "Strength of offset_noise.", ge=0, le=1)


class EmaSection(Section):
    """An average of the weights over the steps."""

    use_ema: bool = setting(False, "must_match", "Keep an average of the trained weights.", inert=_NO_EMA)
    ema_decay: float = setting(0.995, "may_change", "Share of the old average at each update.", gt=0, lt=1)
    ema_update_interval: int = setting(1, "may_change", "Steps between two updates.", ge=1, inert=_NO_EMA)
    ema_validation: Literal["none", "ema_only", "comparison"] = setting(
        "comparison", "free", "Validate the trained weights, the average, or both.", inert=_NO_EMA
    )


class DataSection(Section):
    """Where the data backend file is, and what its datasets inherit."""

    data_backend_config: Path | None = setting(
        None,
        "free",
        "The data backend file. Default: multidatabackend.json beside the config, in output_dir, or in config/.",
    )
    resolution: float = setting(1024.0, "may_change", "Size that images are scaled to.", gt=0)
    resolution_type: ResolutionType = setting(
        "pixel_area",
        "may_change",
        "Unit of sizes. pixel: shorter edge in pixels; area: megapixels; pixel_area: edge of the square of that area.",
    )
    aspect_bucket_rounding: int = setting(
        2,
        "may_change",
        "Decimals of the aspect ratio of a bucket, 1 to 9. A value above 9 is read as aspect_bucket_alignment.",
        ge=1,
        le=9,
    )
    aspect_bucket_alignment: int = setting(
        64, "may_change", "Bucket edges are multiples of so many pixels.", ge=8, multiple_of=8
    )
    minimum_image_size: float | None = setting(None, "may_change", "Smaller images are left out.", gt=0)
    maximum_image_size: float | None = setting(
        None, "may_change", "With crop: larger images are scaled to target_downsample_size first.", gt=0
    )
    target_downsample_size: float | None = setting(
        None, "may_change", "With crop: size that images above maximum_image_size are scaled to first.", gt=0
    )
    caption_strategy: CaptionStrategy = setting(
        "textfile",
        "may_change",
        "Captions: the .txt file beside the image, its file name, instance_prompt, or a table's.",
    )
    instance_prompt: str | None = setting(None, "may_change", "Caption of every image, for instanceprompt.")
    caption_dropout_probability: float = setting(
        0.0, "may_change", "Share of samples that are trained without their caption.", ge=0, le=1
    )
    random_flip: bool = setting(False, "may_change", "Show each image mirrored in half of its turns.")
    vae_batch_size: int = setting(4, "free", "Images that the VAE encodes at once.", ge=1)
    write_batch_size: int = setting(128, "free", "Entries of one cache file.", ge=1)
    max_train_samples: int | None = setting(None, "may_change", "Use so many images of each dataset only.", ge=1)
    vae_cache_disable: bool = setting(
        False, "may_change", "Encode the images while training, and cache no latents: the VAE stays loaded."
    )
    text_cache_disable: bool = setting(
        False, "may_change", "Encode the captions while training, and cache none: the text encoders stay loaded."
    )
    vae_cache_ondemand: bool = setting(
        False, "free", "Cache latents when they are first used.", inert="latents are cached before training"
    )
    text_cache_ondemand: bool = setting(
        False, "free", "Cache text features when they are first used.", inert="text is cached before training"
    )


class PublishSection(Section):
    """What is uploaded and reported."""

    push_to_hub: bool = setting(
        False, "free", "Upload the result to the hub; login and access are checked before training. See PUBLISHING.md."
    )
    push_checkpoints_to_hub: bool = setting(
        False, "free", "With push_to_hub: upload the weights of every checkpoint too, while training goes on."
    )
    webhook_config: Path | None = setting(
        None,
        "free",
        "JSON file of urls that are told of start, checkpoints, pictures, end and failure. See PUBLISHING.md.",
    )
    hub_model_id: str | None = setting(
        None, "free", "Repository on the hub: owner/name, or the name of one of yours. Default: output_dir's name."
    )
    model_card_private: bool = setting(
        True, "free", "Make the repository private; one that is public already is then refused."
    )
    export_weights: Literal["online", "ema"] = setting(
        "online",
        "free",
        "For methods that average a full model: which weights are the result; the others are in a folder beside it.",
    )
    export_pipeline: bool = setting(
        False,
        "free",
        "For full models: also write the folder `pipeline`, which diffusers loads with no other model beside it.",
    )
    model_card_note: str | None = setting(None, "free", "Text of your own for the model card.")
    report_to: tuple[Tracker, ...] = setting(
        (),
        "free",
        "Trackers: one, a list or a comma-separated string; none; all: those installed. See PUBLISHING.md.",
    )
    custom_tracker: Path | None = setting(
        None,
        "free",
        "For report_to custom-tracker: a Python file with a subclass of accelerate's GeneralTracker, which is run; or "
        "a name, whose file is custom-trackers/NAME.py.",
    )
    tracker_project_name: str = setting("simpletuner", "free", "Project in the tracker.")
    tracker_run_name: str | None = setting(None, "free", "Run in the tracker. Default: the tracker's own choice.")

    @field_validator("report_to")
    @classmethod
    def _all_are_those_installed(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        return named(value)


class DistillationSection(Section):
    """The distillation method and its own options."""

    distillation_method: str | None = setting(
        None, "must_match", "Method. Default: none, which fine-tunes with the model's own objective."
    )
    distillation_config: dict[str, Json] = setting(
        {}, "may_change", "Options of the method, flat or nested under its name; see documentation/distillers."
    )
