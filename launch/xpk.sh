#!/usr/bin/env bash
# Runs gkd_jax on TPU slices of a GKE cluster made by XPK: see launch/README.md.
#
#   NAME=wmt CLUSTER=my-cluster TPU_TYPE=v5litepod-16 STORAGE=runs \
#   IMAGE=europe-docker.pkg.dev/my-project/my/gkd_jax bash launch/xpk.sh submit \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/mnt/runs/wmt"' ...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/kubernetes.sh

LAUNCHER=xpk
SETTINGS=(NAME CLUSTER PROJECT ZONE IMAGE TPU_TYPE SLICES SPOT STORAGE MAX_RESTARTS GRACE_SECONDS NAMESPACE LOCAL_MODEL_DIR)
read_command_line "$@"
need NAME CLUSTER
! is_starting || need IMAGE TPU_TYPE
need_program xpk "Google's Accelerated Processing Kit"
need_program kubectl "Kubernetes' command, with the cluster's credentials"
check_settings

where=(--cluster="$CLUSTER" ${PROJECT:+--project="$PROJECT"} ${ZONE:+--zone="$ZONE"})

# XPK writes the command into a shell script that is the container's command, in which Kubernetes
# expands variables: $$ gives a literal $. `exec` is needed because XPK passes SIGTERM to the process
# that it started, and not to its children.
command_line() {
  local command
  command="exec python -m gkd_jax.main --multiprocess$(printf ' %q' "${ARGUMENTS[@]}")"
  printf '%s' "${command//\$/\$\$}"
}

# A JobSet that has ended blocks a new one of the same name.
submit() {
  keep_command
  if [ -n "$DRY_RUN" ] || [ "$(jobset_state)" != ABSENT ]; then
    cancel
  fi
  run xpk workload create --workload="$NAME" "${where[@]}" --docker-image="$IMAGE" \
    --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" ${SPOT:+--spot} \
    ${STORAGE:+--storage="$STORAGE"} --max-restarts="${MAX_RESTARTS:-20}" \
    --restart-on-exit-codes="$SAVED" \
    --termination-grace-period-seconds="${GRACE_SECONDS:-120}" --command="$(command_line)"
}

status() { run xpk workload list "${where[@]}" --filter-by-job="$NAME"; }

# The pods receive SIGTERM and have GRACE_SECONDS to save.
cancel() { run xpk workload delete --workload="$NAME" "${where[@]}" --force; }

carry_out
