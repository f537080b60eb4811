#!/usr/bin/env bash
# Train on N processes of this machine (one per GPU, or on CPU cores):
#
#   launch/local.sh 2 configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml run.dir=runs/try parallel.expert_parallel=2
#
# What torchrun --standalone does, without its own start-up time and without a traceback behind a clear error. The first
# process that fails ends the others, and its exit status is this script's.
set -euo pipefail

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUM_PROCESSES FILE.yaml ... key=value ..." >&2
  exit 2
fi
num_processes=$1
shift
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3

export WORLD_SIZE=$num_processes MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_PORT=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT INT TERM
for ((rank = 0; rank < num_processes; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$python" -m mm_train.train "$@" &
done
for ((rank = 0; rank < num_processes; rank++)); do
  wait -n
done
