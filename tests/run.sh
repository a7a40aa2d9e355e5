#!/usr/bin/env bash
# Makes an environment of its own in .venv, checks the code and runs the tests.
#   bash tests/run.sh        the fast tests: some minutes
#   bash tests/run.sh --all  all of them, and comparisons with transformers, which it then installs:
#                            half an hour
#   bash tests/long.sh       drills, faults, layouts, peers: hours; needs the environment of --all
# It needs Python 3.11 or newer (PYTHON=python3.12 names another one). Tests on external data run
# where GKD_JAX_DATA names its folder, and say that they were skipped elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=(-m "not slow")
requirements=requirements-dev.txt
if [ "${1:-}" = "--all" ]; then
  tier=()
  requirements=requirements-parity.txt
elif [ $# -gt 0 ]; then
  echo "unknown argument: $1 (only --all is known)" >&2
  exit 2
fi

python=.venv/bin/python
if ! [ -x "$python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON")'
  "${PYTHON:-python3}" -m venv .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip install --quiet -r "$requirements"
"$python" -m pip install --quiet --no-deps -e .

"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
# Modules side by side: what one compiles occupies one core. Where one crashes xdist would hang.
"$python" -m pytest ${tier[@]+"${tier[@]}"} --durations=15 \
  --numprocesses=auto --maxprocesses=4 --dist=loadfile --max-worker-restart=0
