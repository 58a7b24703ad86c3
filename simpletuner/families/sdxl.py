"""Stable Diffusion XL (arXiv 2307.01952): a UNet conditioned on two text encoders and on the picture's true geometry.

Shapes: B batch, C latent channels (4), h w latent size, H W picture size in pixels, S tokens (77), D = D1 + D2 width of
the two text encoders, P width of the pooled features.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simpletuner.batch import Cond
from simpletuner.config.errors import UserError
from simpletuner.families._base import Facts, Json, ModelSource, Part, PredictionType
from simpletuner.families._fingerprint import fingerprint_files
from simpletuner.schedules import NoiseSchedule, from_scheduler_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PUBLISHED = "stabilityai/stable-diffusion-xl-base-1.0"
TEXT_COMPONENTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
LORA_FILE = "pytorch_lora_weights.safetensors"

# What the published model was trained with: for a single file, which brings no scheduler config.
_PUBLISHED_SCHEDULER: Json = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclass(frozen=True)
class SDXLEncoders:
    """The parts that were asked for; the others are None."""

    vae: "AutoencoderKL | None" = None
    text_encoders: "tuple[CLIPTextModel, CLIPTextModelWithProjection] | None" = None
    tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer] | None" = None


@dataclass(frozen=True)
class SDXL:
    """The SDXL family; see ``ModelFamily`` for what its methods return."""

    zeros_for_empty_prompt: bool = True
    """``force_zeros_for_empty_prompt`` of model_index.json: unconditional features are zeros, else the encoded ""."""

    prediction_type: PredictionType = "epsilon"
    provides: frozenset[str] = frozenset({"uncond", "guidance_embedding", "lora", "epsilon", "v_prediction"})
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    # The published LCM-LoRA (arXiv 2311.05556): with rank 64 that is 196.8M parameters on SDXL.
    distillation_lora_targets: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    def facts(self, source: ModelSource) -> Facts:
        """Returns what headers and JSON files tell about the model."""
        source.check(("unet", "vae", "text_encoder", "text_encoder_2"))
        scheduler = self._scheduler_config(source)
        shapes = source.shapes("unet")
        unet = source.read_json("unet", "config.json") or {}
        notices: tuple[str, ...] = ()
        if source.place("unet").kind == "file":
            shapes = None
            notices = ("a single file names its layers in another way: trainable parameters are counted at loading",)
        elif shapes is None:
            notices = (f"'{source.path}' is not on this machine yet: it will be downloaded from the hub",)
        return Facts(
            scheduler_config=scheduler,
            prediction_type=None if scheduler is None else scheduler.get("prediction_type", self.prediction_type),
            shapes=shapes,
            guidance_embed_dim=unet.get("time_cond_proj_dim"),
            cond_numbers=_cond_numbers(unet),
            notices=notices,
        )

    def for_model(self, source: ModelSource) -> "SDXL":
        """Returns the family as the model's model_index.json configures it."""
        index = source.read_json("", "model_index.json") or {}
        return replace(self, zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True))

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule of the model's own scheduler config."""
        if self._scheduler_config(source) is None:
            source.main.fetch(["model_index.json", "scheduler/*.json"])
        config = self._scheduler_config(source)
        if config is None:
            raise UserError(f"{source.main.key}: '{source.path}' has no scheduler/scheduler_config.json")
        return from_scheduler_config(config)

    def _scheduler_config(self, source: ModelSource) -> Json | None:
        """Returns the scheduler config, or None for a hub id that is not on this machine yet."""
        if source.main.kind != "file":
            return source.read_json("scheduler", "scheduler_config.json")
        configs = replace(source, path=source.single_file_config) if source.single_file_config else None
        found = configs.read_json("scheduler", "scheduler_config.json") if configs else None
        config = dict(found or _PUBLISHED_SCHEDULER)
        # The marks that v-prediction checkpoints carry, as other trainers and user interfaces write and read them.
        marks = source.shapes("unet") or {}
        if "v_pred" in marks:
            config["prediction_type"] = "v_prediction"
        if "ztsnr" in marks:
            config["rescale_betas_zero_snr"] = True
        return config

    def load(
        self, source: ModelSource, dtype: torch.dtype = torch.float32, guidance_embed_dim: int | None = None
    ) -> "UNet2DConditionModel":
        """Returns the UNet in evaluation mode on the CPU."""
        from diffusers import UNet2DConditionModel

        path = source.fetch("unet")
        if path.is_file():
            config = str(source.config_place(PUBLISHED).fetch(["model_index.json", "unet/config.json"]))
            unet = UNet2DConditionModel.from_single_file(str(path), config=config, subfolder="unet", dtype=dtype)
        else:
            unet = UNet2DConditionModel.from_pretrained(
                path, use_safetensors=True, variant=source.place("unet").variant, torch_dtype=dtype
            )
        if guidance_embed_dim is not None and unet.config["time_cond_proj_dim"] is None:
            embedding = unet.time_embedding
            # diffusers would initialise it randomly; zeros keep the student equal to its teacher at step 0.
            embedding.cond_proj = nn.Linear(guidance_embed_dim, embedding.linear_1.in_features, bias=False, dtype=dtype)
            nn.init.zeros_(embedding.cond_proj.weight)
            unet.register_to_config(time_cond_proj_dim=guidance_embed_dim)
        return unet.eval()

    def load_encoders(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, parts: frozenset[Part]
    ) -> SDXLEncoders:
        """Returns the encoders of the parts, frozen, on the device.

        Raises:
            UserError: The VAE is asked for in float16, where the published one overflows.
        """
        vae = _load_vae(source, dtype).to(device) if "vae" in parts else None
        if "text" not in parts:
            return SDXLEncoders(vae=vae)
        encoders, tokenizers = _load_text(source, dtype)
        for encoder in encoders:
            encoder.to(device).requires_grad_(False).eval()
        return SDXLEncoders(vae=vae, text_encoders=encoders, tokenizers=tokenizers)

    @torch.no_grad()
    def encode_image(self, encoders: SDXLEncoders, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns posterior mean and standard deviation, [B, C, h, w] float32, as the UNet sees latents.

        The inverse of what ``StableDiffusionXLPipeline`` does before it decodes.
        """
        vae = encoders.vae
        assert vae is not None, "the encoders were loaded without the VAE"
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        scale = vae.config["scaling_factor"]
        if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
            center, spread = (mean.new_tensor(vae.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
            return (mean - center) * scale / spread, std * scale / spread
        return mean * scale, std * scale

    @torch.no_grad()
    def encode_prompt(self, encoders: SDXLEncoders, prompts: list[str]) -> Cond:
        """Returns ``prompt_embeds`` [B, S, D] and ``pooled_prompt_embeds`` [B, P].

        Tokens: the layer before the last of both encoders, side by side. Pooled: the second encoder's projection.
        Prompts are cut after 75 tokens, as in the pipeline.
        """
        assert encoders.text_encoders is not None and encoders.tokenizers is not None, "loaded without the text part"
        states: list[Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(encoders.tokenizers, encoders.text_encoders, strict=True):
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        return {"prompt_embeds": torch.cat(states, dim=-1), "pooled_prompt_embeds": pooled}

    def uncond(self, cond: Cond, empty: Cond | None = None) -> Cond:
        """Returns zeros, tokens and pooled; or ``empty`` for a model whose files say that it wants the encoded ""."""
        if self.zeros_for_empty_prompt:
            return {key: torch.zeros_like(value) for key, value in cond.items()}
        assert empty is not None, "this model's unconditional features are those of the empty prompt"
        return {key: empty[key].to(value).expand_as(value) for key, value in cond.items()}

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """Returns the UNet's raw prediction [B, C, h, w]."""
        unet = module.module if isinstance(module, DistributedDataParallel) else module
        dtype = next(module.parameters()).dtype
        cond_proj = unet.time_embedding.cond_proj
        if cond_proj is not None and w is None:
            # diffusers would leave the embedding out and run on, silently wrong.
            raise ValueError("this UNet embeds the guidance scale (time_cond_proj_dim): call it with w")
        embedded = guidance_embedding(w, cond_proj.in_features).to(dtype) if cond_proj is not None else None
        return module(
            x_t.to(dtype),
            model_t,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep_cond=embedded,
            # time_ids stay float32: bfloat16 rounds 1365 to 1368.
            added_cond_kwargs={"text_embeds": cond["pooled_prompt_embeds"].to(dtype), "time_ids": geometry.float()},
            return_dict=False,
        )[0]

    def pipeline(
        self, module: nn.Module, scheduler: Any, vae: Any, encoders: SDXLEncoders | None = None
    ) -> "StableDiffusionXLPipeline":  # Any: diffusers' schedulers share no public base with types
        """Returns a stock pipeline around the parts; without encoders it takes features only."""
        from diffusers import StableDiffusionXLPipeline

        text, tokenizers = (None, None), (None, None)
        if encoders is not None and encoders.text_encoders is not None and encoders.tokenizers is not None:
            text, tokenizers = encoders.text_encoders, encoders.tokenizers
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text[0],
            text_encoder_2=text[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=module,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
        )

    def pipeline_inputs(self, cond: Cond, uncond: Cond | None = None) -> dict[str, Tensor]:
        """Returns the features as the keyword arguments of the pipeline's call."""
        return {**cond, **{f"negative_{key}": value for key, value in (uncond or {}).items()}}

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], metadata: Json) -> Path:
        """Writes ``pytorch_lora_weights.safetensors`` in diffusers' format, atomically; returns the file."""
        from diffusers import StableDiffusionXLPipeline

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as temporary:
            StableDiffusionXLPipeline.save_lora_weights(
                temporary,
                unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in state.items()},
                unet_lora_adapter_metadata=metadata,
            )
            written = Path(temporary) / LORA_FILE
            with written.open("rb") as file:
                os.fsync(file.fileno())
            return written.replace(folder / LORA_FILE)

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on; a hub id is downloaded first."""
        components = ("vae",) if part == "vae" else TEXT_COMPONENTS
        if source.place(components[0]).kind != "file":
            markers = ("tokenizer_config.json" if name.startswith("tokenizer") else "config.json" for name in components)
            return fingerprint_files(source.fetch(name, marker) for name, marker in zip(components, markers, strict=True))
        configs = source.config_place(PUBLISHED).fetch(_config_patterns())
        own = [configs / component for component in components]
        return fingerprint_files([source.fetch(components[0]), *(folder for folder in own if folder.is_dir())])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of a picture's latents: the VAE's factor is 8."""
        return 4, height // 8, width // 8


