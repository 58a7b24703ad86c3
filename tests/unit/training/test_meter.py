import time

import psutil
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.quickstart.model import TINY, make_unet
from simpletuner.training import meter
from simpletuner.training.meter import FlopCounter, StepMeter, peak_memory_bytes, peak_tflops

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Returns the seconds that the clock shows: the test sets them."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def multiply(rows: int) -> None:
    torch.ones(rows, 20) @ torch.ones(20, 30)


def test_each_shape_is_counted_once_and_remembered(now: list[float]):
    made = StepMeter(CPU)
    made.start()
    for rows in (5, 7, 5, 5):
        with made.step(rows, num_samples=rows):
            multiply(rows)
    with made.step(7, num_samples=7):
        pass  # as fast as nothing, but known to be 7 rows' work
    now[0] += 2.0
    rates = made.read()
    assert rates["tflops_per_second"] * 2.0 * 1e12 == pytest.approx(2 * 20 * 30 * (5 + 7 + 5 + 5 + 7))
    assert rates["samples_per_second"] == pytest.approx(29 / 2.0)
    assert "mfu" not in rates


def test_waiting_counts_and_pauses_do_not(now: list[float]):
    made = StepMeter(CPU, peak_tflops=1e-9)
    made.start()
    with made.waiting():
        now[0] += 1.0
    with made.step("a", 4):
        multiply(1)
        now[0] += 3.0
    with made.pausing():
        now[0] += 50.0
    rates = made.read()
    assert rates["data_wait"] == pytest.approx(1 / 4)
    assert rates["samples_per_second"] == pytest.approx(1.0)
    assert rates["mfu"] == pytest.approx(2 * 20 * 30 / 4 / 1000)
    now[0] += 1.0
    assert made.read()["samples_per_second"] == 0  # a reading ends what it read


@pytest.mark.parametrize("grads", [False, True])
def test_attention_on_a_cpu_counts(grads: bool):
    batch, heads, tokens, keys, width = 2, 3, 40, 24, 16
    query = torch.randn(batch, heads, tokens, width, requires_grad=grads)
    key, value = torch.randn(2, batch, heads, keys, width, requires_grad=grads)
    with FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        if grads:
            out.sum().backward()
    product = 2 * batch * heads * tokens * keys * width
    # Two products forward; backward the scores again, and two for each of scores and output.
    assert counter.total == product * (2 + 5 * grads)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI300X", 1307.0),
        ("NVIDIA L400", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(name: str, peak: float | None):
    assert meter._peak(name) == peak


def test_of_compiled_networks_no_arithmetic_is_counted(now: list[float]):
    compiled = StepMeter(CPU, peak_tflops=1.0, is_compiled=True)
    compiled.start()
    with compiled.step(5, num_samples=5):
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    now[0] += 1.0
    assert compiled.read().keys() == {"samples_per_second", "data_wait", "peak_memory_gib"}


def test_memory_and_peaks_are_told_only_where_they_are_known():
    used = psutil.Process().memory_info().rss  # other tests of this process may have used more, and freed it
    assert 0.9 * used <= peak_memory_bytes(CPU) < 100 * used
    assert peak_tflops(CPU, torch.bfloat16) is None


@pytest.mark.parametrize("grads", [False, True])
def test_a_network_counts_as_torch_counts_it(grads: bool):
    """Where attention is taken apart into products, torch's own counter knows all of it."""
    unet = make_unet(TINY)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 7,
        "encoder_hidden_states": torch.randn(2, 77, 96),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 64), "time_ids": torch.randn(2, 6)},
    }
    totals: list[int] = []
    for counter in (FlopCounter(), FlopCounterMode(display=False)):
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(grads), counter:
            out = unet(**inputs).sample
            if grads:
                out.sum().backward()
        totals.append(counter.total if isinstance(counter, FlopCounter) else counter.get_total_flops())
    assert totals[0] == totals[1] > 1e7
