"""A network, its family and its adapter as one function from a noisy latent to (x0, noise).

Shapes: B batch, C latent channels, h w latent size in latent pixels.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from simpletuner.batch import Cond
from simpletuner.schedules import NoiseSchedule, wide

_AdapterState = tuple[bool, str | list[str]]
"""Of one peft layer: whether adapters are off, and which are chosen when they are on."""


class Forward(Protocol):
    """The part of a model family that a denoiser needs."""

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None
    ) -> Tensor:
        """Returns [B, C, h, w] the network's raw prediction."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What a network says about x_t, in promote(dtype, float32)."""

    raw: Tensor
    """[B, C, h, w] in the network's own terms: epsilon, v, ... (its ``prediction_type``)."""
    x0: Tensor
    """[B, C, h, w]"""
    noise: Tensor
    """[B, C, h, w]"""


class Denoiser:
    """One role of a method (student, teacher, target) as a function."""

    def __init__(
        self,
        family: Forward,
        module: nn.Module,
        adapter: str | None,
        prediction_type: str,
        schedule: NoiseSchedule,
        compute_dtype: torch.dtype | None,
        embeds_w: bool = False,
    ) -> None:
        """Makes a denoiser; adapters must be attached to the module already.

        Args:
            family: Whose ``forward`` calls the network.
            module: The network, or a wrapper of it (DDP).
            adapter: Name of the adapter to run with; None runs the base weights alone.
            prediction_type: What the network predicts, in diffusers' words.
            schedule: The noise schedule that it was trained with.
            compute_dtype: Of autocast around the network; None runs it as it is.
            embeds_w: Whether the network has learned to guide itself by the w that it is told.
        """
        self.module = module
        self.prediction_type = prediction_type
        self.schedule = schedule
        self._family = family
        self._adapter = adapter
        self._compute_dtype = compute_dtype
        self._embeds_w = embeds_w
        self._layers = adapter_layers(module)
        if adapter is not None and not self._layers:
            raise ValueError(f"the network has no adapter '{adapter}'")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None = None) -> Prediction:
        """Returns the prediction at x_t.

        Args:
            x_t: [B, C, h, w] noisy latents.
            t: [B] noise times of the schedule.
            cond: Text features, [B, ...] each.
            geometry: [B, 6], see ``Batch.geometry``.
            w: [B] the paper's guidance scale, for networks that embed it.
        """
        # Autocast is opened around each forward alone: its cache of cast weights, made without grad by a teacher,
        # would otherwise serve the student too, and cut the adapter off from its gradient.
        autocast: AbstractContextManager[Any] = nullcontext()  # Any: autocast yields nothing of interest
        if self._compute_dtype is not None:
            autocast = torch.autocast(x_t.device.type, self._compute_dtype)
        with _adapters_as(self._layers, self._states()), autocast:
            raw = self._family.forward(self.module, x_t, self.schedule.model_t(t), cond, geometry, w)
        raw = raw.to(wide(raw, x_t))
        return Prediction(raw, *self.schedule.split(raw, x_t, t, self.prediction_type))

    def _states(self) -> list[_AdapterState]:
        """Returns the state of each layer under this denoiser's adapter."""
        if self._adapter is None:
            return [(True, active) for _, active in _adapter_states(self._layers)]
        return [(False, [self._adapter])] * len(self._layers)

    def guided(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        uncond: Cond,
        geometry: Tensor,
        w: Tensor,
        rows: Tensor | None = None,
    ) -> Prediction:
        """Returns the guided prediction cond + w (cond - uncond), from one forward of 2B.

        A network that embeds w has learned to give just that, from one forward of B: guided again, w would count twice.

        Args:
            x_t: [B, C, h, w] noisy latents.
            t: [B] noise times.
            cond: Text features, [B, ...] each.
            uncond: The features that stand for no text, of the same shapes.
            geometry: [B, 6].
            w: [B] the paper's guidance scale (arXiv 2310.04378, eq. 13): diffusers' ``guidance_scale`` - 1.
            rows: [R] the samples to guide; the others' w counts as 0, and their second half of the forward is left out.
                Their number shapes the forward, so the device is not asked for it. None: all.
        """
        if self._embeds_w:
            if rows is not None:
                w = torch.zeros_like(w).index_copy(0, rows, w[rows])
            return self(x_t, t, cond, geometry, w)

        def chosen(of_samples: Tensor) -> Tensor:
            return of_samples if rows is None else of_samples[rows]

        both = self(
            torch.cat([x_t, chosen(x_t)]),
            torch.cat([t, chosen(t)]),
            {name: torch.cat([value, chosen(uncond[name])]) for name, value in cond.items()},
            torch.cat([geometry, chosen(geometry)]),
        )
        return Prediction(*(_guide(part, w, rows) for part in (both.raw, both.x0, both.noise)))


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    """Returns the layers of a network, or of a wrapper of it, to which peft has attached an adapter.

    They are known by their attributes, because importing peft takes seconds that ``simpletuner plan`` does not have.
    """
    return [m for m in module.modules() if hasattr(m, "_disable_adapters") and hasattr(m, "_active_adapter")]


