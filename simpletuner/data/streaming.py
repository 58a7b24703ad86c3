"""What is encoded while training: images and captions of datasets that are not cached.

Images are read and cut by threads, ahead of their batch. The encoders stay loaded, and run when the batch is taken.

Shapes: B samples of this rank, C latent channels, h w latent size, H W pixels.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from simpletuner.backends._base import open_backend
from simpletuner.batch import Cond
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError, printable
from simpletuner.data.encode import cut_image, posterior
from simpletuner.data.geometry import Size
from simpletuner.data.identity import Encoding
from simpletuner.data.transforms import BadImage
from simpletuner.families._base import Part

_LOG = logging.getLogger(__name__)
_MOST_IN_A_ROW = 100
"""Images that cannot be read, one after the other: more is no matter of single files."""


def live_parts(datasets: Iterable[DatasetConfig]) -> dict[Part, tuple[str, ...]]:
    """Returns encoder -> ids of the datasets that it stays loaded for; encoders without any are left out."""
    datasets = tuple(datasets)
    parts: dict[Part, tuple[str, ...]] = {
        "vae": tuple(dataset.id for dataset in datasets if dataset.vae_cache_disable),
        "text": tuple(dataset.id for dataset in datasets if dataset.text_cache_disable),
    }
    return {part: ids for part, ids in parts.items() if ids}


class LiveEncoders:
    """Encoders that stay loaded on the device that trains."""

    def __init__(self, encoding: Encoding, parts: Iterable[Part]) -> None:
        """Loads the encoders of the parts."""
        self._encoding = encoding
        self._loaded = {part: encoding.load(part) for part in parts}

    def latents(self, pixels: Tensor, vae_batch_size: int) -> dict[str, Tensor]:
        """Returns mean and, where the encoder has one, std, [B, C, h, w] on the device, of pixels [B, 3, H, W]."""
        parts = [posterior(part, self._encoding, self._loaded["vae"]) for part in pixels.split(vae_batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def text(self, captions: Sequence[str]) -> Cond:
        """Returns the text features [B, ...] of captions, on the device."""
        with torch.no_grad():
            return self._encoding.family.encode_prompt(self._loaded["text"], list(captions))


class Pictures:
    """The images of a dataset, each read when its turn comes. One that cannot be read is named once, and not shown."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Opens the dataset's backend, and no image."""
        self._dataset, self._backend = dataset, open_backend(dataset)
        self._named: set[str] = set()
        self._in_a_row = 0

    def read(
        self,
        ids: Sequence[str],
        crop_ids: Sequence[str],
        geometry: Tensor,
        mirrored: Sequence[bool],
        pool: ThreadPoolExecutor,
    ) -> tuple[Tensor, Tensor]:
        """Returns the pixels [B, 3, H, W], and [B] float32 weights: 0 for an image that cannot be read.

        Args:
            ids: Of B images that are trained at one size.
            crop_ids: What decides their random crops.
            geometry: [B, 6] as a batch has it.
            mirrored: Which are shown mirrored.
            pool: Decodes them.

        Raises:
            UserError: Too many in a row cannot be read.
        """
        sizes = [(width, height) for height, width in geometry[:, :2].int().tolist()]
        read = list(pool.map(self._read, ids, crop_ids, sizes, mirrored))
        for image_id, image in zip(ids, read, strict=True):
            self._judge(image_id, image)
        height, width = geometry[0, 4:].int().tolist()
        blank = torch.zeros(3, height, width)
        pixels = torch.stack([blank if isinstance(image, str) else image for image in read])
        return pixels, torch.tensor([float(isinstance(image, Tensor)) for image in read])

    def _read(self, image_id: str, crop_id: str, size: Size, mirrored: bool) -> Tensor | str:
        """Returns the pixels [3, H, W] of an image, or why it has none."""
        try:
            with self._backend.open(image_id) as file:
                return cut_image(self._dataset, crop_id, size, file, mirrored)
        except (BadImage, OSError) as error:
            return str(error)

    def _judge(self, image_id: str, image: Tensor | str) -> None:
        """Names an image that cannot be read. Raises UserError after many of them."""
        if isinstance(image, Tensor):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        line = printable(f"dataset '{self._dataset.id}': '{image_id}' cannot be used: {image}")
        if self._in_a_row == _MOST_IN_A_ROW:
            raise UserError(f"{line}; nor can the {_MOST_IN_A_ROW - 1} images before it")
        if image_id not in self._named:
            self._named.add(image_id)
            _LOG.warning("%s; it is left out", line)
