"""What this machine has for a run, and what each thing means: versions, devices, disk, logins, optional packages."""

import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from netrc import NetrcParseError, netrc
from pathlib import Path

import torch

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "optimum-quanto", "huggingface_hub")
_USES = {
    "aws": "datasets in S3 buckets",
    "bitsandbytes": "8-bit Adam, nf4 bases",
    "datasets": "datasets of the hub, parquet and arrow files",
    "lycoris": "lora_type lycoris",
    "prodigy": "the optimizer prodigy",
    "schedulefree": "the optimizer adamw_schedulefree",
    "tensorboard": "report_to tensorboard",
    "torchao": "optimizers ao-*, bases in int8, int4 and fp8",
    "trackio": "report_to trackio",
    "wandb": "report_to wandb",
    "xformers": "attention_mechanism xformers",
}
"""Extra -> what it is for."""
_ROOMY_DISK_GIB, _LITTLE_MEMORY_GIB = 30, 12


def doctor_lines(folder: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Yields what is found, a line or a heading at a time; asks no network and shows no secret.

    Args:
        folder: Where a run would write.
        environ: The environment.
    """
    yield "versions"
    yield _row("simpletuner", f"{version('simpletuner')}, Python {platform.python_version()}, {platform.platform()}")
    for name in _LIBRARIES:
        yield _row(name, _version(name) or "MISSING: run `bash train.sh` again, or pip install simpletuner")
    yield "devices"
    yield from _devices()
    yield "room"
    free = shutil.disk_usage(folder).free / 2**30
    meaning = "enough for an SDXL with its caches" if free > _ROOMY_DISK_GIB else "an SDXL alone takes 7 to 14 GiB"
    yield _row("disk", f"{free:.0f} GiB free in {folder}: {meaning}")
    yield "logins"
    yield _row("hub", _hub(environ))
    yield _row("wandb", _wandb(environ))
    yield "extras"
    for extra, use in _USES.items():
        missing = [name for name in _packages(extra) if _version(name) is None]
        said = f'not installed: pip install "simpletuner[{extra}]"' if missing else "installed"
        yield _row(extra, f"{said} ({use})")


def _row(name: str, text: str) -> str:
    return f"  {name:<16}{text}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(extra: str) -> list[str]:
    """Returns the packages that an extra of this package brings."""
    asked = re.compile(rf"""([\w.-]+).*extra == ['"]{extra}['"]""")
    return [found[1] for text in requires("simpletuner") or () if (found := asked.match(text))]


def _devices() -> Iterator[str]:
    """Yields a row for each device that could train, and what it can compute in."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = about.total_memory / 2**30
            small = ", little: see QUANTIZATION.md" if memory < _LITTLE_MEMORY_GIB else ""
            dtypes = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16: set fp16"
            yield _row(f"cuda:{index}", f"{about.name}, {memory:.0f} GiB{small}; mixed_precision: {dtypes}")
        return
    if torch.backends.mps.is_available():
        yield _row("mps", "Apple's GPU; mixed_precision: bf16 or no")
        return
    yield _row("cpu", f"{torch.get_num_threads()} threads, no GPU: small models only, with mixed_precision no")
    if shutil.which("nvidia-smi"):
        yield _row("", f"there is an NVIDIA driver, but torch {torch.__version__} has no CUDA: reinstall torch")


def _hub(environ: Mapping[str, str]) -> str:
    from huggingface_hub import get_token

    if environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set: models and datasets must be on this machine, and nothing is uploaded"
    if get_token():
        return "a token is there; `hf auth whoami` asks the hub whose it is"
    return "no token: public models load; gated ones and push_to_hub need `hf auth login`"


def _wandb(environ: Mapping[str, str]) -> str:
    if environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE is {environ['WANDB_MODE']}: nothing is sent"
    try:
        logins = set(netrc().hosts)
    except (OSError, NetrcParseError):
        logins = set[str]()
    if environ.get("WANDB_API_KEY") or any("wandb" in host for host in logins):
        return "a login is there"
    return "no login: report_to wandb needs `wandb login`, or WANDB_MODE=offline"
