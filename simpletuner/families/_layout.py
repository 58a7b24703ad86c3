"""What Stable Diffusion families differ in as data: their components, and how one file holds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from simpletuner.config.errors import UserError
from simpletuner.families._base import Facts, Part
from simpletuner.families._fingerprint import fingerprint
from simpletuner.families._source import Json, ModelSource, read_shapes
from simpletuner.schedules import NoiseSchedule, from_scheduler_config

# What the published models were trained with, whatever their version.
BETAS: Json = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

_VAE_PREFIXES = ("first_stage_model.", "vae.")
_UNET_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_LATENT_CHANNELS = 4
_SCHEDULER = ("scheduler", "scheduler_config.json")


@dataclass(frozen=True)
class Layout:
    """A family's components: a UNet, a VAE, CLIP text encoders with their tokenizers, a scheduler."""

    title: str
    """The models' name in messages."""
    pipeline: str
    """Name of their diffusers pipeline."""
    pipeline_options: Mapping[str, Any]  # Any: arguments of another library's constructor
    """What the pipeline is given beside the components."""
    published: str
    """Repository whose configs and tokenizers serve a single file that names no other."""
    published_scheduler: Json
    """That repository's scheduler config: it is known before anything is downloaded."""
    text_encoders: tuple[str, ...]
    """By the names of diffusers' folders."""
    text_prefix: str
    """Of the text encoders' tensors in a single file."""
    unet_config: Json
    """What the UNet's config says in the family's models only; None is what diffusers takes where nothing is said."""
    unet_marks: Mapping[str, bool]
    """Tensors of a single file -> whether the family's models have them."""
    unknown_to_pipeline: tuple[str, ...]
    """Keys of VAE configs that the pipeline does not heed when it decodes."""

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers' folders, in the text encoders' order."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def components(self, part: Part) -> tuple[str, ...]:
        """Returns what a part consists of, by the names of diffusers' folders."""
        return ("vae",) if part == "vae" else (*self.text_encoders, *self.tokenizers)

    def configs(self, source: ModelSource) -> Path:
        """Returns the folder of the configs for single files, downloaded first for a hub id; no weights."""
        names = ("unet", *self.components("vae"), *self.components("text"), "scheduler")
        patterns = (f"{name}/*.{end}" for name in names for end in ("json", "txt"))
        return source.config_place(self.published).fetch(["model_index.json", *patterns])

    def facts(
        self, source: ModelSource, cond_numbers: Callable[[Json, int], int], notices: tuple[str, ...] = ()
    ) -> Facts:
        """Returns what headers and JSON files tell.

        Args:
            source: Where the model is.
            cond_numbers: UNet's config, {} where it is not here, and the number of tokens -> how many numbers one
                prompt's features are.
            notices: What the family has to say beside what is known of all.

        Raises:
            UserError: The source is no model of the family, or is incomplete.
        """
        source.check(["unet"])
        unet = source.read_json("unet", "config.json") or {}
        self._check_kind(source, unet)
        source.check(["vae", *self.text_encoders])
        scheduler = self.scheduler_config(source)
        shapes = source.shapes("unet")
        if source.place("unet").kind == "file":
            shapes = None
            unknown = "a single file names its layers in another way: what is trained is counted when it is loaded"
            notices = (unknown, *notices)
        elif shapes is None:
            notices = (f"'{source.place('unet').path}' is no folder here: it will be downloaded from the hub", *notices)
        if (width := unet.get("time_cond_proj_dim")) is not None:
            told = (
                f"the network is told its guidance already (time_cond_proj_dim {width}): a student keeps the embedding"
            )
            notices = (f"{told}, and its teacher follows the w that it is told, unguided by the empty prompt", *notices)
        return Facts(
            scheduler_config=scheduler,
            prediction_type=None if scheduler is None else scheduler.get("prediction_type", "epsilon"),
            shapes=shapes,
            guidance_embed_dim=unet.get("time_cond_proj_dim"),
            cond_numbers=cond_numbers(unet, self._num_tokens(source)),
            encoder_numbers={part: count for part in ("vae", "text") if (count := self._numbers(source, part))},
            num_text_encoders=len(self.text_encoders),
            encoders_here=self._encoders_here(source),
            notices=notices,
        )

    def _numbers(self, source: ModelSource, part: Part) -> int | None:
        """Returns how many weights a part has; None when not all of them are on this machine."""
        files = [source.weights(name) for name in self.components(part) if name not in self.tokenizers]
        if not all(files):
            return None
        shapes = [shape for path in sorted({*chain(*files)}) for shape in read_shapes(path).items()]
        prefixes = self._prefixes(source, part)
        return sum(prod(shape) for name, shape in shapes if name.startswith(prefixes))

    def _num_tokens(self, source: ModelSource) -> int:
        """Returns how many tokens a prompt is cut or filled to; CLIP's 77 when the tokenizer is not here."""
        place = source.config_place(self.published)
        beside = ModelSource(place.path, revision=place.revision)
        return (beside.read_json(self.tokenizers[0], "tokenizer_config.json") or {}).get("model_max_length", 77)

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule of the model's own scheduler config, downloaded first for a hub id."""
        config = self.scheduler_config(source)
        if config is None:
            source.config_place(self.published).fetch(["model_index.json", "scheduler/*.json"])
            config = self.scheduler_config(source)
        if config is None:
            raise UserError(f"{source.main.key}: '{source.path}' has no {'/'.join(_SCHEDULER)}")
        return from_scheduler_config(config)

    def scheduler_config(self, source: ModelSource) -> Json | None:
        """Returns the scheduler config, or None where it is to come from the hub and is not on this machine yet."""
        if source.main.kind != "file":
            config = source.read_json(*_SCHEDULER)
            if config is None and source.main.kind == "folder":
                raise UserError(f"{source.main.key}: '{source.path}' has no {'/'.join(_SCHEDULER)}")
            return config
        config = dict(self.published_scheduler)
        if source.single_file_config is not None:
            beside = ModelSource(source.single_file_config)
            found = beside.read_json(*_SCHEDULER)
            if found is None and beside.main.kind == "hub":
                return None
            config = found or config
        # The marks that v-prediction checkpoints carry, as other trainers and user interfaces write and read them.
        marks = read_shapes(Path(source.path).expanduser())
        if "v_pred" in marks:
            config["prediction_type"] = "v_prediction"
        if "ztsnr" in marks:
            config["rescale_betas_zero_snr"] = True
        return config

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on; a hub id is downloaded first."""
        components = self.components(part)
        place = source.place(components[0])
        prefixes = self._prefixes(source, part)
        if place.kind == "file":
            configs = self.configs(source)
            folders, weights = [configs / name for name in components], source.weights(components[0])
        else:
            folders = [source.fetch(name, marker(name)) for name in components]
            weights = [path for name in components for path in source.weights(name)]
        texts = (path for folder in folders for end in ("*.json", "*.txt") for path in folder.glob(end))
        return fingerprint(weights, (path for path in texts if ".index." not in path.name), prefixes)

    def _prefixes(self, source: ModelSource, part: Part) -> tuple[str, ...]:
        """Returns how the names of a part's tensors begin in its file."""
        place = source.place(self.components(part)[0])
        if place.kind != "file" or place != source.main:
            return ("",)
        return _VAE_PREFIXES if part == "vae" else (self.text_prefix,)

    def _check_kind(self, source: ModelSource, unet: Json) -> None:
        """Raises UserError when a UNet's config, or a single file's tensor names, are those of another model."""
        place = source.place("unet")
        channels = unet.get("in_channels", _LATENT_CHANNELS)
        if unet and (channels != _LATENT_CHANNELS or any(unet.get(k) != v for k, v in self.unet_config.items())):
            index = source.read_json("", "model_index.json") if place == source.main else None
            kind = f"; it is made for {index['_class_name']}" if index and index["_class_name"] != self.pipeline else ""
            raise UserError(f"{place.key}: '{place.path}' is no {self.title} text-to-image model{kind}")
        if place.kind == "file":
            shapes = source.shapes("unet") or {}
            for name, present in self.unet_marks.items():
                if (name in shapes) is not present:
                    has = "it has" if name in shapes else "it has no"
                    raise UserError(f"{place.key}: '{place.path}' is no {self.title} checkpoint: {has} {name}")
            if shapes.get(_UNET_INPUT, (0, _LATENT_CHANNELS))[1] != _LATENT_CHANNELS:
                raise UserError(f"{place.key}: '{place.path}' is no {self.title} text-to-image model: it inpaints")
        if source.main.kind == "file":
            self._check_parts(source)

    def _check_parts(self, source: ModelSource) -> None:
        """Raises UserError when the model's single file lacks a part that comes from nowhere else."""
        for part in ("vae", "text"):
            component = self.components(part)[0]
            names = source.shapes(component) or {}
            missing = not any(name.startswith(self._prefixes(source, part)) for name in names)
            if missing and source.place(component) == source.main:
                raise UserError(f"{source.main.key}: '{source.path}' holds no {component}; use a diffusers folder")

    def _encoders_here(self, source: ModelSource) -> bool:
        """Returns whether VAE and text encoders, or the configs of a single file's, are on this machine."""
        if source.main.kind == "file":
            return source.config_place(self.published).local("model_index.json") is not None
        return all(source.shapes(name) is not None for name in ("vae", *self.text_encoders))


def marker(component: str) -> str:
    """Returns the file that shows a component's folder to be one."""
    return "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"
