"""The command line: ``simpletuner init | doctor | plan | train | sample | evaluate | ...``; ``--help`` has them all.

train, plan, cache, dataset and evaluate take ``--config PATH`` (a config.json or its folder) and overrides such as
``--max_train_steps 100``.
A mistake of the user is printed as plain lines and ends with status 2; a run that was stopped by a signal with 128 plus
its number, as a shell counts it.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from simpletuner.config.errors import SaidElsewhere, UserError
from simpletuner.config.load import default_config_path, load
from simpletuner.config.schema import Config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

_ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", help="A config.json (or .toml), or the folder that holds it. Default: $ENV, or config/."),
]
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_OVERRIDES)
def train(context: typer.Context, config: _ConfigPath = None) -> None:
    """Run a config: scan, cache, train, validate, save. Without any config: the quickstart."""
    from simpletuner.run import train as run

    state = run(_read(context, config))
    if state.stopped_by is not None:
        raise typer.Exit(128 + state.stopped_by)


@app.command(context_settings=_OVERRIDES)
def quickstart(context: typer.Context) -> None:
    """Draw the example's pictures and model, and run its config: config/examples/quickstart."""
    from simpletuner.quickstart import prepare

    train(context, prepare())


@app.command(context_settings=_OVERRIDES)
def plan(
    context: typer.Context,
    config: _ConfigPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what a run would do, before any weight is loaded; write nothing."""
    from simpletuner.plan_view import plan_json, plan_text
    from simpletuner.planning import look_ahead

    made = look_ahead(_read(context, config))
    print(json.dumps(plan_json(made), indent=1) if as_json else plan_text(made))


@app.command(context_settings=_OVERRIDES)
def cache(context: typer.Context, config: _ConfigPath = None) -> None:
    """Scan the datasets and cache latents and text features, without training."""
    from simpletuner.run import fill_cache

    fill_cache(_read(context, config))


@app.command(context_settings=_OVERRIDES)
def dataset(
    context: typer.Context,
    config: _ConfigPath = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Images on the sheet of each bucket.")] = 12,
    decode_all: Annotated[bool, typer.Option("--decode-all", help="Decode every image, to find all damage.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="Folder for the sheets. Default: the caches.")] = None,
) -> None:
    """Show what the trainer sees: counts, buckets, captions, problems, and a picture of each bucket with its crops."""
    from simpletuner.dataset_view import Look, dataset_lines
    from simpletuner.hooks.caching import CachingProgress

    for line in dataset_lines(_read(context, config).datasets, Look(images, decode_all, output), CachingProgress()):
        print(line)


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="The output_dir of a finished run, or the hub id of its result.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be given several times.")],
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; the next ones count on.")] = 42,
    size: Annotated[str | None, typer.Option(help="Width x height, such as 1024x768. Default: the run's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the run's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: the run's.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; needs a guidance above 1.")] = None,
    image: Annotated[Path | None, typer.Option(help="Begin from this picture in place of noise.")] = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="Of --image: 1 leaves nothing of it.")] = 0.6,
    controlnet: Annotated[str | None, typer.Option(help="Folder or hub id of a ControlNet of the base.")] = None,
    control_image: Annotated[Path | None, typer.Option("--control-image", help="What the ControlNet holds to.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not where the run had it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the pictures. Default: samples in the run.")] = None,
) -> None:
    """Draw pictures with the result of a run, by the sampler that it was trained for."""
    from simpletuner.quiet import quieten_libraries
    from simpletuner.sample import Wishes
    from simpletuner.sample import sample as draw

    quieten_libraries()
    seeds, control = range(seed, seed + num_images), (controlnet, control_image)
    wishes = Wishes(prompt, seeds, size, steps, guidance, negative, image, strength, *control)
    folder = Path(run) / "samples" if Path(run).is_dir() else Path("samples")
    for line in draw(run, wishes, output or folder, base):
        print(line, flush=True)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The output_dir of a finished run, the hub id of its result, or a file.")],
    to: Annotated[
        Literal["kohya", "pipeline", "checkpoint", "diffusers"],
        typer.Option("--to", help="What to write; diffusers: of an adapter's file of another program."),
    ],
    output: Annotated[Path, typer.Option(help="The file (kohya, checkpoint) or the folder (pipeline) to write.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="Default: the run's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    base: Annotated[str | None, typer.Option(help="The base model, if not where the run had it.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of a pipeline: variant of its weights, such as fp16.")] = None,
) -> None:
    """Write the result of a run for other programs: kohya's adapters, a whole pipeline, or one checkpoint file."""
    from simpletuner.exporting import export as write
    from simpletuner.quiet import quieten_libraries

    quieten_libraries()
    for line in write(run, to, output, dtype, force, base, variant):
        print(line, flush=True)


@app.command()
def init(
    images: Annotated[Path, typer.Option(help="Folder with the images or shards.", prompt="Folder with your images")],
    base: Annotated[
        str, typer.Option(help="Base model: a hub id, a folder or a file.", prompt="Base model (hub id, folder, file)")
    ] = "stabilityai/stable-diffusion-xl-base-1.0",
    purpose: Annotated[
        str, typer.Option("--for", help="lcm-lora, lcm-full, lora or full.", prompt="lcm-lora, lcm-full, lora or full")
    ] = "lcm-lora",
    memory: Annotated[
        int, typer.Option(min=0, help="GiB of the GPU; 0: none.", prompt="GiB of the GPU (0: none)")
    ] = 24,
    output: Annotated[Path, typer.Option(help="Folder for the results.", prompt="Folder for the results")] = Path(
        "output/run"
    ),
    to: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path("config"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write config.json and multidatabackend.json for a new run; what is not given as an option is asked."""
    from simpletuner.starting import answers, write

    print(*write(answers(images, base, purpose, memory, output), to, force), sep="\n")


@app.command()
def doctor() -> None:
    """Say what this machine has for a run: versions, devices, disk, logins, optional packages; and what each means."""
    from simpletuner.doctor import doctor_lines

    print(*doctor_lines(Path.cwd(), os.environ), sep="\n")


@app.command(context_settings=_OVERRIDES)
def evaluate(
    context: typer.Context,
    config: _ConfigPath = None,
    full: Annotated[bool, typer.Option("--full", help="Of scenes: three seeds, 512 prompts.")] = False,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to judge, at most.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    run: Annotated[str | None, typer.Option(help="In place of a config: a run's output_dir or hub id.")] = None,
    prompts_from: Annotated[
        Path | None,
        typer.Option("--prompts-from", help="JSON library, text file, or folder of captions. Default: the run's own."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Pictures of each prompt.")] = 2,
    steps: Annotated[str | None, typer.Option(help="Of the student, such as 1,2,4. Default: 1,2,4,8.")] = None,
    teacher_steps: Annotated[int | None, typer.Option("--teacher-steps", min=1, help="Default: the usual.")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height. Default: the run's.")] = None,
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model that judges too.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if not where the run had it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write into. Default: evaluation in the run.")] = None,
) -> None:
    """Judge what a run has written beside the model that it started from, in 1, 2, 4 and 8 steps.

    Runs of the quickstart's scenes are judged by what is in their pictures; all others, and every --run, by how near
    their pictures come to those that the base model draws from the same noise in many steps.
    """
    from simpletuner.evaluation.asking import Wanted, judge_config, judge_run
    from simpletuner.quiet import quieten_libraries

    quieten_libraries()
    wanted = Wanted(prompts, prompts_from, seeds, steps, teacher_steps, size, clip, base, output)
    if run is not None and (config is not None or full or context.args):
        extra = [*(["--config"] if config else []), *(["--full"] if full else []), *context.args[:1]]
        raise UserError(f"--run: it stands alone; {extra[0]} goes with a config")
    report = judge_config(_read(context, config), full, wanted) if run is None else judge_run(run, wanted)
    print(json.dumps(report.json(), indent=1) if as_json else report.text())


@app.command()
def convert_command(
    command: Annotated[str, typer.Argument(help="The command line, in quotes; - reads it from stdin.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write the two files into.")] = None,
) -> None:
    """Turn a command line of diffusers' latent consistency scripts into the two files of a run."""
    from simpletuner.convert.rules import advice, convert, text_of, write

    converted = convert(sys.stdin.read() if command == "-" else command, os.environ)
    if output is None:
        print(text_of(converted))
    else:
        write(converted, output)
        print(advice(converted, str(output)))


def _read(context: typer.Context, path: Path | None) -> Config:
    """Returns the config that was named, else the one that the environment names, else the quickstart's."""
    found = path if path is not None else default_config_path(os.environ, Path.cwd())
    if found is None:
        from simpletuner.quickstart import prepare

        found = prepare()
        logging.getLogger(__name__).info(
            "no config/config.json: this is the quickstart; copy %s to make it yours", found.parent
        )
    return load(found, _overrides(context.args))


def _overrides(words: list[str]) -> dict[str, str]:
    """Returns key -> value of ``--key value`` and ``--key=value``; a key without a value is switched on.

    Raises:
        UserError: A word stands where a key should.
    """
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            found[key] = value if equals else "true"
            waiting = None if equals else key
        elif waiting is not None:
            found[waiting] = word
            waiting = None
        elif "=" in word:  # KEY=value, as train.sh's users write it
            key, _, value = word.partition("=")
            found[key] = value
        else:
            raise UserError(f"'{word}': not understood; write overrides as --key value")
    return found


def main() -> None:
    """Runs the command line and ends the process with its status."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "diffusers", "transformers", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        app()
    except SaidElsewhere:
        _leave(2)
    except UserError as error:
        if rank == 0:  # the other ranks make the same mistake
            print(*(f"error: {line}" for line in error.lines), sep="\n", file=sys.stderr)
        _leave(2)
    except SystemExit as ended:  # typer's way to return
        _leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))


def _leave(status: int) -> NoReturn:
    """Ends the process; one of several without the interpreter's own end.

    A thread of gloo (torch 2.13) that lets go of a tensor takes Python's lock for it. When the interpreter is ending,
    Python ends that thread instead, and C++ aborts the process: status 134 in up to one start of two.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
