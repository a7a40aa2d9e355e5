#!/usr/bin/env bash
# Runs gkd_jax on a Cloud TPU VM or on every host of a TPU pod slice.
#
#   TPU_NAME=my-tpu ZONE=us-west4-a bash launch/tpu_vm.sh \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/mnt/runs/wmt"' ...
#
# Copies the checkout to each host, installs it there and starts the run. MODEL_DIR must be a
# folder that all hosts share. Given again after a preemption it goes on from the last checkpoint.
# DRY_RUN=1 prints the commands and runs none. PROJECT names another project than gcloud's default.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
for name in TPU_NAME ZONE; do
  [ -n "${!name:-}" ] || missing+=("$name")
done
command -v gcloud >/dev/null || [ -n "${DRY_RUN:-}" ] || missing+=("gcloud (the Google Cloud CLI)")
[ $# -gt 0 ] || missing+=("arguments of gkd_jax.main, e.g. --gin_file=gin_configs/wmt_ende.gin")
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}" >&2
  exit 2
fi

run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where=(--zone="$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")
archive="$(mktemp -d)/gkd_jax.tar.gz"
git archive --format=tar.gz --output="$archive" HEAD

# Quoted once more for the shell of the host.
arguments="$(printf '%q ' "$@")"
run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:gkd_jax.tar.gz" "${where[@]}"
run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --command="
set -e
mkdir -p gkd_jax && tar -xzf gkd_jax.tar.gz -C gkd_jax && cd gkd_jax
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q -c requirements.txt '.[tpu,data]'
.venv/bin/python -m gkd_jax.main --multiprocess $arguments"