def guidance_embedding(w: Tensor | None, dim: int) -> Tensor:
    """Returns [B, dim] float32, the sinusoidal embedding of 1000 w that diffusers' pipelines feed (arXiv 2310.04378)."""
    assert w is not None
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * frequencies[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def _cond_numbers(unet: Json) -> int:
    """Returns 77 tokens of width D, and P pooled numbers; the published model's widths when the config is not there."""
    time_ids = 6 * unet.get("addition_time_embed_dim", 256)
    return 77 * unet.get("cross_attention_dim", 2048) + unet.get("projection_class_embeddings_input_dim", 2816) - time_ids


def _config_patterns() -> list[str]:
    return ["model_index.json", *(f"{name}/*.{end}" for name in ("vae", *TEXT_COMPONENTS) for end in ("json", "txt"))]


def _load_vae(source: ModelSource, dtype: torch.dtype) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    place, path = source.place("vae"), source.fetch("vae")
    if path.is_file():
        config = str(source.config_place(PUBLISHED).fetch(_config_patterns()))
        vae = AutoencoderKL.from_single_file(str(path), config=config, subfolder="vae", dtype=dtype)
    else:
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, variant=place.variant, torch_dtype=dtype)
    if dtype == torch.float16 and vae.config["force_upcast"]:
        raise UserError(
            f"vae_dtype: the VAE of '{place.path}' overflows in fp16; use fp32 or bf16, or a VAE made for fp16 "
            "(pretrained_vae_model_name_or_path: madebyollin/sdxl-vae-fp16-fix)"
        )
    if vae.config.get("shift_factor"):
        raise UserError(f"{place.key}: '{place.path}' is no SDXL VAE: SDXL pipelines know no shift_factor")
    return vae.requires_grad_(False).eval()


