"""What a model family is; where the files of its models are stands in ``_source.py``.

A family is one file in this folder, bound to ``PLUGIN``: a class that is made without arguments and satisfies
``ModelFamily``. Families import diffusers and transformers inside the functions that use them: the two cost six
seconds of start-up, and ``simpletuner plan`` needs neither.

Shapes: B batch, C latent channels, h w latent size, H W picture size in pixels, S tokens, D width of the text features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from simpletuner.batch import Cond
from simpletuner.families._source import Json, ModelSource
from simpletuner.schedules import NoiseSchedule

Part = Literal["vae", "text"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True)
class Facts:
    """What is known about a model before any weight is loaded; None: unknown until it has been downloaded."""

    scheduler_config: Json | None = None
    prediction_type: PredictionType | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Parameter name -> shape of the network to train, in diffusers' names."""
    guidance_embed_dim: int | None = None
    """Width of the guidance embedding that the network already has."""
    cond_numbers: int = 0
    """How many numbers one prompt's features are, for the size of the cache."""
    encoder_numbers: Mapping[Part, int] = field(default_factory=dict[Part, int])
    """How many weights the encoders have, of those that are on this machine."""
    num_text_encoders: int = 0
    encoders_here: bool = False
    """Whether VAE and text encoders are on this machine: only then can the caches made by them be looked into."""
    notices: tuple[str, ...] = ()
    """What is unknown, and why: lines for the plan."""


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
LORA_PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention-ff": (*_ATTENTION, *_FEED_FORWARD),
    "all-linear": (*_ATTENTION, *_FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2"),
    "lcm": (*_ATTENTION, "proj_in", "proj_out", *_FEED_FORWARD, *_CONVOLUTIONS),
}
"""Names that stand for lists of layers. lcm: of the published LCM-LoRAs, 196.8M parameters at rank 64 on SDXL, 67.3M on
SD 1.5."""


def lora_modules(shapes: Mapping[str, tuple[int, ...]], targets: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns module name -> weight shape of the layers that peft adapts for a list of target names.

    peft matches a target with the whole name or with its end after a dot; only linear and convolution weights count.
    """
    endings = tuple(f".{target}" for target in targets)
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {name: shape for name, shape in modules.items() if len(shape) > 1 and f".{name}".endswith(endings)}


# What LoraConfig needs to restore an adapter. Its other keys are defaults, and differ from one peft to the next: a peft
# that does not know one refuses the whole file.
_LORA_CONFIG_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern"),
)


def lora_metadata(config: Json) -> Json:
    """Returns what of ``LoraConfig.to_dict()`` belongs into an adapter's file, with lists in place of sets, sorted."""
    kept = {key: config[key] for key in _LORA_CONFIG_KEYS if key in config}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def lora_num_parameters(modules: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """Returns the number of LoRA parameters: A is [rank, in, *kernel], B is [out, rank] (with a 1x1 kernel)."""
    return sum(rank * (shape[0] + torch.Size(shape[1:]).numel()) for shape in modules.values())


class Encoders(Protocol):
    """A family's VAE and text encoders; only the family reads more than these."""

    @property
    def vae(self) -> nn.Module | None:
        """The VAE; None where only text was asked for."""
        ...

    @property
    def text_encoders(self) -> tuple[Any, ...] | None:  # Any: transformers' modules
        """The text encoders, in the order of ``text_encoder_N_precision``; None where only the VAE was asked for."""
        ...


class ModelFamily(Protocol):
    """What training needs from a family; every method is stateless."""

    @property
    def prediction_type(self) -> PredictionType:
        """Of a model whose files do not say."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """What methods may require, such as ``"uncond"`` or ``"guidance_embedding"``."""
        ...

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers pipeline that draws with these models."""
        ...

    @property
    def usual_sampling(self) -> tuple[int, float]:
        """Steps and guidance scale with which the base models are usually drawn, by their own scheduler."""
        ...

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Guidance w, in the paper's form, that a distilled network is told unless the config says otherwise."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Default targets where the method advises none: those of diffusers' own training scripts."""
        ...

    def facts(self, source: ModelSource) -> Facts:
        """Returns what headers and JSON files tell. Raises UserError when the source is no model of this family."""
        ...

    def for_model(self, source: ModelSource) -> "ModelFamily":
        """Returns the family as the model's own files configure it."""
        ...

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule that the model was trained with."""
        ...

    def load(
        self, source: ModelSource, dtype: torch.dtype = torch.float32, guidance_embed_dim: int | None = None
    ) -> nn.Module:
        """Returns the network in evaluation mode on the CPU.

        Args:
            source: Where it comes from.
            dtype: Of the weights.
            guidance_embed_dim: Adds a guidance embedding of this width, projected by zeros: no change at step 0.
        """
        ...

    def load_encoders(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, parts: frozenset[Part]
    ) -> Encoders:
        """Returns the encoders of the parts, frozen, on the device; for two dtypes, load the parts one by one."""
        ...

    def encode_image(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:  # Any: own Encoders
        """Returns posterior mean and standard deviation, [B, C, h, w] float32, of pixels [B, 3, H, W] in [-1, 1]."""
        ...

    def encode_prompt(self, encoders: Any, prompts: list[str]) -> Cond:  # Any: own Encoders
        """Returns the text features of B prompts."""
        ...

    def uncond(self, cond: Cond, empty: Cond | None = None) -> Cond:
        """Returns the unconditional features in the shape of ``cond``; ``empty`` holds those of the prompt ""."""
        ...

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """Returns the network's raw prediction [B, C, h, w].

        Args:
            module: The network, or its DistributedDataParallel wrapper.
            x_t: [B, C, h, w] noisy latents.
            model_t: [B] times as the network counts them.
            cond: Text features.
            geometry: [B, 6] original height, width; crop top, left; target height, width.
            w: [B] guidance scale of the paper (diffusers' guidance_scale - 1) for a network that embeds it; a network
                without that embedding takes no notice of it.
        """
        ...

    def pipeline(self, module: nn.Module, scheduler: Any, vae: Any, encoders: Any = None) -> Any:  # diffusers' types
        """Returns a stock diffusers pipeline around the parts; without encoders it takes features only."""
        ...

    def pipeline_inputs(self, cond: Cond, uncond: Cond | None = None) -> dict[str, Tensor]:
        """Returns the features as the keyword arguments of the pipeline's call."""
        ...

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], metadata: Json) -> Path:
        """Writes an adapter in diffusers' format, atomically; returns the file.

        Args:
            folder: Where to; made if need be.
            state: peft's state dict of the adapted network (``get_peft_model_state_dict``).
            metadata: ``LoraConfig.to_dict()``: without it alpha is lost.
        """
        ...

    def load_lora(self, module: nn.Module, path: Path, adapter: str) -> None:
        """Adds the adapter of a file to the network, under a name, as a stock pipeline would.

        Raises:
            UserError: The file is no adapter of this family.
        """
        ...

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of a picture's latents."""
        ...
