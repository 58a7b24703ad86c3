"""Renders documentation/distillers/CONVERSION.md from the tables: ``python -m simpletuner.convert.page``."""

import json
from pathlib import Path

from simpletuner.config.fields import Json
from simpletuner.convert.flags import FLAGS, LAUNCH_FLAGS, LAUNCH_GROUPS, SCRIPTS, Flag, LaunchFlag, flags_of

PATH = Path(__file__).parents[2] / "documentation" / "distillers" / "CONVERSION.md"

_HEAD = """# From diffusers' scripts

This page is generated from the tables of `simpletuner/convert`; `python -m simpletuner.convert.page` writes it again.

The five scripts of huggingface/diffusers, examples/consistency_distillation, are combinations of two keys here:

{scripts}

`convert-command` turns a command line of theirs into the two files of a run. It runs nothing and needs no network:

```bash
simpletuner convert-command --output config/converted 'accelerate launch train_lcm_distill_lora_sd_wds.py
  --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 --resolution=512 --max_train_steps=1000
  --train_shards_path_or_url="https://example.org/shards/{{00000..00099}}.tar" --loss_type=huber'
```

Without `--output` the files are printed; `-` reads the command from the standard input, with the `export` lines before
it. A variable that is nowhere set becomes `{{env:NAME}}`, which is looked up when the run starts. A flag that is not in
the tables is an error, and so is one that asks for what is not built. A value that the scripts have by default, and
that is not the default here, is written into the files.

## Flags of the scripts

| Flag | Default there | Here | |
|---|---|---|---|
{flags}

Flags that a script takes and never reads act here, except `--scale_lr` of the SD 1.5 scripts: it would multiply a rate
that was chosen without it. `convert-command` names them: {ignored}.

## Flags of accelerate launch

| Flag | Here | |
|---|---|---|
{launch}
"""

_ONLY = {
    "all": "",
    "full": "full",
    "lora": "LoRA",
    "shards": "shards",
    "folder": "lora_sdxl.py",
    "sdxl shards": "SDXL, shards",
}


def render() -> str:
    """Returns the text of CONVERSION.md."""
    scripts = ["| Script | `model_family` | `model_type` | Data |", "|---|---|---|---|"]
    scripts += [
        f"| {name} | `{script.model_family}` | `{script.model_type}` | "
        f"{'WebDataset shards' if script.shards else 'a dataset of the hub, or a folder'} |"
        for name, script in SCRIPTS.items()
    ]
    flags = [_row(name, flag) for name, flag in FLAGS.items()]
    launch = [f"| `--{name}` | {_launch_target(flag)} | {flag.note} |" for name, flag in LAUNCH_FLAGS.items()]
    launch += [f"| `--{start}...` | refused | {reason} |" for start, reason in LAUNCH_GROUPS.items()]
    ignored = sorted({flag for script in SCRIPTS.values() for flag in script.ignored & flags_of(script).keys()})
    return _HEAD.format(
        scripts="\n".join(scripts),
        flags="\n".join(flags),
        ignored=", ".join(f"`--{name}`" for name in ignored),
        launch="\n".join(launch),
    )


def _row(name: str, flag: Flag) -> str:
    keys = [f"`{word}`" for word in flag.key.replace(" or ", ", ").split(", ") if word]
    here = ", ".join(keys) or ("checked" if flag.target == "by rule" else "nothing")
    if flag.target == "method":
        here = f"{here} in `distillation_config`"
    elif flag.target == "dataset" or flag.key in ("shards", "instance_data_dir", "crop_style"):
        here = f"{here} of the dataset"
    values = [script.defaults.get(name, flag.default) for script in SCRIPTS.values() if name in flags_of(script)]
    defaults = ", ".join(dict.fromkeys(map(_shown, values)))
    which = f" ({_ONLY[flag.only]})" if _ONLY[flag.only] else ""
    return f"| `--{name}`{which} | {defaults} | {here} | {flag.note} |"


def _shown(value: Json) -> str:
    return "-" if value is None or value is False else str(value) if isinstance(value, str) else json.dumps(value)


def _launch_target(flag: LaunchFlag) -> str:
    return f"`{flag.key}`" if flag.key else flag.target


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf8")
