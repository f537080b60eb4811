#!/usr/bin/env bash
# A data set, prepared by the tasks of a SLURM array: words of data_prep.run.
#
#   sbatch --array=0-31 launch/slurm_data_prep.sh configs/data/pretrain.yaml
#
# Every task does its share of each step, and waits for the others between steps. A task that has waited long enough
# goes back into the queue, so that an array works with fewer nodes than tasks too. Task 0 publishes the data set.
#SBATCH --job-name=data-prep
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@60
# shellcheck source=launch/slurm_task.sh
. "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_task.sh"

MAX_WAITS=500 # times of ten minutes: more than the slowest task of a large preparation takes

# A task that fails leaves its name here for those that would wait for it; the folder is that of the log.
log=$(scontrol show job "$self" -o | sed -n 's/.* StdOut=\([^ ]*\).*/\1/p')
failed=$(dirname "${log:-.}")/failed-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}

task -m data_prep.run --rank "${SLURM_ARRAY_TASK_ID:-0}" --world "${SLURM_ARRAY_TASK_COUNT:-1}" \
  --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" "$@"
((status)) || exit 0
((cancelled)) || {
  ((!warned)) || again "$MAX_RESTARTS"
  if ((status == EX_TEMPFAIL)); then
    [[ ! -e $failed ]] || { echo "error: not waited for any longer: $(head -1 "$failed")" >&2; exit 1; }
    again "$MAX_WAITS"
  fi
}
echo "job $self failed with status $status, see $log" >>"$failed"
exit "$status"
