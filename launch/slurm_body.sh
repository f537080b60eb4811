#!/usr/bin/env bash
# What the slurm_*.sh scripts share: the settings of the site, its modules, then launch/slurm_run.py, which decides.
# The batch script turns into that program, so that SLURM's signals reach it.
set -euo pipefail
trap '' USR1 # a warning must not kill what is not ready for it; slurm_run looks at the clock as well
cd "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
export MM_ROOT=$PWD

site=${MM_SITE:-}
[[ -n $site || ! -e launch/site.env ]] || site=$PWD/launch/site.env
if [[ -n $site ]]; then
  [[ -r $site ]] || { echo "error: cannot read the site file $site (MM_SITE)" >&2; exit 2; }
  set -a
  # shellcheck disable=SC1090
  . "$site"
  set +a
fi

if [[ -n ${MM_MODULES:-} ]]; then
  set +u # not every site's modules are written for it
  # shellcheck disable=SC1091
  type module >/dev/null 2>&1 || . /etc/profile.d/modules.sh 2>/dev/null || true
  type module >/dev/null 2>&1 || { echo "error: MM_MODULES is set, and there is no module command here" >&2; exit 2; }
  # shellcheck disable=SC2086
  module load $MM_MODULES || { echo "error: cannot load the modules $MM_MODULES (MM_MODULES)" >&2; exit 2; }
  set -u
fi

# With a container the batch script itself runs outside of it.
if [[ -n ${MM_CONTAINER_IMAGE:-} ]]; then
  python=${MM_HOST_PYTHON:-python3}
else
  [[ -n ${MM_PYTHON:-} || ! -x .venv/bin/python ]] || export MM_PYTHON=$PWD/.venv/bin/python
  python=${MM_PYTHON:-python3}
fi
command -v "$python" >/dev/null || { echo "error: no Python at $python (MM_PYTHON, MM_HOST_PYTHON)" >&2; exit 2; }
exec "$python" -m launch.slurm_run "$@"
