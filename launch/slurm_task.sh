#!/usr/bin/env bash
# What the scripts of small jobs share (export, data preparation, sweeps): one process in the site's environment.
#
#   . slurm_task.sh; task python -m MODULE WORDS...
#
# Near the time limit (USR1) the process is told and the job requeued: what is done stays, and the same command goes on.
# After TERM, a person's scancel, nothing is requeued.
set -euo pipefail
trap '' USR1 # a warning must not kill what is not ready for it
# shellcheck source=launch/slurm_site.sh
. "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_site.sh"

export TQDM_MININTERVAL=${TQDM_MININTERVAL:-60} # progress bars: a log is no terminal
# shellcheck disable=SC2034 # for the scripts
EX_TEMPFAIL=75 # of a process that stopped with its work saved, or has to wait for others
# shellcheck disable=SC2034
MAX_RESTARTS=${MM_MAX_RESTARTS:-20}
# This job for scontrol. Of an array one task has the id of the whole array, which would name all of them.
self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
self=${self:-${SLURM_JOB_ID:?this runs inside a SLURM job}}

# task WORDS...: python's words, as "-m MODULE ...". Sets `status`, and `warned` and `cancelled` to 1 by signals.
task() {
  local start=() child
  [[ -n ${MM_CONTAINER_IMAGE:-} ]] &&
    start=(srun --ntasks=1 --container-image="$MM_CONTAINER_IMAGE" --container-workdir="$MM_ROOT"
      --container-mounts="$MM_ROOT:$MM_ROOT${MM_CONTAINER_MOUNTS:+,$MM_CONTAINER_MOUNTS}")
  if [[ -z ${MM_CONTAINER_IMAGE:-} ]] && ! command -v "${MM_PYTHON:-python3}" >/dev/null; then
    echo "error: no Python at ${MM_PYTHON:-python3} (MM_PYTHON)" >&2
    exit 2
  fi
  # shellcheck disable=SC2034
  warned=0 cancelled=0 status=0
  echo "$(date +%FT%T) job $self on $(hostname), start ${SLURM_RESTART_COUNT:-0}: ${*:1:12}"
  "${start[@]}" "${MM_PYTHON:-python3}" "$@" &
  child=$!
  trap 'warned=1; kill -USR1 $child 2>/dev/null || true' USR1
  trap 'cancelled=1; kill -TERM $child 2>/dev/null || true' TERM
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends `wait`, not the process
  wait "$child" || status=$?
  trap '' USR1
  trap - TERM
  echo "$(date +%FT%T) ended with status $status"
}

# again LIMIT: put this job back into the queue, unless it has been there LIMIT times
again() {
  if ((${SLURM_RESTART_COUNT:-0} >= $1)); then
    echo "error: started ${SLURM_RESTART_COUNT} times more already; not again (the same submission goes on)" >&2
    exit 1
  fi
  scontrol requeue "$self"
  sleep 60 # SLURM ends this script
  exit 1
}
