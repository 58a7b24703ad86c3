"""How fast a run is: samples, arithmetic, waiting for data and memory, without waiting for the device.

The arithmetic of a step depends on the shapes of its batches alone, so it is counted once for each, as it is done: with
the passes of teacher and target, and with what gradient checkpointing computes again.
"""

import re
import resource
import sys
import time
from collections.abc import Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "L40": 181.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 4090 D": None,
    "RTX 4090 Laptop": None,
    "RTX 3090": 71.0,
    "RTX 3090 Ti": None,
    "MI300X": 1307.0,
}
"""Words of a device's name -> TFLOP/s of dense 16-bit matrix products, by the makers' data sheets; None: not known.

Of those whose words are all in a name, the one of the most words counts.
"""


class FlopCounter(TorchDispatchMode):
    """Counts the floating point operations of the matrix products, convolutions and attention within the context.

    By torch's own formulas, but not by its ``FlopCounterMode``: that takes operators apart which else run whole, and a
    step would compute other last digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # Any: as torch's
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


_ATEN: Any = torch.ops.aten  # Any: operators are made as they are asked for
_FORMULAS: dict[Any, Any] = flop_registry | {
    # What torch 2.13 has no formula for: its attention on the CPU.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *_, **__: (
        sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    ),
}


def peak_tflops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Returns what a device can do at most in a dtype, in TFLOP/s; None where no data sheet is known here."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return _peak(torch.cuda.get_device_name(device))


def _peak(name: str) -> float | None:
    """Returns the peak of a device of this name."""
    words = set(re.findall(r"\w+", name))
    known = [device for device in _PEAKS if words.issuperset(device.split())]
    return _PEAKS[max(known, key=lambda device: len(device.split()))] if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that was used so far: of a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class StepMeter:
    """Sums up what the steps since ``start`` or the last reading did; pauses between them do not count."""

    device: torch.device
    peak_tflops: float | None = None
    """Of the device; None: no MFU is given."""
    is_compiled: bool = False
    """Whether networks are compiled. Then no arithmetic is counted: compiled code shows no operators, and a step that
    ran without it would compute other last digits, so that a run would not resume exactly."""
    _flop_of: dict[Hashable, int] = field(default_factory=dict[Hashable, int])
    _since: float = 0.0
    _flop: int = 0
    _samples: int = 0
    _wait_seconds: float = 0.0

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Counts the time within as waiting for data."""
        started = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - started

    @contextmanager
    def step(self, shapes: Hashable, num_samples: int) -> Generator[None]:
        """Counts an optimizer step of this process.

        Args:
            shapes: Decides the step's arithmetic: counted at its first step, and remembered.
            num_samples: Of all processes.
        """
        if shapes in self._flop_of or self.is_compiled:
            yield
        else:
            with FlopCounter() as counter:
                yield
            self._flop_of[shapes] = counter.total
        self._flop += self._flop_of.get(shapes, 0)
        self._samples += num_samples

    @contextmanager
    def pausing(self) -> Generator[None]:
        """Leaves the time within out."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def start(self) -> None:
        """Forgets what has been; from now on time counts."""
        self._since, self._flop, self._samples, self._wait_seconds = time.perf_counter(), 0, 0, 0.0

    def read(self) -> dict[str, float]:
        """Returns the rates since the last reading, which ends here; call it when the device has caught up."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = self._flop / seconds / 1e12
        rates = {
            "samples_per_second": self._samples / seconds,
            "data_wait": self._wait_seconds / seconds,
            "peak_memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if not self.is_compiled:
            rates["tflops_per_second"] = rate
            if self.peak_tflops is not None:
                rates["mfu"] = rate / self.peak_tflops
        self.start()
        return rates
