"""One dataset of the data backend file, resolved: what it does not say is inherited from the main config."""

import re
from pathlib import Path
from typing import Literal

from pydantic import field_serializer

from simpletuner.config.captioning import CaptionShuffle
from simpletuner.config.fields import Json, Section, setting
from simpletuner.config.metadata import ImageTable

ResolutionType = Literal["pixel", "area", "pixel_area"]
CaptionStrategy = Literal["textfile", "filename", "instanceprompt", "parquet"]

DERIVED = frozenset({"options", "alignment", "files_dir", "latents_remote"})
"""Fields of a dataset that are no keys of the file, but follow from others."""

SQUARE_EDGES_PX = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}
"""Megapixels of a square picture -> its usual edge in pixels."""


class _WithOptions(Section):
    """A group with keys that a backend alone knows."""

    options: dict[str, Json] = setting({}, "free", "Keys of a backend other than local, checked by that backend.")

    @field_serializer("options")
    def _without_secrets(self, options: dict[str, Json]) -> dict[str, Json]:
        """Returns the options as they are written into results: access keys are left out."""
        return {key: value for key, value in options.items() if not re.search("secret|access_key", key)}


class RemoteFolder(_WithOptions):
    """A folder elsewhere, in which a cache is kept beside its folder of this machine."""

    id: str = setting(..., "free", "Entry that names it.")
    type: Literal["aws"] = setting(..., "free", "Backend that reads and writes it.")
    folder: str = setting("", "free", "Below the folder of the backend.")


