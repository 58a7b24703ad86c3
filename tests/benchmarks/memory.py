"""Peak memory of a full LCM step on the CPU, with the student's pass last, as in distillers/lcm.py, or first.

    python -m tests.benchmarks.memory {last,first} [--channels 128 256 512] [--latent 32] [--batch 4] [--checkpointing]

One order a process. Linux only: the high-water mark is reset before the step. Prints one line of JSON, in MB.
"""

import argparse
import copy
import json
import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from simpletuner.batch import Batch
from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Draw, Setup, distance, sample_posterior
from simpletuner.distillers.lcm import LCM, LCMConfig
from simpletuner.families.sd1x import SD1X
from simpletuner.randomness import Randomness
from simpletuner.schedules import from_scheduler_config


def megabytes(key: str) -> int:
    """Returns VmRSS, what the process holds now, or VmHWM, the most that it has held since the last reset."""
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf8"))
    return int(kilobytes) // 1024


def loss_student_first(lcm: LCM, batch: Batch, draw: Draw) -> torch.Tensor:
    """Returns the loss of ``LCM.loss`` with the student's activations held while teacher and target run."""
    schedule, uncond = lcm.schedule, lcm.uncond(batch.cond)
    start, end, edge, w = draw.start, draw.end, draw.edge, draw.w
    assert end is not None
    assert edge is not None
    assert w is not None
    z_start = schedule.add_noise(sample_posterior(batch, draw.posterior), draw.noise, start)
    student = lcm._jump(lcm.denoisers["student"](z_start, start, batch.cond, batch.geometry, w), z_start, start, edge)
    with torch.no_grad():
        guided = lcm.denoisers["teacher"].guided(z_start, start, batch.cond, uncond, batch.geometry, w)
        z_end = schedule.ddim_step(guided.x0, guided.noise, end)
        target = lcm._jump(lcm.denoisers["target"](z_end, end, batch.cond, batch.geometry, w), z_end, end, edge)
    return distance(student, target, lcm.config.loss_type, lcm.config.huber_c)


def make(channels: list[int], checkpointing: bool) -> tuple[LCM, UNet2DConditionModel]:
    """Returns a full LCM of a UNet in the shape of SD 1.x, and its student."""
    torch.manual_seed(0)
    kinds = ["CrossAttnDownBlock2D"] * (len(channels) - 1) + ["DownBlock2D"]
    sizes = {"block_out_channels": channels, "cross_attention_dim": 768, "attention_head_dim": 8}
    blocks = {"down_block_types": kinds, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}
    teacher = UNet2DConditionModel(**sizes, **blocks).requires_grad_(False)
    student = UNet2DConditionModel(**sizes, **blocks, time_cond_proj_dim=256)
    target = copy.deepcopy(student).requires_grad_(False)
    if checkpointing:
        student.train().enable_gradient_checkpointing()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = from_scheduler_config(dict(scheduler.config))
    denoisers = {
        name: Denoiser(SD1X(), module, None, "epsilon", schedule, None)
        for name, module in (("student", student), ("teacher", teacher), ("target", target))
    }
    return LCM(Setup(LCMConfig(w_min=5, w_max=15), denoisers, schedule, lambda cond: cond)), student


def main() -> None:
    """Makes one step and says its high-water mark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("order", choices=["last", "first"])
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    lcm, student = make(arguments.channels, arguments.checkpointing)
    shape = (arguments.batch, 4, arguments.latent, arguments.latent)
    batch = Batch(
        mean=torch.randn(shape),
        std=None,
        cond={"prompt_embeds": torch.randn(arguments.batch, 77, 768)},
        dropped=torch.zeros(arguments.batch, dtype=torch.bool),
        geometry=torch.zeros(arguments.batch, 6),
        position=torch.arange(arguments.batch),
        weight=torch.ones(arguments.batch),
        ids=("",) * arguments.batch,
        global_weight=float(arguments.batch),
    )
    draw = lcm.draw(batch, Randomness(0))
    # The first step: memory that is freed after it mostly stays with the process, and would hide the second one's peak.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf8")
    numbers = {"parameters": sum(parameter.numel() for parameter in student.parameters()), "before": megabytes("VmRSS")}
    ours = arguments.order == "last"
    per_sample = lcm.loss("student", batch, draw, 0).per_sample if ours else loss_student_first(lcm, batch, draw)
    numbers["peak_of_forwards"] = megabytes("VmHWM")
    per_sample.mean().backward()
    numbers["peak_of_step"] = megabytes("VmHWM")
    print(json.dumps({**vars(arguments), **numbers, "loss": float(per_sample.detach().mean())}))


if __name__ == "__main__":
    main()
