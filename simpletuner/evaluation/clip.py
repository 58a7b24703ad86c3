"""What CLIP says of pictures: how well they fit their prompts, and how far two sets of them are apart.

For people who have the weights: nothing is downloaded unless a hub id is given. N pictures, D width of the embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from simpletuner.config.errors import UserError

_BATCH_SIZE = 16
_SIGMA, _UNIT = 10.0, 1000.0


class Clip:
    """A CLIP model with its processor."""

    def __init__(self, name: str) -> None:
        """Loads it from a folder or by its hub id. Raises UserError where that fails."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            model: Any = CLIPModel.from_pretrained(name, use_safetensors=True)  # Any: transformers' own
            processor: Any = CLIPProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--clip: '{name}' cannot be loaded as a CLIP model: {reason}") from error
        self._device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self._model, self._processor = model.to(self._device).eval(), processor

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Returns [N, D] embeddings of unit length."""
        found: list[Tensor] = []
        for start in range(0, len(pictures), _BATCH_SIZE):
            batch = [picture.convert("RGB") for picture in pictures[start : start + _BATCH_SIZE]]
            inputs = self._processor(images=batch, return_tensors="pt").to(self._device)
            found.append(_embedding(self._model.get_image_features(**inputs)))
        return torch.cat(found)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns [N, D] embeddings of unit length; what CLIP has no room for is cut off."""
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _embedding(self._model.get_text_features(**inputs.to(self._device)))


def _embedding(found: Any) -> Tensor:  # Any: a tensor, of newer transformers an output that holds it
    pooled: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return functional.normalize(pooled.float().cpu(), dim=-1)


def clip_score(pictures: Tensor, texts: Tensor) -> float:
    """Returns 100 times the mean cosine of [N, D] pictures and their texts, no less than 0 each (arXiv 2104.08718)."""
    return float(100 * (pictures * texts).sum(1).clamp(min=0).mean())


def cmmd(first: Tensor, second: Tensor) -> float:
    """Returns the maximum mean discrepancy of two sets of embeddings, [N, D] and [M, D] (CMMD, arXiv 2401.09603).

    As there: a Gaussian kernel with sigma 10 on embeddings of unit length, times 1000; the estimate that is never
    negative, and 0 for equal sets.
    """

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, two).square() / (2 * _SIGMA**2)).mean()

    first, second = first.double(), second.double()
    return float(_UNIT * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)))
