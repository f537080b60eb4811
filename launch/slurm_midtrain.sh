#!/usr/bin/env bash
# Stage 2, mid-training, as a SLURM job that restarts itself:
#
#   sbatch --nodes 2 launch/slurm_midtrain.sh run.dir=runs/s/midtrain parallel.expert_parallel=4
#
# YAML files and key=value as for mm_train.train; without files: configs/model/s.yaml and configs/stage/midtrain.yaml.
# Flags before the script overrule what follows. What the site wants is in launch/site.example.env.
#SBATCH --job-name=midtrain
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
body="${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_body.sh"
[ -r "$body" ] || { echo "error: no $body: run sbatch in the project's folder, or set MM_ROOT to it" >&2; exit 2; }
# shellcheck source=launch/slurm_body.sh
. "$body" midtrain "$@"
