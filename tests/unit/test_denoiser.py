import copy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simpletuner.batch import Batch, Cond
from simpletuner.denoiser import Denoiser, Prediction, adapter_layers, checkpoint_with_adapters
from simpletuner.schedules import from_scheduler_config
from tests.parity.toy import SDXL_SCHEDULER, ToyFamily, ToyNetwork, add_lora, toy_batch, trainable, uncond

SCHEDULE = from_scheduler_config(SDXL_SCHEDULER)
T = torch.tensor([19, 999])


def make(module: nn.Module, adapter: str | None, family: Any = None, **changes: Any) -> Denoiser:
    options = {"prediction_type": "epsilon", "schedule": SCHEDULE, "compute_dtype": None} | changes
    return Denoiser(family or ToyFamily(), module, adapter, **options)


def call(denoiser: Denoiser, batch: Batch | None = None) -> Prediction:
    batch = batch or toy_batch(2)
    return denoiser(batch.mean, T, batch.cond, batch.geometry)


def test_a_denoiser_without_adapter_is_the_base_network() -> None:
    base = ToyNetwork()
    adapted = add_lora(copy.deepcopy(base))
    plain = call(make(base, None))
    assert torch.equal(call(make(adapted, None)).raw, plain.raw)
    difference = (call(make(adapted, "default")).raw - plain.raw).abs().max()
    assert difference > 0.01


def test_the_adapter_is_put_back_after_each_call() -> None:
    module = add_lora(ToyNetwork())
    layers = adapter_layers(module)
    assert len(layers) == 5
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    required = [parameter.requires_grad for parameter in module.parameters()]
    student, teacher = make(module, "default"), make(module, None)
    first = call(student).raw
    for denoiser in (teacher, student):
        call(denoiser)
        assert [(layer._disable_adapters, layer._active_adapter) for layer in layers] == before
    assert torch.equal(call(student).raw, first)
    assert [parameter.requires_grad for parameter in module.parameters()] == required


def test_an_error_in_the_network_puts_the_adapter_back_too() -> None:
    class Broken(ToyFamily):
        def forward(self, *_: Any) -> Tensor:
            raise RuntimeError("out of memory")

    module = add_lora(ToyNetwork())
    with pytest.raises(RuntimeError, match="out of memory"):
        call(make(module, None, Broken()))
    assert not any(layer._disable_adapters for layer in adapter_layers(module))


def test_a_second_adapter_is_chosen_by_name() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module = add_lora(ToyNetwork())
    default = call(make(module, "default")).raw
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["conv1"], init_lora_weights=False), module, "ema")
    module.double()
    other = call(make(module, "ema")).raw
    assert (other - default).abs().max() > 1e-3
    assert torch.equal(call(make(module, "default")).raw, default)


def test_an_adapter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no adapter 'default'"):
        make(ToyNetwork(), "default")


def test_guided_is_the_papers_form_from_one_forward() -> None:
    batch, family, module = toy_batch(2), ToyFamily(), ToyNetwork()
    denoiser = make(module, None, family)
    w = torch.tensor([0.0, 7.5])
    nothing = uncond(batch.cond)
    guided = denoiser.guided(batch.mean, T, batch.cond, nothing, batch.geometry, w)
    assert family.batch_sizes == [4]
    with_text = denoiser(batch.mean, T, batch.cond, batch.geometry)
    without = denoiser(batch.mean, T, nothing, batch.geometry)
    for name in ("raw", "x0", "noise"):
        cond, plain = getattr(with_text, name), getattr(without, name)
        torch.testing.assert_close(getattr(guided, name)[0], cond[0])  # w = 0: guidance_scale 1
        # diffusers' guidance_scale is w + 1.
        torch.testing.assert_close(getattr(guided, name)[1], plain[1] + 8.5 * (cond[1] - plain[1]))


@pytest.mark.parametrize("rows", [[], [1], [0, 1]])
def test_samples_that_are_not_guided_cost_no_second_forward(rows: list[int]) -> None:
    batch, family, module = toy_batch(2), ToyFamily(), ToyNetwork()
    denoiser = make(module, None, family)
    w, nothing = torch.tensor([2.0, 7.5]), uncond(batch.cond)
    inside = torch.tensor([float(index in rows) for index in range(2)])
    expected = denoiser.guided(batch.mean, T, batch.cond, nothing, batch.geometry, w * inside)
    family.batch_sizes.clear()
    guided = denoiser.guided(batch.mean, T, batch.cond, nothing, batch.geometry, w, torch.tensor(rows).long())
    assert family.batch_sizes == [2 + len(rows)]
    for name in ("raw", "x0", "noise"):
        torch.testing.assert_close(getattr(guided, name), getattr(expected, name))


