#!/usr/bin/env bash
# The runs of a sweep, shared out to the tasks of a SLURM array: words of mm_train.scaling_law sweep.
#
#   sbatch --array=0-7 --gpus-per-node=1 launch/slurm_sweep.sh configs/sweep/ablation.yaml
#   sbatch launch/slurm_sweep.sh configs/sweep/ablation.yaml --collect
#
# At the time limit the run under way writes a checkpoint, and the task goes back into the queue.
#SBATCH --job-name=sweep
#SBATCH --output=slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@300
# shellcheck source=launch/slurm_task.sh
. "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_task.sh"

task -m mm_train.scaling_law sweep --rank "${SLURM_ARRAY_TASK_ID:-0}" --world "${SLURM_ARRAY_TASK_COUNT:-1}" "$@"
((!warned || cancelled || !status)) || again "$MAX_RESTARTS"
exit "$status"
