#!/usr/bin/env bash
# Runs gkd_jax on TPU slices of GKE, as a JobSet, by kubectl: see launch/README.md.
#
#   NAME=wmt IMAGE=europe-docker.pkg.dev/my-project/my/gkd_jax TPU=tpu-v5-lite-podslice \
#   TOPOLOGY=4x4 HOSTS=4 CHIPS=4 CLAIM=runs MOUNT=/mnt/runs bash launch/jobset.sh submit \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/mnt/runs/wmt"' ...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/kubernetes.sh

LAUNCHER=jobset
SETTINGS=(NAME NAMESPACE IMAGE TPU TOPOLOGY HOSTS CHIPS SLICES SPOT CLAIM MOUNT MAX_RESTARTS GRACE_SECONDS LOCAL_MODEL_DIR)
read_command_line "$@"
need NAME
! is_starting || need IMAGE TPU TOPOLOGY HOSTS CHIPS
[ -z "${CLAIM:-}" ] || need MOUNT
need_program kubectl "Kubernetes' command, with the cluster's credentials"
check_settings
export "${SETTINGS[@]}"

# A JobSet that has ended blocks a new one of the same name.
submit() {
  local text
  text="$(python3 launch/jobset.py "${ARGUMENTS[@]}")"
  keep_command
  keep_as jobset.json <<<"$text"
  run kubectl --namespace="${NAMESPACE:-default}" delete jobset "$NAME" --ignore-not-found --cascade=foreground
  run kubectl --namespace="${NAMESPACE:-default}" create --filename="$KEPT/jobset.json"
}

status() {
  run kubectl --namespace="${NAMESPACE:-default}" get jobset "$NAME"
  run kubectl --namespace="${NAMESPACE:-default}" get pods --output=wide \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
}

# The pods receive SIGTERM and have GRACE_SECONDS to save.
cancel() {
  run kubectl --namespace="${NAMESPACE:-default}" delete jobset "$NAME" --cascade=foreground
}

carry_out
