#!/usr/bin/env bash
# The release of a run, as a SLURM job: words of mm_train.export.
#
#   sbatch launch/slurm_export.sh --checkpoint runs/s/qat --out runs/s/export --format int4
#SBATCH --job-name=export
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks=1
# shellcheck source=launch/slurm_task.sh
. "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_task.sh"
task -m mm_train.export "$@"
exit "$status"
