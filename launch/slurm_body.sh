#!/usr/bin/env bash
# What the slurm_*.sh scripts share: the settings of the site, its modules, then launch/slurm_run.py, which decides.
# The batch script turns into that program, so that SLURM's signals reach it.
set -euo pipefail
trap '' USR1 # a warning must not kill what is not ready for it; slurm_run looks at the clock as well
# shellcheck source=launch/slurm_site.sh
. "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}/launch/slurm_site.sh"

# Started again: on with the copy of the code that the first start made, whatever has become of this folder since.
if ((${SLURM_RESTART_COUNT:-0})); then
  copy=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* Comment=\(\S*\).*/\1/p')
  if [[ $copy == */code-$SLURM_JOB_ID && -d $copy ]]; then
    export PYTHONSAFEPATH=1 PYTHONPATH=$copy${PYTHONPATH:+:$PYTHONPATH}
  fi
fi

# With a container the batch script itself runs outside of it.
if [[ -n ${MM_CONTAINER_IMAGE:-} ]]; then
  python=${MM_HOST_PYTHON:-python3}
else
  python=${MM_PYTHON:-python3}
fi
command -v "$python" >/dev/null || { echo "error: no Python at $python (MM_PYTHON, MM_HOST_PYTHON)" >&2; exit 2; }
exec "$python" -m launch.slurm_run "$@"
