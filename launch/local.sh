#!/usr/bin/env bash
# Train on N processes of this machine (one per GPU, or on CPU cores):
#
#   launch/local.sh 2 configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml run.dir=runs/try parallel.expert_parallel=2
#
# What torchrun --standalone does, without its own start-up time and without a traceback behind a clear error; SIGTERM
# and SIGUSR1 let the run write a checkpoint and leave. The rest is in local.py: a shell cannot say who failed first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m launch.local "$@"
