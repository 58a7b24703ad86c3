"""Puts the trained UNet into the model it started from, in fp16, and lets the judge look at what it draws.

Usage:

    python config/examples/teacher/assemble.py [--folder output/teacher] [--pictures 256] [--threads 2]

Writes ``model``, an ordinary diffusers folder with a card and ``scores.json``, into the folder.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from make_start import reconstruct  # the script beside this one
from PIL import Image

from simpletuner.atomic import files_into, new_folder
from simpletuner.evaluation.drawing import draw_scenes
from simpletuner.evaluation.samplers import teacher_sampler
from simpletuner.hooks.caching import CachingProgress
from simpletuner.quickstart.drawing import render
from simpletuner.quickstart.judge import accuracy
from simpletuner.quickstart.scenes import Scene, Split, make_prompt
from simpletuner.quiet import quieten_libraries

PROMPTS_SEED = 0


def main() -> None:
    """Assembles, where there is no model yet, measures, and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("output/teacher"))
    parser.add_argument("--unet", type=Path, help="folder of the trained UNet; default: what the run left")
    parser.add_argument("--pictures", type=int, default=256, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quieten_libraries()
    model, unet = arguments.folder / "model", arguments.unet or arguments.folder / "run"
    if not model.exists():
        assemble(arguments.folder / "start", unet, model)
    scores = measure(model, arguments.pictures)
    run = json.loads((unet / "simpletuner.json").read_text(encoding="utf8"))
    with files_into(model) as made:
        (made / "README.md").write_text(card(scores, run, model), encoding="utf8")
        (made / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf8")
    print((model / "README.md").read_text(encoding="utf8"))


def assemble(start: Path, unet: Path, model: Path) -> None:
    """Writes the model with its UNet, all in fp16."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(start, use_safetensors=True, add_watermarker=False)
    pipeline.register_modules(unet=UNet2DConditionModel.from_pretrained(unet, use_safetensors=True))
    with new_folder(model) as made:
        pipeline.to(dtype=torch.float16).save_pretrained(made)
        for path in made.rglob("*.json"):
            document = json.loads(path.read_text(encoding="utf8"))
            # Where diffusers found the part: a path of this machine.
            if document.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf8")


def measure(model: Path, num_pictures: int) -> dict[str, Any]:  # Any: JSON
    """Returns how many pictures are right: as drawn, through the VAE, and drawn by the model from seen and unseen."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    pipeline.to(dtype=torch.float32)
    sampler = teacher_sampler(dict(pipeline.scheduler.config))
    scenes = [make_prompt(PROMPTS_SEED, index) for index in range(num_pictures)]
    drawn = [render(scene) for scene in scenes]
    scores = {
        "num_inference_steps": sampler.num_inference_steps,
        "guidance_scale": sampler.guidance_scale,
        "generator": _score(drawn, scenes),
        "vae": _score([reconstruct(pipeline.vae, picture) for picture in drawn], scenes),
    }
    splits: tuple[Split, ...] = ("train", "unseen")
    for split in splits:
        scenes = [make_prompt(PROMPTS_SEED, index, split) for index in range(num_pictures)]
        started = time.perf_counter()
        pictures = draw_scenes(pipeline, sampler, scenes, CachingProgress())
        scores[f"samples, {split}"] = _score(pictures, scenes)
        print(f"drew {len(pictures)} pictures in {time.perf_counter() - started:.0f} s", flush=True)
    return scores


def card(scores: dict[str, Any], run: dict[str, Any], model: Path) -> str:  # Any: JSON
    """Returns the model card.

    Args:
        scores: What was measured.
        run: ``simpletuner.json`` of the run that trained the UNet.
        model: The model's folder.
    """
    parts = {name: row for name, row in scores.items() if isinstance(row, dict)}
    attributes = list(dict.fromkeys(name for row in parts.values() for name in row))
    lines = [f"| {' | '.join(['', *attributes])} |", f"|---{'|---:' * len(attributes)}|"]
    lines += [f"| {name} | {' | '.join(str(row[each]) for each in attributes)} |" for name, row in parts.items()]
    num_bytes = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    table = "\n".join(lines)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The quickstart's teacher

An SDXL of {num_bytes / 1e6:.1f} MB that draws coloured shapes: pictures of 64 to 96 pixels, captions such as "a small
red star left of a large blue ring on a striped yellow background". It knows no other words. It was trained on drawn
pictures and their captions alone, so nobody else has rights in it; its licence is the repository's.

- VAE and text encoders: `config/examples/teacher/make_start.py`
- UNet: `config/examples/teacher/config.json`, {run["step"]} steps, at commit
  {run["commit"]}{" with local changes" if run["dirty"] else ""}
- Everything again, from nothing: `bash config/examples/teacher/reproduce.sh`

## Scores

Parts of pictures that a judge of rules (`simpletuner/quickstart/judge.py`) finds right, in all attributes and in each.
"Samples" are drawn in {scores["num_inference_steps"]} steps with guidance {scores["guidance_scale"]:g}, for captions
that were made apart from those of the training pictures; "unseen" are combinations of colour and shape that no training
picture shows.

{table}
"""


def _score(pictures: list[Image.Image], scenes: list[Scene]) -> dict[str, Any]:  # Any: JSON
    result = accuracy(pictures, scenes)
    attributes = {name: round(part, 4) for name, part in result.attributes.items()}
    return {"num_pictures": result.num_pictures, "all_right": round(result.all_right, 4), **attributes}


if __name__ == "__main__":
    main()
