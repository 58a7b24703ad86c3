#!/usr/bin/env bash
# From nothing to the quickstart's teacher in output/teacher/model: bash config/examples/teacher/reproduce.sh
# Stopped, it goes on where it was when it is started again.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=$(bash venv.sh)
here=config/examples/teacher

# The steps are short: what takes time is memory that is given back and asked for again, and, where others use the
# machine too, threads that wait for each other at full speed.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 OMP_WAIT_POLICY=passive

"$python" $here/make_start.py
"$python" -m simpletuner train --config $here
"$python" $here/assemble.py
