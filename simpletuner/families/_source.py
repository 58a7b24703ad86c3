"""Where the files of a model are: a diffusers folder, one .safetensors file, or a repository of the hub.

Only JSON files and safetensors headers are read here, and nothing is downloaded but by ``fetch``.
"""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from simpletuner.config.errors import UserError

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
        if found is None:
            return None
        try:
            return json.loads(found.read_text(encoding="utf8"))
        except ValueError as error:
            raise UserError(
                f"{self.place(component).key}: '{found}' is damaged: {error}; fetch the file anew"
            ) from error

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