class DatasetConfig(_WithOptions):
    """An image dataset; sizes are in the unit of ``resolution_type``.

    pixel: length of the shorter edge in pixels; area: megapixels of 10^6; pixel_area: edge in pixels of the square
    of the same area.
    """

    id: str = setting(..., "must_match", "Name of the dataset, unique in the file.")
    type: str = setting("local", "may_change", "Backend that reads the files.")
    dataset_type: Literal["image", "eval"] = setting(
        "image", "must_match", "What the dataset is for: image, to train on; eval, held out, to measure the loss on."
    )
    instance_data_dir: Path = setting(Path(), "may_change", "Folder with the images; it is only ever read.")
    cache_dir_vae: Path = setting(..., "free", "Folder for the manifest and the cached latents.")
    files_dir: Path | None = setting(None, "free", "Folder for what is downloaded. Default: cache_dir_vae.")
    resolution: float = setting(1024.0, "may_change", "Size that images are scaled to.", gt=0)
    resolution_type: ResolutionType = setting("pixel_area", "may_change", "Unit of all sizes of the dataset.")
    aspect_bucket_rounding: int = setting(2, "may_change", "Decimals of the aspect ratio of a bucket.", ge=1, le=9)
    alignment: int = setting(64, "may_change", "Bucket edges are multiples of so many pixels.", ge=8, multiple_of=8)
    minimum_image_size: float | None = setting(None, "may_change", "Smaller images are left out.", gt=0)
    maximum_image_size: float | None = setting(
        None, "may_change", "With crop: larger images are scaled to target_downsample_size first.", gt=0
    )
    target_downsample_size: float | None = setting(
        None, "may_change", "With crop: size that images above maximum_image_size are scaled to first.", gt=0
    )
    minimum_aspect_ratio: float | None = setting(0.05, "may_change", "Images narrower than w / h are left out.", gt=0)
    maximum_aspect_ratio: float | None = setting(20.0, "may_change", "Images wider than w / h are left out.", gt=0)
    crop: bool = setting(False, "may_change", "Crop to crop_aspect; false keeps the aspect ratio of each image.")
    crop_style: Literal["random", "center", "corner"] = setting(
        "center", "may_change", "Where the crop lies. random: seeded by the image's id, the same in every run."
    )
    crop_aspect: Literal["square", "preserve", "closest"] = setting(
        "square",
        "may_change",
        "Aspect ratio of a crop: a square, the image's own, or the closest of crop_aspect_buckets.",
    )
    random_flip: bool = setting(False, "may_change", "Show each image mirrored in half of its turns.")
    crop_aspect_buckets: tuple[float, ...] = setting((), "may_change", "Aspect ratios (w / h) for crop_aspect closest.")
    caption_strategy: CaptionStrategy = setting("textfile", "may_change", "Where captions come from.")
    instance_prompt: str | None = setting(None, "may_change", "Caption of every image, for instanceprompt.")
    prepend_instance_prompt: bool = setting(False, "may_change", "Put instance_prompt before each caption.")
    only_instance_prompt: bool = setting(False, "may_change", "Use instance_prompt in place of each caption.")
    disable_multiline_split: bool = setting(
        False, "may_change", "Read a caption file as one caption; otherwise each line is a caption of its own."
    )
    missing_caption: Literal["skip", "keep"] = setting(
        "skip", "may_change", "skip: an image without caption is left out and counted; keep: its caption is empty."
    )
    caption_filter_list: tuple[str, ...] = setting(
        (), "may_change", "Regular expressions that are removed from captions, and s/regex/replacement/."
    )
    caption_shuffle: CaptionShuffle | None = setting(
        None, "may_change", "Encode each caption with its tags in other orders too; one of them is drawn each time."
    )
    caption_suffix: str | None = setting(None, "may_change", "Put this behind each caption.")
    probability: float = setting(1.0, "may_change", "Weight of the dataset among the others.", ge=0)
    repeats: int = setting(0, "may_change", "Extra passes over each image in an epoch.", ge=0)
    max_num_samples: int | None = setting(None, "may_change", "Use a seeded choice of so many images only.", ge=1)
    start_step: int = setting(0, "may_change", "Show the dataset after so many steps of the run.", ge=0)
    end_step: int | None = setting(None, "may_change", "Show it until so many steps have been made.", ge=1)
    start_epoch: int = setting(1, "may_change", "Show the dataset from this epoch of the run on.", ge=1)
    end_epoch: int | None = setting(None, "may_change", "Show it until the end of this epoch of the run.", ge=1)
    train_batch_size: int = setting(1, "must_match", "Images of one batch on one device.", ge=1)
    vae_batch_size: int = setting(4, "free", "Images that the VAE encodes at once.", ge=1)
    write_batch_size: int = setting(128, "free", "Entries of one cache file.", ge=1)
    skip_file_discovery: bool = setting(False, "free", "Trust the manifest of the last scan; do not list the folder.")
    preserve_data_backend_cache: bool = setting(
        False, "free", "Never delete entries of the cache.", inert="nothing is ever deleted from a cache"
    )
    vae_cache_clear_each_epoch: bool = setting(
        False, "may_change", "With random crops: cut an image anew each time; it is then encoded while training."
    )
    vae_cache_disable: bool = setting(
        False, "may_change", "Encode the images while training, and cache no latents: the VAE stays loaded."
    )
    text_cache_disable: bool = setting(
        False, "may_change", "Encode the captions while training, and cache none: the text encoders stay loaded."
    )
    metadata_backend: Literal["discovery", "parquet"] = setting(
        "discovery", "may_change", "Where the names and sizes of images come from: the images, or a table."
    )
    parquet: ImageTable | None = setting(None, "may_change", "The table, for metadata_backend parquet.")
    latents_remote: RemoteFolder | None = setting(None, "free", "Where the latents are kept beside cache_dir_vae.")

    @property
    def files_folder(self) -> Path:
        """The folder for what is downloaded; the same for all resolutions of an entry."""
        return self.files_dir or self.cache_dir_vae


class TextCacheConfig(Section):
    """Where cached text features are kept."""

    id: str = setting("text-embeds", "free", "Name of the cache.")
    cache_dir: Path = setting(..., "free", "Folder for the cached text features.")
    write_batch_size: int = setting(128, "free", "Entries of one cache file.", ge=1)
    remote: RemoteFolder | None = setting(None, "free", "Where the features are kept beside cache_dir.")