class ReportingFamily:
    """Notes the dtypes and the autocast state that the network sees."""

    def __init__(self) -> None:
        self.seen: tuple[bool, torch.dtype] | None = None

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None
    ) -> Tensor:
        self.seen = (torch.is_autocast_enabled("cpu"), x_t.dtype)
        return module(x_t)


def test_autocast_is_around_the_network_alone_and_the_rest_is_float32() -> None:
    family, module = ReportingFamily(), nn.Conv2d(4, 4, 1)
    batch = toy_batch(2, dtype=torch.float32)
    prediction = call(make(module, None, family, compute_dtype=torch.bfloat16), batch)
    assert family.seen == (True, torch.float32)
    assert not torch.is_autocast_enabled("cpu")
    assert {prediction.raw.dtype, prediction.x0.dtype, prediction.noise.dtype} == {torch.float32}
    # The numbers are the network's bfloat16 ones, and x0 is not rounded after it.
    assert torch.equal(prediction.raw, prediction.raw.bfloat16().float())
    assert not torch.equal(prediction.x0, prediction.x0.bfloat16().float())
    call(make(module, None, family), batch)
    assert family.seen == (False, torch.float32)


def test_autocast_of_a_teacher_does_not_cut_off_the_students_gradient() -> None:
    """One autocast around both would reuse the weights that it cast without gradient."""
    family, module = ReportingFamily(), nn.Conv2d(4, 4, 1)
    denoiser = make(module, None, family, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        call(denoiser, toy_batch(2, dtype=torch.float32))
    call(denoiser, toy_batch(2, dtype=torch.float32)).raw.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


class CheckpointedToy(nn.Module):
    """The toy network behind diffusers' checkpointing hook."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self.network, *args)


def lora_gradients(module: nn.Module, before_backward: Callable[[], object]) -> dict[str, Tensor]:
    module.zero_grad()
    loss = call(make(module, "default")).raw.square().sum()
    before_backward()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainable(module).items() if p.grad is not None}


def test_checkpointing_recomputes_with_the_adapter_of_the_forward() -> None:
    network = add_lora(ToyNetwork())
    exact = lora_gradients(network, lambda: None)
    assert len(exact) == 10

    def switch_off() -> None:
        for layer in adapter_layers(network):
            layer._disable_adapters = True

    def switch_on() -> None:
        for layer in adapter_layers(network):
            layer._disable_adapters = False

    checkpointed = CheckpointedToy(network, checkpoint_with_adapters(network))
    got = lora_gradients(checkpointed, switch_off)
    assert all(layer._disable_adapters for layer in adapter_layers(network))
    switch_on()
    assert {f"network.{name}" for name in exact} == got.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(got[f"network.{name}"], gradient, rtol=1e-12, atol=0)


def test_checkpointing_of_a_forward_without_adapter() -> None:
    """The gradient of a teacher's input (as in a guided student's) stays the base network's, too."""
    network = add_lora(ToyNetwork())
    plain, checkpointed = make(network, None), CheckpointedToy(network, checkpoint_with_adapters(network))
    gradients: list[Tensor] = []
    for denoiser in (plain, make(checkpointed, None)):
        batch = toy_batch(2)
        x_t = batch.mean.requires_grad_()
        denoiser(x_t, T, batch.cond, batch.geometry).raw.square().sum().backward()
        assert x_t.grad is not None
        gradients.append(x_t.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("interval", [1, 3])
def test_diffusers_takes_the_checkpointing_function(tiny_model: Path, interval: int) -> None:
    """A real UNet: gradients with checkpointing, and the adapters switched off before backward, are the plain ones."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet").double().requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    unet.double()
    generator = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 96, generator=generator)
    added = {"text_embeds": torch.zeros(1, 64).double(), "time_ids": torch.zeros(1, 6).double()}
    gradients: list[list[Tensor]] = []
    num_forwards: Counter[str] = Counter()
    for name, block in unet.named_modules():
        if type(block).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            block.register_forward_pre_hook(lambda *_, name=name: num_forwards.update([name]))
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing(checkpoint_with_adapters(unet, interval))
        unet.zero_grad()
        loss = unet(x.double(), 500, tokens.double(), added_cond_kwargs=added).sample.square().sum()
        for layer in adapter_layers(unet):
            layer._disable_adapters = checkpointed
        loss.backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    num_recomputed = sum(count == 3 for count in num_forwards.values())  # without, with, and again for the backward
    num_checkpointed = len(num_forwards) - 1  # diffusers leaves the first one of the middle out
    assert num_recomputed == -(-num_checkpointed // interval) > 2
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.norm() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-12)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_adapters_behind_ddp() -> None:
    module = add_lora(ToyNetwork())
    wrapped = DistributedDataParallel(module)
    assert torch.equal(call(make(wrapped, "default")).raw, call(make(module, "default")).raw)
    assert torch.equal(call(make(wrapped, None)).raw, call(make(module, None)).raw)
