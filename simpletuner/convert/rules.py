"""Converts a command line of the scripts; what is more than a renamed flag is a rule here."""

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.atomic import files_into
from simpletuner.config.environment import accelerate_file
from simpletuner.config.errors import Problems, UserError
from simpletuner.config.fields import Json
from simpletuner.config.schema import SECTIONS, section_of
from simpletuner.convert.command import Command, read_command
from simpletuner.convert.flags import LAUNCH_FLAGS, SCRIPTS, Flag, flags_of

VALIDATION_PROMPT = "a red boat on a lake at sunset"
_SHORTEST_EDGE_PX = 700
"""Edge below which the SDXL scripts leave a sample of a shard out, by ``width`` and ``height`` of its JSON.

That is the size of the picture in the shard (minimum_image_size); its original size they call ``original_width``."""
_READS_A_FILE = re.compile(r"pipe:\s*(?:curl|wget|cat)\s")
_HARMLESS = frozenset(
    ("-L", "-s", "-S", "-f", "-sL", "-Ls", "-fL", "-sS", "-sSL", "-fsSL", "-q", "-O", "-", "-O-", "-qO-", "-nv")
    + ("--location", "--silent", "--show-error", "--fail", "--quiet")
)
"""Options of curl and wget without which the url gives the same file."""

_EXPORT = """
from pathlib import Path
from datasets import load_dataset

folder = Path({folder})
folder.mkdir(parents=True, exist_ok=True)
for i, row in enumerate(load_dataset({source})["train"]):
    row[{image}].convert("RGB").save(folder / f"{{i:06d}}.png")
    (folder / f"{{i:06d}}.txt").write_text(" ".join(str(row[{caption}]).split()), encoding="utf8")
"""
"""Writes a dataset of the hub, or an image folder with captions in metadata.jsonl, as pictures with texts."""


@dataclass(frozen=True)
class Conversion:
    """The two files, and what to know about them."""

    config: dict[str, Json]
    datasets: list[dict[str, Json]]
    environment: dict[str, str]
    """Variables to set for ``bash train.sh``."""
    first: str
    """A command to run once before; "" for none."""
    notices: tuple[str, ...]


@dataclass
class _Work:
    """What the rules read and write."""

    command: Command
    environ: Mapping[str, str]
    values: dict[str, Json]
    """Flag -> its value, given or the script's default."""
    config: dict[str, Json] = field(default_factory=dict[str, Json])
    dataset: dict[str, Json] = field(default_factory=dict[str, Json])
    environment: dict[str, str] = field(default_factory=dict[str, str])
    first: str = ""
    notices: list[str] = field(default_factory=list[str])
    problems: Problems = field(default_factory=Problems)

    def whole(self, flag: str) -> int | None:
        """Returns the number of a flag that is needed to count with; None where it is not given."""
        value = self.values.get(flag)
        if value is None or (isinstance(value, int) and value > 0):
            return value
        self.problems.lines.append(f"--{flag}: '{value}': it must be a whole number above 0")
        return None


def convert(text: str, environ: Mapping[str, str]) -> Conversion:
    """Returns the files for a command line of the five scripts.

    Args:
        text: As ``read_command`` takes it.
        environ: The environment, for variables in the text and for accelerate's default file.

    Raises:
        UserError: The command cannot be read, or asks for something that is not supported.
    """
    command = read_command(text, environ)
    script = SCRIPTS[command.script]
    flags = flags_of(script)
    problems = Problems()
    values = {name: script.defaults.get(name, flag.default) for name, flag in flags.items()}
    values |= {name: _typed(name, word, values[name], problems) for name, word in command.given.items()}
    work = _Work(command, environ, values, problems=problems)
    work.config |= {"model_family": script.model_family, "model_type": script.model_type}
    method = {flag.key: values[name] for name, flag in flags.items() if flag.target == "method"}
    for name, flag in flags.items():
        _rename(name, flag, work)
    for rule in (*_RULES, _shards if script.shards else _folder):
        rule(work)
    problems.raise_any()
    work.config |= {"distillation_method": "lcm", "distillation_config": {"lcm": method}}
    work.config |= {"validation_prompt": VALIDATION_PROMPT}
    work.notices.append("validation_prompt: an example; the scripts have their own prompts written into their code")
    unset = sorted(set(re.findall(r"\{env:(\w+)\}", json.dumps([work.config, work.dataset]))))
    work.notices += [f"{name}: set nowhere in the command: export it before the run" for name in unset]
    return Conversion(work.config, [work.dataset], work.environment, work.first, tuple(work.notices))


def _typed(name: str, word: str, default: Json, problems: Problems) -> Json:
    """Returns a flag's text as the kind of value that its default is."""
    if isinstance(default, bool):
        return True
    number = next((n for kind in (int, float) if (n := _number(word, kind)) is not None), None)
    if number is None and isinstance(default, (int, float)) and not word.startswith("{env:"):
        problems.lines.append(f"--{name}: '{word}' is not a number")
    return word if number is None else number


