"""What a model family is, and where the files of a model are.

A family is one file in this folder, bound to ``PLUGIN``: a class that is made without arguments and satisfies
``ModelFamily``. Families import diffusers and transformers inside the functions that use them: the two cost six
seconds of start-up, and ``simpletuner plan`` needs neither.

Shapes: B batch, C latent channels, h w latent size, H W picture size in pixels, S tokens, D width of the text features.
"""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from torch import Tensor, nn

from simpletuner.batch import Cond
from simpletuner.config.errors import UserError
from simpletuner.schedules import NoiseSchedule

Part = Literal["vae", "text"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Json = dict[str, Any]  # Any: the values of another library's config files

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w(?:[\w.-]*\w)?")


@dataclass(frozen=True)
class Place:
    """What one config key names: a diffusers folder, one ``.safetensors`` file, or a repository of the hub."""

    path: str
    key: str
    """The config key to name in errors."""
    revision: str | None = None
    variant: str | None = None

    @property
    def kind(self) -> Literal["folder", "file", "hub"]:
        """The kind of place. Raises UserError when it is nothing that a model can be loaded from."""
        local = Path(self.path).expanduser()
        if local.is_dir():
            return "folder"
        if local.is_file():
            if local.suffix == ".safetensors":
                return "file"
            raise UserError(f"{self.key}: '{self.path}' is no .safetensors file; convert it (pickles can hold code)")
        if _HUB_ID.fullmatch(self.path) and local.suffix not in (".safetensors", ".ckpt"):
            return "hub"
        raise UserError(
            f"{self.key}: '{self.path}' does not exist; give a diffusers folder, a .safetensors file, "
            "or a hub id such as 'stabilityai/stable-diffusion-xl-base-1.0'"
        )

    def local(self, name: str = "") -> Path | None:
        """Returns the path of a file of the place where it is on this machine, else None; asks no network."""
        if self.kind == "file":
            return None
        if self.kind == "folder":
            found = Path(self.path).expanduser() / name
            return found if found.exists() else None
        cached = huggingface_hub.try_to_load_from_cache(self.path, name, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def fetch(self, patterns: Iterable[str]) -> Path:
        """Returns the folder that holds the files matching the patterns, downloaded first for a hub id.

        Raises:
            UserError: The hub could not give them; says why and what to do.
        """
        if self.kind != "hub":
            return Path(self.path).expanduser()
        try:
            return Path(
                huggingface_hub.snapshot_download(self.path, revision=self.revision, allow_patterns=list(patterns))
            )
        except GatedRepoError as error:
            raise UserError(
                f"{self.key}: '{self.path}' is gated: accept its terms at https://huggingface.co/{self.path}, "
                "then run `hf auth login`, or give a local folder"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(f"revision: '{self.path}' has no revision '{self.revision}'") from error
        except OSError as error:  # what all errors of the hub are, and those of the network
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{self.key}: '{self.path}' could not be had from the hub ({reason}): "
                "check the name and the network, run `hf auth login` if it is private, or give a local folder"
            ) from error


@dataclass(frozen=True)
class ModelSource:
    """Where a model's components come from, as the config says it; reads JSON files and safetensors headers only."""

    path: str
    vae_path: str | None = None
    unet_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    single_file_config: str | None = None
    """Folder or hub id with the component configs of a single-file model; None: the family's published model."""

    @property
    def main(self) -> Place:
        """The place that ``pretrained_model_name_or_path`` names."""
        return Place(self.path, "pretrained_model_name_or_path", self.revision, self.variant)

    def place(self, component: str) -> Place:
        """Returns the place of a component: its own when the config names one, else the model's.

        ``revision`` and ``variant`` are the model's: another repository seldom has the same.
        """
        if component == "vae" and self.vae_path:
            return Place(self.vae_path, "pretrained_vae_model_name_or_path")
        if component == "unet" and self.unet_path:
            return Place(self.unet_path, "pretrained_unet_model_name_or_path")
        return self.main

    def config_place(self, published: str) -> Place:
        """Returns where the configs of single-file components are: as set, else with the model, else published."""
        if self.single_file_config is None and self.main.kind != "file":
            return self.main
        return Place(self.single_file_config or published, "single_file_config")

    def check(self, components: Iterable[str]) -> None:
        """Raises UserError when a path names nothing, or a folder lacks a component or its weights; asks no network."""
        for component in components:
            place = self.place(component)
            if place.kind != "folder":
                continue
            if self.read_json(component, "config.json") is None:
                raise UserError(
                    f"{place.key}: the folder '{place.path}' is no diffusers model: it has no {component}/config.json"
                )
            if self.shapes(component) is None:
                raise UserError(self._no_weights(component))

    def _no_weights(self, component: str) -> str:
        place = self.place(component)
        asked = f" of the variant '{place.variant}'" if place.variant else ""
        return (
            f"{place.key}: '{place.path}' has no safetensors weights{asked} for its {component}; choose another "
            "variant, or convert pickled weights: they can hold code and are never loaded"
        )

    def read_json(self, component: str, name: str) -> Json | None:
        """Returns a JSON file of a component (``""``: of the model itself), or None when it is not on this machine."""
        found = self._find(component, [name])
        return json.loads(found.read_text(encoding="utf8")) if found else None

    def fetch(self, component: str, marker: str = "config.json") -> Path:
        """Returns the folder of a component's files (or the single file), downloaded first for a hub id.

        Args:
            component: Such as ``"unet"``.
            marker: A file that the folder must have. Next to a ``config.json`` there must be safetensors weights.

        Raises:
            UserError: The component cannot be had, or has no safetensors weights.
        """
        place = self.place(component)
        if place.kind == "file":
            return Path(place.path).expanduser()
        root = place.fetch(_patterns(component, place.variant))
        folder = root / component if (root / component).is_dir() or place == self.main else root
        if not (folder / marker).is_file():
            raise UserError(f"{place.key}: '{place.path}' has no {component}/{marker}")
        if marker == "config.json" and not self.weights(component):
            raise UserError(self._no_weights(component))
        return folder

    def weights(self, component: str) -> list[Path]:
        """Returns the safetensors files of a component; none when one of them is not on this machine."""
        place = self.place(component)
        if place.kind == "file":
            return [Path(place.path).expanduser()]
        whole = self._find(component, [f"{stem}.safetensors" for stem in weight_stems(place.variant)])
        if whole is not None:
            return [whole]
        suffix = f".{place.variant}" if place.variant else ""
        index = self._find(component, [f"{stem}.safetensors.index{suffix}.json" for stem in weight_stems(None)])
        if index is None:
            return []
        names: set[str] = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
        shards = [index.parent / name for name in sorted(names)]
        return shards if all(shard.exists() for shard in shards) else []

    def shapes(self, component: str) -> dict[str, tuple[int, ...]] | None:
        """Returns parameter name -> shape from the safetensors headers, or None when they are not on this machine."""
        files = self.weights(component)
        return {name: shape for path in files for name, shape in read_shapes(path).items()} if files else None

    def _find(self, component: str, names: Iterable[str]) -> Path | None:
        """Returns the first of a component's files that is on this machine.

        A place that holds the one component only may have its files at the root.
        """
        place = self.place(component)
        folders = (f"{component}/", "") if place != self.main else (f"{component}/" if component else "",)
        found = (place.local(f"{folder}{name}") for name in names for folder in folders)
        return next((path for path in found if path is not None and path.is_file()), None)


def weight_stems(variant: str | None) -> tuple[str, ...]:
    """Returns the file names, without .safetensors, that diffusers and transformers give to unsharded weights."""
    suffix = f".{variant}" if variant else ""
    return f"diffusion_pytorch_model{suffix}", f"model{suffix}"


def _patterns(component: str, variant: str | None) -> list[str]:
    """Returns the hub files of a component that loading needs: not the other variants, not ONNX, not pickles."""
    weights = [f"{stem}{shard}.safetensors" for stem in weight_stems(variant) for shard in ("", "-?????-of-?????")]
    if variant:
        weights += [f"{stem}-?????-of-?????.{variant}.safetensors" for stem in weight_stems(None)]
    names = ["*.json", "*.txt", *weights]
    return ["model_index.json", *(f"{component}/{name}" for name in names), "config.json", *weights]


def read_header(path: Path) -> Json:
    """Returns the JSON header of a safetensors file: tensor name -> dtype, shape, data_offsets."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            return json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise UserError(f"'{path}' is damaged: no safetensors header ({error}); fetch the file anew") from error


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns tensor name -> shape of a safetensors file; reads its header only."""
    return {name: tuple(entry["shape"]) for name, entry in read_header(path).items() if name != "__metadata__"}


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
    encoders_here: bool = False
    """Whether VAE and text encoders are on this machine: only then can the caches made by them be looked into."""
    notices: tuple[str, ...] = ()
    """What is unknown, and why: lines for the plan."""


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
    """A family's VAE and text encoders; only the family reads more than ``vae``."""

    vae: nn.Module | None


class ModelFamily(Protocol):
    """What training needs from a family; every method is stateless."""

    prediction_type: PredictionType
    """Of a model whose files do not say."""
    provides: frozenset[str]
    """What methods may require, such as ``"uncond"`` or ``"guidance_embedding"``."""
    pipeline_class: str
    """Name of the diffusers pipeline that draws with these models."""
    usual_sampling: tuple[int, float]
    """Steps and guidance scale with which the base models are usually drawn, by their own scheduler."""
    lora_targets: tuple[str, ...]
    """Default targets where the method advises none: those of diffusers' own training scripts."""

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
