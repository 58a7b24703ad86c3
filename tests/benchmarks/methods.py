"""How settings move the quickstart's result for one and the same work: about three minutes of one CPU core.

Usage:

    python -m tests.benchmarks.methods [--jobs 2] [--only NAME ...]

Each row changes what its name says in ``config/examples/quickstart`` and trains on one thread. Writes Markdown to
output/methods/table.md; finished rows are not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simpletuner.evaluation.scores import Row
from simpletuner.quickstart import config_path, prepare

OUTPUT = Path("output/methods")
NUM_PROMPTS = 256
NUM_STEPS = 400
"""Where a step is the usual work: batch 32, of which the teacher sees each sample twice."""
STEPS = (1, 2, 4, 8)


def lcm(**changes: Any) -> dict[str, Any]:  # Any: JSON
    """Returns the override of the quickstart's own method options by changes."""
    own = json.loads(config_path().read_text(encoding="utf8"))["distillation_config"]["lcm"]
    return {"distillation_config": json.dumps(own | changes)}


def variants() -> dict[str, dict[str, Any]]:
    """Returns name -> overrides of the quickstart's config, of 400 steps at a constant rate of 3e-4."""
    # A full model is told w, as guidance_scale - 1.
    full = {"model_type": "full", "learning_rate": 1e-4, "validation_guidance": 3.0}
    return {
        "reference": {},
        "N 5": lcm(num_ddim_timesteps=5),
        "N 20": lcm(num_ddim_timesteps=20),
        "N 50": lcm(num_ddim_timesteps=50),
        "w 1": lcm(w_min=1.0, w_max=1.0),
        "w 4": lcm(w_min=4.0, w_max=4.0),
        "w from 1 to 6": lcm(w_min=1.0, w_max=6.0),
        "rate 1e-4": {"learning_rate": 1e-4},
        "rate 1e-3": {"learning_rate": 1e-3},
        "rate 1e-3, cosine": {"learning_rate": 1e-3, "lr_scheduler": "cosine"},
        "N 20, w 4, rate 1e-3, cosine": lcm(num_ddim_timesteps=20, w_min=4.0, w_max=4.0)
        | {"learning_rate": 1e-3, "lr_scheduler": "cosine"},
        "batch 16, 800 steps": {"train_batch_size": 16, "max_train_steps": 2 * NUM_STEPS},
        "batch 64, 200 steps": {"train_batch_size": 64, "max_train_steps": NUM_STEPS // 2},
        "l2": lcm(loss_type="l2"),
        "cauchy": lcm(loss_type="cauchy"),
        "rank 8": {"lora_rank": 8},
        "rank 128": {"lora_rank": 128},
        # One teacher evaluation more, of two: 8 forwards' worth in place of 6.
        "dpm2s, 300 steps": lcm(solver="dpm2s") | {"max_train_steps": 3 * NUM_STEPS // 4},
        "2 phases (PCM)": lcm(edge_policy="phased", num_phases=2),
        "random edges (TCD)": lcm(edge_policy="random"),
        "full, target 0.95": full | lcm(ema_decay=0.95),
        "full, target 0.95, average": full | lcm(ema_decay=0.95) | {"export_weights": "ema"},
        "full, target 0": full | lcm(ema_decay=0.0),
        # A step takes six times as long on this CPU.
        "bf16, 70 steps": {"mixed_precision": "bf16", "max_train_steps": 70},
    }


def main() -> None:
    """Trains and judges the rows, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="rows that train side by side, on one thread each")
    parser.add_argument("--only", nargs="*", help="names of rows")
    arguments = parser.parse_args()
    prepare()
    chosen = {name: changes for name, changes in variants().items() if arguments.only is None or name in arguments.only}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        lines = list(pool.map(lambda item: measure(*item), chosen.items()))
    heads = "".join(f" {each} step{'s'[: each > 1]} |" for each in STEPS)
    table = [f"| |{heads} Frechet, 4 steps |", f"|---|{'---:|' * (len(STEPS) + 1)}", *lines]
    (OUTPUT / "table.md").write_text("\n".join(table) + "\n", encoding="utf8")
    print(*table, sep="\n")


def measure(name: str, changes: Mapping[str, Any]) -> str:
    """Returns the table's line of a row."""
    folder = OUTPUT / "".join(each if each.isalnum() else "-" for each in name)
    if not (folder / "evaluation" / "evaluation.json").is_file():
        train(folder, changes)
    document = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf8"))
    found = {row["num_inference_steps"]: Row.from_json(row) for row in document["student"]}
    cells = " | ".join(f"{100 * found[steps].accuracy:.0f}" if steps in found else "" for steps in STEPS)
    line = f"| {name} | {cells} | {found[4].distance:.2f} |"
    print(line, flush=True)
    return line


def train(folder: Path, changes: Mapping[str, Any]) -> None:
    """Runs the quickstart's config with changes on one thread, and evaluates it."""
    settings: dict[str, Any] = {
        "learning_rate": 3e-4,
        "lr_scheduler": "constant_with_warmup",
        "max_train_steps": NUM_STEPS,
        "validation_disable": True,
        "checkpoint_step_interval": 0,
        "evaluation_prompts": 0,
        "output_dir": folder,
        **changes,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "simpletuner", "train", "--config", str(config_path()), *words]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w", encoding="utf8") as log:
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environ)
        command[3:4] = ["evaluate", "--prompts", str(NUM_PROMPTS)]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environ)


if __name__ == "__main__":
    main()
