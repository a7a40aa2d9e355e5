#!/usr/bin/env bash
# What takes hours, in an environment that tests/run.sh --all has made; each part by name, or all.
#   bash tests/long.sh [faults] [drill] [equal] [peers]
#     faults  every known fault is put in, and a test must notice it           about 20 minutes
#     drill   runs are killed KILLS times (200), and end as if undisturbed     about 2 hours
#     equal   one run on many layouts of devices and processes is the same run about 40 minutes
#     peers   speed beside TRL and Tunix, in environments of their own         about 1 hour
# Times are of two CPU cores that have nothing else to do. LONG_FOLDER keeps what is done: a part that
# was stopped goes on there.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "run bash tests/run.sh --all first: it makes .venv" >&2; exit 2; }
folder="${LONG_FOLDER:-runs/long}"
mkdir -p "$folder"

faults() { "$python" tests/faults/run.py; }
drill() { PYTHONPATH=.:tests "$python" tests/drills/drill.py --kills="${KILLS:-200}" --folder="$folder/drill"; }
equal() { PYTHONPATH=.:tests "$python" tests/drills/equal.py --folder="$folder/equal"; }
peers() { "$python" benchmarks/run.py --peers; }

parts=("$@")
[ $# -gt 0 ] || parts=(faults drill equal peers)
for part in "${parts[@]}"; do
  case "$part" in
    faults | drill | equal | peers) echo "== $part" && "$part" ;;
    *) echo "unknown part: $part" >&2 && exit 2 ;;
  esac
done
