import dataclasses
from typing import Any

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.config.schema import ObjectiveSection
from simpletuner.distillers._base import RunFacts
from simpletuner.distillers.sft import SFT, min_snr_weight
from simpletuner.randomness import Randomness
from simpletuner.schedules import FlowSchedule, from_scheduler_config
from tests.parity.reference import alphas_cumprod
from tests.parity.toy import SDXL_SCHEDULER, ToyNetwork, add_lora, toy_batch, toy_setup

SCHEDULE = from_scheduler_config(SDXL_SCHEDULER)
ZERO_SNR = from_scheduler_config(SDXL_SCHEDULER | {"rescale_betas_zero_snr": True})
T = torch.tensor([0, 19, 250, 500, 999])


def make(kind: str = "epsilon", schedule: Any = SCHEDULE, **options: Any) -> SFT:
    return SFT(toy_setup(ObjectiveSection(**options), schedule, kind, add_lora(ToyNetwork())))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_plain_objective(kind: str) -> None:
    """Written out from the definition x_t = sqrt(acp) x0 + sqrt(1 - acp) noise."""
    sft, batch = make(kind), toy_batch(5)
    draw = sft.draw(batch, Randomness(0))
    losses = sft.loss("student", batch, draw, 0).per_sample
    assert draw.posterior is not None
    assert batch.std is not None
    acp = torch.tensor(alphas_cumprod(), dtype=torch.float64)[draw.start].view(-1, 1, 1, 1)
    x0, noise = batch.mean + batch.std * draw.posterior, draw.noise
    x_t = acp.sqrt() * x0 + (1 - acp).sqrt() * noise
    target = {"epsilon": noise, "v_prediction": acp.sqrt() * noise - (1 - acp).sqrt() * x0, "sample": x0}[kind]
    module = sft.denoisers["student"].module
    raw = module(x_t, draw.start, batch.cond["tokens"], batch.cond["pooled"], batch.geometry)
    torch.testing.assert_close(losses, (raw - target).square().mean((1, 2, 3)), rtol=1e-10, atol=0)


def test_flow_objective() -> None:
    sft, batch = make("flow_prediction", FlowSchedule(shift=3.0)), toy_batch(3)
    draw = sft.draw(batch, Randomness(0))
    u = Randomness(0).uniform("timestep", batch.position)
    torch.testing.assert_close(draw.start, 3 * u / (1 + 2 * u))
    losses = sft.loss("student", batch, draw, 0).per_sample
    assert draw.posterior is not None
    assert batch.std is not None
    x0, t = batch.mean + batch.std * draw.posterior, draw.start.double().view(-1, 1, 1, 1)
    module = sft.denoisers["student"].module
    x_t = (1 - t) * x0 + t * draw.noise
    raw = module(x_t, 1000 * draw.start, batch.cond["tokens"], batch.cond["pooled"], batch.geometry)
    torch.testing.assert_close(losses, (raw - draw.noise + x0).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_timesteps_cover_the_schedule() -> None:
    start = make().draw(toy_batch(1000, latent_px=1), Randomness(0)).start
    assert int(start.min()) < 5
    assert int(start.max()) > 994
    assert abs(float(start.float().mean()) - 499.5) < 30


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_have_their_closed_values(gamma: float) -> None:
    acp = torch.tensor(alphas_cumprod(), dtype=torch.float64)[T]
    snr = acp / (1 - acp)
    assert float(snr[0]) > 1000
    assert float(snr[-1]) < 0.01
    bounded = snr.clamp(max=gamma)
    for kind, exact in (("epsilon", bounded / snr), ("v_prediction", bounded / (snr + 1)), ("sample", bounded)):
        got = min_snr_weight(SCHEDULE, T, kind, gamma)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_min_snr_weights_at_zero_terminal_snr() -> None:
    t = torch.tensor([999])
    assert min_snr_weight(ZERO_SNR, t, "epsilon", 5.0).tolist() == [1.0]
    assert min_snr_weight(ZERO_SNR, t, "v_prediction", 5.0).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_makes_the_losses_of_both_predictions_one(kind: str) -> None:
    """Weighted by min-SNR, every prediction type has the loss min(SNR, gamma) |x0 error|^2."""
    sft, batch = make(kind, snr_gamma=5.0), toy_batch(5)
    draw = dataclasses.replace(sft.draw(batch, Randomness(0)), start=T)
    losses = sft.loss("student", batch, draw, 0).per_sample
    assert batch.std is not None
    assert draw.posterior is not None
    x0 = batch.mean + batch.std * draw.posterior
    x_t = SCHEDULE.add_noise(x0, draw.noise, T)
    predicted = sft.denoisers["student"](x_t, T, batch.cond, batch.geometry).x0
    acp = torch.tensor(alphas_cumprod(), dtype=torch.float64)[T]
    exact = (acp / (1 - acp)).clamp(max=5.0) * (predicted - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=0)


def test_offset_noise_moves_whole_channels() -> None:
    batch = toy_batch(200)
    plain = make().draw(batch, Randomness(0)).noise
    offset = make(offset_noise=True, noise_offset=0.2).draw(batch, Randomness(0)).noise - plain
    torch.testing.assert_close(offset, offset.mean((2, 3), keepdim=True).expand_as(offset), rtol=0, atol=1e-6)
    assert abs(float(offset[:, :, 0, 0].std()) - 0.2) < 0.02
    silent = make(noise_offset=0.2).draw(batch, Randomness(0)).noise
    assert torch.equal(silent, plain)


def test_snr_gamma_on_a_flow_model_is_refused() -> None:
    facts = RunFacts("lora", "flow_prediction", FlowSchedule(), None, None)
    with pytest.raises(UserError, match="snr_gamma"):
        SFT.check(ObjectiveSection(snr_gamma=5.0), facts)
    assert SFT.check(ObjectiveSection(), facts) == []


def test_sampling_is_the_bases_own() -> None:
    scheduler, arguments = make("v_prediction").sampling(SDXL_SCHEDULER)
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert arguments["guidance_scale"] > 1
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    scheduler, _ = make("flow_prediction", FlowSchedule(3.0)).sampling(flow)
    assert scheduler.config["shift"] == 3.0
    with pytest.raises(UserError, match="scheduler 'NoSuchScheduler'"):
        make().sampling({"_class_name": "NoSuchScheduler"})
