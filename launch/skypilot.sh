#!/usr/bin/env bash
# Runs gkd_jax as a managed job of SkyPilot, which restarts it after the preemption of a spot machine:
# see launch/README.md.
#
#   NAME=wmt ACCELERATORS=tpu-v6e-8 SPOT=1 INFRA=gcp BUCKET=gs://my-runs MOUNT=/mnt/runs \
#   bash launch/skypilot.sh submit \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/mnt/runs/wmt"' ...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

LAUNCHER=skypilot
SETTINGS=(NAME ACCELERATORS NODES SPOT INFRA RUNTIME_VERSION BUCKET MOUNT EXTRAS LOCAL_MODEL_DIR)
read_command_line "$@"
need NAME
! is_starting || need ACCELERATORS
[ -z "${BUCKET:-}" ] || need MOUNT
need_program sky "SkyPilot"
check_settings
export "${SETTINGS[@]}"

submit() {
  local text
  text="$(python3 launch/sky_task.py "${ARGUMENTS[@]}")"
  keep_command
  keep_as sky_task.json <<<"$text"
  run sky jobs launch --name="$NAME" --yes --detach-run "$KEPT/sky_task.json"
}

status() { run sky jobs queue --skip-finished; }

logs() { run sky jobs logs --name="$NAME"; }

cancel() { run sky jobs cancel --name="$NAME" --yes; }

is_going_on() {
  local answer
  answer="$(sky jobs queue --skip-finished --verbose)" || no_answer sky
  grep -qE "(^|[[:space:]])$NAME([[:space:]]|\$)" <<<"$answer"
}

# The log ends with the job, with one of SkyPilot's exit statuses. If the job failed, SkyPilot did not
# consider it preempted or saved.
wait_for_end() {
  local ended
  unanswered=0
  while :; do
    pause
    ended=0
    sky jobs logs --name="$NAME" >&2 || ended=$?
    case "$ended" in
      0) STATUS=0 && return ;;
      100 | 102 | 103) STATUS="$ended" && return ;;  # Failed, not found, cancelled.
      101) unanswered=0 ;;                           # Not finished: the connection ended.
      *) bear_silence || { STATUS="$ended" && return; } ;;
    esac
  done
}

carry_out