def checkpoint_with_adapters(module: nn.Module, interval: int = 1) -> Callable[..., Any]:  # Any: what a block returns
    """Returns a ``gradient_checkpointing_func`` for diffusers whose recomputation uses the adapters of its forward.

    A plain checkpoint recomputes a block with the adapters as they are during backward: if a teacher has switched them
    off since, the gradients are silently wrong.

    Args:
        module: The network, with its adapters.
        interval: Of the blocks, in the order of their first forward, each so many-th is recomputed.
    """
    layers = adapter_layers(module)
    numbers: dict[Callable[..., Any], int] = {}

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _adapters_as(layers, _adapter_states(layers))

    def run(block: Callable[..., Any], *args: Any) -> Any:
        if numbers.setdefault(block, len(numbers)) % interval:
            return block(*args)
        return cast(Any, checkpoint)(block, *args, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def adapters_off(module: nn.Module) -> Generator[None]:
    """Runs a network with its base weights alone, and puts its adapters back as they were."""
    layers = adapter_layers(module)
    with _adapters_as(layers, [(True, active) for _, active in _adapter_states(layers)]):
        yield


@contextmanager
def _adapters_as(layers: list[nn.Module], states: list[_AdapterState]) -> Generator[None]:
    """Runs the layers in these adapter states and puts back the ones that they were in.

    Only two attributes are flipped: peft's own switch also flips requires_grad, at 71 ms for 788 layers.
    """
    before = _adapter_states(layers)
    _set_adapter_states(layers, states)
    try:
        yield
    finally:
        _set_adapter_states(layers, before)


def _adapter_states(layers: list[nn.Module]) -> list[_AdapterState]:
    return [cast(_AdapterState, (layer._disable_adapters, layer._active_adapter)) for layer in layers]


def _set_adapter_states(layers: list[nn.Module], states: list[_AdapterState]) -> None:
    for layer, (disabled, active) in zip(layers, states, strict=True):
        attributes = vars(layer)  # not setattr: nn.Module's looks a name up among parameters and buffers each time
        attributes["_disable_adapters"] = disabled
        attributes["_active_adapter"] = active


def _guide(both: Tensor, w: Tensor, rows: Tensor | None) -> Tensor:
    """Returns [B, C, h, w] cond + w (cond - uncond) of [B + R, C, h, w], cond first; cond alone outside the R rows."""
    cond, uncond = both[: len(w)], both[len(w) :]
    scale = w.to(both.dtype).reshape(-1, *(1 for _ in both.shape[1:]))
    if rows is None:
        return cond + scale * (cond - uncond)
    return cond.index_add(0, rows, scale[rows] * (cond[rows] - uncond))