def _number(word: str, kind: Callable[[str], int | float]) -> int | float | None:
    try:
        value = kind(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rename(name: str, flag: Flag, work: _Work) -> None:
    """Writes a flag under its key where it differs from the key's own default, and says what it leaves out."""
    given = name in work.command.given
    ignored = given and name in SCRIPTS[work.command.script].ignored
    if name == "scale_lr" and ignored:
        work.notices.append("--scale_lr: left out: the script ignores it; write scale_lr if you mean it")
        return
    if flag.target == "nothing" and given:
        work.notices.append(f"--{name}: needs nothing here: {flag.note}")
    elif ignored:
        work.notices.append(f"--{name}: the script ignores it; here it acts")
    value = work.values[name]
    if flag.target == "config" and value is not None and value != _default(flag.key):
        work.config[flag.key] = value
    elif flag.target == "dataset" and value:
        work.dataset[flag.key] = value


def _default(key: str) -> Json:
    return SECTIONS[section_of()[key]].model_fields[key].default


def _launcher(work: _Work) -> None:
    extra: list[str] = []
    for name, value in work.command.launcher.items():
        flag = LAUNCH_FLAGS[name]
        if flag.target == "config":
            work.config[flag.key] = value.lower()
        elif flag.target == "environment":
            work.environment[flag.key] = value
        elif flag.target == "extra":
            extra += [f"--{name}"] if flag.switch else [f"--{name}", value]
        else:
            work.notices.append(f"accelerate launch --{name}: needs nothing here: {flag.note}")
    if extra:
        work.environment["ACCELERATE_EXTRA_ARGS"] = shlex.join(extra)
    work.environment |= work.command.environment
    if work.command.with_accelerate and "num_processes" not in work.command.launcher:
        work.notices.append("processes: accelerate starts one on each GPU; here TRAINING_NUM_PROCESSES says how many")


def _precision(work: _Work) -> None:
    written = work.values["mixed_precision"]
    if written is not None:
        work.config["mixed_precision"] = written
    elif "mixed_precision" not in work.config and accelerate_file({**work.environ, **work.environment}):
        work.notices.append("mixed_precision: accelerate's config file decides, as for the script")
    else:
        work.config.setdefault("mixed_precision", "no")


def _pictures(work: _Work) -> None:
    resolution = work.whole("resolution")
    if resolution is None:
        return
    work.config |= {"resolution": resolution, "resolution_type": "pixel"}
    if resolution % 64:
        work.config["aspect_bucket_alignment"] = 8
    if resolution % 8:
        work.problems.lines.append(f"--resolution: {resolution} is not a multiple of 8 px, which latents need")
    style = "center" if work.values["center_crop"] else "random"
    work.dataset = {"crop": True, "crop_aspect": "square", "crop_style": style} | work.dataset


def _steps(work: _Work) -> None:
    shards, steps = SCRIPTS[work.command.script].shards, work.whole("max_train_steps")
    samples, epochs = work.whole("max_train_samples"), work.whole("num_train_epochs")
    if not shards and samples is not None:
        work.config["max_train_samples"] = samples
    if steps is not None:
        work.config["max_train_steps"] = steps
        if shards and samples is not None:
            work.notices.append("--max_train_samples: left out: with shards it is the length of an epoch only")
    elif not shards:
        work.config["num_train_epochs"] = epochs
    elif samples is None:
        work.problems.lines.append("--max_train_steps: required, or --max_train_samples: how long the run is")
    else:
        processes = int(_number(work.environment.get("TRAINING_NUM_PROCESSES", "1"), int) or 1)
        batch, workers = work.whole("train_batch_size") or 1, 1
        if work.values["dataloader_num_workers"]:
            workers = work.whole("dataloader_num_workers") or 1
        batches = math.ceil(samples / (batch * processes * workers)) * workers
        steps = (epochs or 1) * math.ceil(batches / (work.whole("gradient_accumulation_steps") or 1))
        work.config["max_train_steps"] = steps
        work.notices.append(f"max_train_steps: {epochs} epochs of {samples} samples on {processes} process(es)")


def _course(work: _Work) -> None:
    if work.values["lr_scheduler"] != "constant":
        work.config["lr_warmup_steps"] = work.values["lr_warmup_steps"]
    elif "lr_warmup_steps" in work.command.given and work.values["lr_warmup_steps"]:
        work.notices.append("--lr_warmup_steps: left out: `constant` has no warmup in the script")
    work.config["optimizer"] = "bnb-adamw8bit" if work.values["use_8bit_adam"] else "adamw"
    if work.values["enable_xformers_memory_efficient_attention"]:
        work.config["attention_mechanism"] = "xformers"
    layers = work.values.get("lora_target_modules")
    if layers is not None:
        work.config["peft_lora_target_modules"] = [name.strip() for name in str(layers).split(",") if name.strip()]
    if work.values.get("unet_time_cond_proj_dim", 256) != 256:
        work.problems.lines.append("--unet_time_cond_proj_dim: only 256 is supported, or what the teacher has")


def _checkpoints(work: _Work) -> None:
    limit = work.values["checkpoints_total_limit"]
    work.config["checkpoints_total_limit"] = 0 if limit is None else limit
    resume = work.values["resume_from_checkpoint"]
    work.config["resume_from_checkpoint"] = "none" if resume is None else resume
    if work.values["seed"] is None:
        work.notices.append("seed: 42, since none is given; the scripts then draw another one each time")


_RULES = (_launcher, _precision, _pictures, _steps, _course, _checkpoints)


def _shards(work: _Work) -> None:
    """Writes the dataset that encodes images and captions while training, as the scripts do."""
    place = work.values["train_shards_path_or_url"]
    if place is None:
        work.problems.lines.append("--train_shards_path_or_url: required: where the shards are")
        return
    shards = _without_pipe(str(place))
    entry: dict[str, Json] = {"id": "shards", "type": "webdataset", "shards": shards}
    entry |= {"vae_cache_disable": True, "text_cache_disable": True}
    if "://" in shards:
        work.notices.append(
            "--train_shards_path_or_url: all shards that are named are downloaded before training, once, where the "
            "scripts read them as they go: name as many as the run needs"
        )
    if shards != place:
        work.notices.append("--train_shards_path_or_url: read without the pipe, which would run a command")
    elif shards.startswith("pipe:"):
        work.notices.append(
            "--train_shards_path_or_url: it runs a command: see SIMPLETUNER_ALLOW_PIPE in DATALOADER.md"
        )
    if SCRIPTS[work.command.script].model_family == "sdxl":
        entry["minimum_image_size"] = _SHORTEST_EDGE_PX
        work.notices.append(
            f"minimum_image_size: {_SHORTEST_EDGE_PX}: what is written into the script's code; "
            "for the sizes before scaling, which LAION's shards have, use minimum_original_size"
        )
    work.dataset = entry | work.dataset


def _without_pipe(place: str) -> str:
    """Returns the one file or url that a simple ``pipe:`` prints, or the place as it is."""
    if not _READS_A_FILE.match(place):
        return place
    program, *words = place.removeprefix("pipe:").split()
    named = [word for word in words if program == "cat" or word not in _HARMLESS]
    is_one = len(named) == 1 and not named[0].startswith("-")
    return named[0] if is_one and (program == "cat" or named[0].startswith(("http://", "https://"))) else place


def _folder(work: _Work) -> None:
    """Writes the dataset of a folder, and how to fill it from a dataset of the hub or an image folder."""
    name, source = work.values["dataset_name"], work.values["train_data_dir"]
    if name is None and source is None:
        work.problems.lines.append("--dataset_name: required, or --train_data_dir: where the pictures are")
        return
    if "{env:" in f"{name}{source}":
        work.problems.lines.append(f"--dataset_name, --train_data_dir: '{name or source}': set the variable first")
    folder = f"datasets/{Path(str(name or source)).name}"
    config = work.values["dataset_config_name"]
    words = [json.dumps(name or "imagefolder"), *([json.dumps(config)] if config else [])]
    words += [f"data_dir={json.dumps(source)}"] if source else []
    columns = {key: json.dumps(work.values[f"{key}_column"]) for key in ("image", "caption")}
    code = _EXPORT.format(folder=json.dumps(folder), source=", ".join(words), **columns)
    work.first = f"python -c {shlex.quote(code)}"
    work.dataset = {"id": "pictures", "instance_data_dir": folder, "caption_strategy": "textfile"} | work.dataset


def text_of(conversion: Conversion, folder: str = "config/converted") -> str:
    """Returns what ``convert-command`` prints: the files, how to run them, and what to know."""
    lines = [f"# {folder}/config.json", json.dumps(conversion.config, indent=2)]
    lines += [f"# {folder}/multidatabackend.json", json.dumps(conversion.datasets, indent=2)]
    return "\n".join((*lines, advice(conversion, folder)))


def advice(conversion: Conversion, folder: str) -> str:
    """Returns how to run the files, and what to know; what is no command is a comment."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in conversion.environment.items()]
    lines = ["# first, once (it needs pip install datasets):", conversion.first] if conversion.first else []
    lines += ["# then:", " ".join([*variables, "bash train.sh --config", shlex.quote(folder)])]
    return "\n".join([*lines, *(f"# {notice}" for notice in conversion.notices)])


def write(conversion: Conversion, folder: Path) -> None:
    """Writes the two files into a folder.

    Raises:
        UserError: One of them is there already, or the folder cannot be written.
    """
    files = {folder / "config.json": conversion.config, folder / "multidatabackend.json": conversion.datasets}
    there = [str(file) for file in files if file.exists()]
    if there:
        raise UserError(f"--output: {', '.join(there)} exists already; name another folder")
    try:
        with files_into(folder) as temporary:
            for file, content in files.items():
                (temporary / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
    except OSError as error:
        raise UserError(f"--output: {folder}: cannot be written: {error.strerror}") from error
