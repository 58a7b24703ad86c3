#!/usr/bin/env bash
# Trains: bash train.sh [--config PATH] [--key value ...]. ENV=foo takes config/foo/config.json, no ENV config/config.json.
# The first start makes the environment (venv.sh). `exec` leaves one process, which gets the signals and gives the status.
set -euo pipefail

python=$(bash "$(dirname "${BASH_SOURCE[0]}")/venv.sh")
accelerate_defaults=${HF_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/huggingface}/accelerate/default_config

# Whoever may want more than one process is looked at by simpletuner/launch.py; everyone else starts without it.
if [ "${TRAINING_NUM_PROCESSES:-1}" != 1 ] || [ "${TRAINING_NUM_MACHINES:-1}" != 1 ] ||
    [ -n "${ACCELERATE_EXTRA_ARGS:-}" ] || [ -n "${ACCELERATE_CONFIG_PATH:-}" ] ||
    [ -f "$accelerate_defaults.yaml" ] || [ -f "$accelerate_defaults.json" ]; then
    exec "$python" -m simpletuner.launch train "$@"
fi
exec "$python" -m simpletuner train "$@"