def _load_text(
    source: ModelSource, dtype: torch.dtype
) -> "tuple[tuple[CLIPTextModel, CLIPTextModelWithProjection], tuple[CLIPTokenizer, CLIPTokenizer]]":
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    if source.main.kind == "file":
        from diffusers import StableDiffusionXLPipeline

        config = str(source.config_place(PUBLISHED).fetch([*_config_patterns(), "scheduler/*.json"]))
        # diffusers converts the text encoders of a single file only on the way to a pipeline.
        parts = StableDiffusionXLPipeline.from_single_file(
            source.path, config=config, unet=None, vae=None, dtype=dtype, add_watermarker=False
        )
        return (parts.text_encoder, parts.text_encoder_2), (parts.tokenizer, parts.tokenizer_2)
    keywords: dict[str, Any] = {"use_safetensors": True, "variant": source.variant, "dtype": dtype}
    encoders = (
        CLIPTextModel.from_pretrained(source.fetch("text_encoder"), **keywords),
        CLIPTextModelWithProjection.from_pretrained(source.fetch("text_encoder_2"), **keywords),
    )
    first, second = (CLIPTokenizer.from_pretrained(source.fetch(name, "tokenizer_config.json")) for name in ("tokenizer", "tokenizer_2"))
    return encoders, (first, second)


PLUGIN = SDXL
