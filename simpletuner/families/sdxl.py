# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# (diffusers and transformers are typed in part: most of what their objects return is unknown to a type checker)
"""Stable Diffusion XL (arXiv 2307.01952): a UNet conditioned on two text encoders and on the picture's true geometry.

Shapes: B batch, C latent channels (4), h w latent size, H W picture size in pixels, S tokens (77), D = D1 + D2 width of
the two text encoders, P width of the pooled features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simpletuner.atomic import files_into
from simpletuner.batch import Cond
from simpletuner.config.errors import UserError
from simpletuner.families._base import Facts, Part, PredictionType, lora_metadata
from simpletuner.families._fingerprint import fingerprint
from simpletuner.families._sdxl_encoders import (
    PARTS,
    PUBLISHED,
    SDXLEncoders,
    config_patterns,
    load_text,
    load_vae,
    marker,
)
from simpletuner.families._source import Json, ModelSource, read_shapes
from simpletuner.schedules import NoiseSchedule, from_scheduler_config

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

LORA_FILE = "pytorch_lora_weights.safetensors"
# Of the tensors in a single file.
_PREFIXES: dict[Part, tuple[str, ...]] = {"vae": ("first_stage_model.", "vae."), "text": ("conditioner.",)}
_UNET_MARK = "model.diffusion_model.label_emb.0.0.weight"

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
class SDXL:
    """The SDXL family; see ``ModelFamily`` for what its methods return."""

    zeros_for_empty_prompt: bool = True
    """``force_zeros_for_empty_prompt`` of model_index.json: unconditional features are zeros, else the encoded ""."""

    prediction_type: PredictionType = "epsilon"
    provides: frozenset[str] = frozenset({"uncond", "guidance_embedding", "lora", "epsilon", "v_prediction"})
    pipeline_class: str = "StableDiffusionXLPipeline"
    usual_sampling: tuple[int, float] = (30, 5.0)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def facts(self, source: ModelSource) -> Facts:
        """Returns what headers and JSON files tell about the model."""
        source.check(("unet", "vae", "text_encoder", "text_encoder_2"))
        scheduler = self._scheduler_config(source)
        unet = source.read_json("unet", "config.json") or {}
        _check_kind(source, unet)
        shapes, notices = source.shapes("unet"), ()
        if source.place("unet").kind == "file":
            shapes = None
            notices = ("a single file names its layers in another way: what is trained is counted when it is loaded",)
        elif shapes is None:
            notices = (f"'{source.place('unet').path}' is no folder here: it will be downloaded from the hub",)
        return Facts(
            scheduler_config=scheduler,
            prediction_type=None if scheduler is None else scheduler.get("prediction_type", self.prediction_type),
            shapes=shapes,
            guidance_embed_dim=unet.get("time_cond_proj_dim"),
            cond_numbers=_cond_numbers(unet),
            encoders_here=_encoders_here(source),
            notices=notices,
        )

    def for_model(self, source: ModelSource) -> "SDXL":
        """Returns the family as the model's model_index.json configures it."""
        index = source.read_json("", "model_index.json") or {}
        return replace(self, zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True))

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule of the model's own scheduler config."""
        config = self._scheduler_config(source)
        if config is None:
            source.main.fetch(["model_index.json", "scheduler/*.json"])
            config = self._scheduler_config(source)
        if config is None:
            raise UserError(f"{source.main.key}: '{source.path}' has no scheduler/scheduler_config.json")
        return from_scheduler_config(config)

    def _scheduler_config(self, source: ModelSource) -> Json | None:
        """Returns the scheduler config, or None for a hub id that is not on this machine yet."""
        if source.main.kind != "file":
            config = source.read_json("scheduler", "scheduler_config.json")
            if config is None and source.main.kind == "folder":
                raise UserError(f"{source.main.key}: '{source.path}' has no scheduler/scheduler_config.json")
            return config
        beside = source.single_file_config and ModelSource(source.single_file_config)
        found = beside.read_json("scheduler", "scheduler_config.json") if beside else None
        config = found or dict(_PUBLISHED_SCHEDULER)
        # The marks that v-prediction checkpoints carry, as other trainers and user interfaces write and read them.
        marks = read_shapes(Path(source.path).expanduser())
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
            config = str(source.config_place(PUBLISHED).fetch(config_patterns()))
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
        vae = load_vae(source, device, dtype) if "vae" in parts else None
        if "text" not in parts:
            return SDXLEncoders(vae=vae)
        encoders, tokenizers = load_text(source, dtype)
        for encoder in encoders:
            nn.Module.to(encoder, device).requires_grad_(False).eval()
        return SDXLEncoders(vae=vae, text_encoders=encoders, tokenizers=tokenizers)

    @torch.no_grad()
    def encode_image(self, encoders: SDXLEncoders, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns posterior mean and standard deviation, [B, C, h, w] float32, as the UNet sees latents.

        The inverse of what ``StableDiffusionXLPipeline`` does before it decodes.
        """
        vae = encoders.vae
        assert vae is not None, "the encoders were loaded without the VAE"
        posterior: Any = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)[0]
        mean, std = posterior.mean.float(), posterior.std.float()
        scale = vae.config["scaling_factor"]
        if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
            center, spread = (mean.new_tensor(vae.config[key]) for key in ("latents_mean", "latents_std"))
            scale = scale / spread[:, None, None]
            mean = mean - center[:, None, None]
        return mean * scale, std * scale

    @torch.no_grad()
    def encode_prompt(self, encoders: SDXLEncoders, prompts: list[str]) -> Cond:
        """Returns ``prompt_embeds`` [B, S, D] and ``pooled_prompt_embeds`` [B, P].

        Tokens: the layer before the last of both encoders, side by side. Pooled: the second encoder's projection.
        Prompts are cut after 75 tokens, as in the pipeline.
        """
        assert encoders.text_encoders is not None, "the encoders were loaded without the text part"
        assert encoders.tokenizers is not None
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
        unet: Any = module.module if isinstance(module, DistributedDataParallel) else module
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

        text: tuple[Any, Any] = (encoders and encoders.text_encoders) or (None, None)
        tokenizers: tuple[Any, Any] = (encoders and encoders.tokenizers) or (None, None)
        unet: Any = module
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text[0],
            text_encoder_2=text[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
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

        with files_into(folder) as temporary:
            StableDiffusionXLPipeline.save_lora_weights(
                temporary,
                unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in state.items()},
                unet_lora_adapter_metadata=lora_metadata(metadata),
            )
        return folder / LORA_FILE

    def load_lora(self, module: nn.Module, path: Path, adapter: str) -> None:
        """Adds the adapter of a file (diffusers' or kohya's names) to the UNet, under a name."""
        from diffusers import StableDiffusionXLPipeline

        unet: Any = module  # Any: diffusers' mixins carry no types
        try:
            read: Any = StableDiffusionXLPipeline.lora_state_dict(
                str(path), unet_config=unet.config, use_safetensors=True, return_lora_metadata=True
            )
            state, alphas, metadata = read
            StableDiffusionXLPipeline.load_lora_into_unet(
                state, network_alphas=alphas, unet=unet, adapter_name=adapter, metadata=metadata
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"init_lora: '{path}' is no adapter for this model: {error}") from error

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on; a hub id is downloaded first."""
        components = PARTS[part]
        place = source.place(components[0])
        prefixes = _PREFIXES[part] if place.kind == "file" and place == source.main else ("",)
        if place.kind == "file":
            configs = source.config_place(PUBLISHED).fetch(config_patterns())
            folders, weights = [configs / name for name in components], source.weights(components[0])
        else:
            folders = [source.fetch(name, marker(name)) for name in components]
            weights = [path for name in components for path in source.weights(name)]
        texts = (path for folder in folders for end in ("*.json", "*.txt") for path in folder.glob(end))
        return fingerprint(weights, (path for path in texts if ".index." not in path.name), prefixes)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of a picture's latents: the VAE's factor is 8."""
        return 4, height // 8, width // 8


def guidance_embedding(w: Tensor | None, dim: int) -> Tensor:
    """Returns [B, dim] float32: the sinusoidal embedding of 1000 w, as diffusers' pipelines feed it."""
    assert w is not None
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * frequencies[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def _cond_numbers(unet: Json) -> int:
    """Returns 77 tokens of width D, and P pooled numbers; the published model's widths when the config is not there."""
    pooled = unet.get("projection_class_embeddings_input_dim", 2816) - 6 * unet.get("addition_time_embed_dim", 256)
    return 77 * unet.get("cross_attention_dim", 2048) + pooled


def _check_kind(source: ModelSource, config: Json) -> None:
    """Raises UserError when a UNet's config, or a single file's tensor names, are those of another model."""
    place = source.place("unet")
    if config and (config.get("addition_embed_type") != "text_time" or config.get("in_channels", 4) != 4):
        raise UserError(f"{place.key}: '{place.path}' is no SDXL text-to-image model (model_family: sdxl)")
    if place.kind == "file" and _UNET_MARK not in (source.shapes("unet") or {}):
        raise UserError(f"{place.key}: '{place.path}' is no SDXL checkpoint: it has no {_UNET_MARK}")
    for part in ("vae", "text"):
        if source.main.kind == "file" and source.place(PARTS[part][0]) == source.main:
            names = source.shapes(PARTS[part][0]) or {}
            if not any(name.startswith(_PREFIXES[part]) for name in names):
                raise UserError(f"{source.main.key}: '{source.path}' holds no {PARTS[part][0]}; use a diffusers folder")


def _encoders_here(source: ModelSource) -> bool:
    """Returns whether VAE and text encoders, or the configs of a single file's, are on this machine."""
    if source.main.kind == "file":
        return source.config_place(PUBLISHED).local("model_index.json") is not None
    return all(source.shapes(name) is not None for name in ("vae", "text_encoder", "text_encoder_2"))


PLUGIN = SDXL
