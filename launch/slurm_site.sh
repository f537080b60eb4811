#!/usr/bin/env bash
# The settings of the site for a batch script: goes to the project's folder, reads the site file, loads modules, finds
# Python. Afterwards MM_ROOT is the folder, and MM_PYTHON the interpreter (inside the container, where there is one).
cd "${MM_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit
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

# In a container the interpreter is the one there.
[[ -n ${MM_CONTAINER_IMAGE:-} || -n ${MM_PYTHON:-} || ! -x .venv/bin/python ]] || export MM_PYTHON=$PWD/.venv/bin/python
