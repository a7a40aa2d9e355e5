#!/usr/bin/env bash
# Runs gkd_jax on a Cloud TPU VM or on every host of a TPU pod slice: see launch/README.md.
#
#   TPU_NAME=my-tpu ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 \
#   RUNTIME_VERSION=v2-alpha-tpuv5-lite SPOT=1 QUEUED=1 bash launch/tpu_vm.sh resume \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/mnt/runs/wmt"' ...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

LAUNCHER=tpu_vm
SETTINGS=(TPU_NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION QUEUED SPOT SETUP HOST_PYTHON EXTRAS LOCAL_MODEL_DIR)
read_command_line "$@"
need TPU_NAME ZONE
[ -z "${ACCELERATOR_TYPE:-}" ] || need RUNTIME_VERSION
NAME="${TPU_NAME:-}"
need_program gcloud "the Google Cloud CLI"
check_settings

# shellcheck disable=SC2153 # It is there: need.
zone=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
kind=tpu-vm
[ -z "${QUEUED:-}" ] || kind=queued-resources

# Prints the state of the VM or its queued resource. If the query fails, it does not count as deleted.
state() {
  local answer format=state
  [ -z "${QUEUED:-}" ] || format=state.state
  if answer="$(gcloud compute tpus "$kind" describe "$TPU_NAME" "${zone[@]}" --format="value($format)" 2>&1)"; then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

create() {
  local software=(--version="$RUNTIME_VERSION")
  [ -z "${QUEUED:-}" ] || software=(--runtime-version="$RUNTIME_VERSION" --node-id="$TPU_NAME")
  run gcloud compute tpus "$kind" create "$TPU_NAME" "${zone[@]}" "${software[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" ${SPOT:+--spot}
}

delete() {
  run gcloud compute tpus "$kind" delete "$TPU_NAME" "${zone[@]}" ${QUEUED:+--force} --quiet
}

# Waits until the TPU is ready; creates it, or creates it again, if this launcher may.
ensure_tpu() {
  local now told="" made=0
  if [ -n "$DRY_RUN" ]; then
    [ -z "${ACCELERATOR_TYPE:-}" ] || create
    return
  fi
  while :; do
    now="$(state)"
    case "$now" in
      READY | ACTIVE) return ;;
      ABSENT | PREEMPTED | SUSPENDED | FAILED | TERMINATED)
        if [ -z "${ACCELERATOR_TYPE:-}" ] || [ "$made" -ge "${MAX_TRIES:-20}" ]; then
          say "$TPU_NAME is $now after $made creations. Set ACCELERATOR_TYPE and RUNTIME_VERSION" \
            "to have it made, or MAX_TRIES for more of them."
          exit 1
        fi
        [ "$now" = ABSENT ] || delete
        create
        made=$((made + 1))
        ;;
      UNKNOWN)
        bear_silence || exit 1
        pause
        ;;
      *)
        unanswered=0
        [ "$now" = "$told" ] || say "$TPU_NAME: $now"
        told="$now"
        pause
        ;;
    esac
  done
}

# Runs a shell command on every host, or on a given one.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${zone[@]}" --worker="${2:-all}" --command="$1"
}

submit() {
  local archive="$OF_NAME/gkd_jax.tar.gz" arguments
  [ -n "$DRY_RUN" ] || git diff --quiet HEAD || say "note: what is not committed is not sent"
  ensure_tpu
  keep_command
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:gkd_jax.tar.gz" "${zone[@]}" --worker=all
  # Quoted again for the shell of the host.
  arguments="$(printf ' %q' "${ARGUMENTS[@]}")"
  on_hosts "set -e
mkdir -p gkd_jax && tar -xzf gkd_jax.tar.gz -C gkd_jax && cd gkd_jax
${SETUP:-}
[ -x .venv/bin/python ] || ${HOST_PYTHON:-python3} -m venv .venv
.venv/bin/pip install -q -c requirements.txt '.[tpu,${EXTRAS:-data,bucket}]'
bash launch/tpu_host.sh start --multiprocess$arguments"
}

ask_hosts() { on_hosts "cd gkd_jax && bash launch/tpu_host.sh $1"; }

status() {
  run gcloud compute tpus "$kind" describe "$TPU_NAME" "${zone[@]}"
  ask_hosts status
}

logs() {
  on_hosts "tail -n 100 -F gkd_jax/gkd_jax.log" "${WORKER:-0}"
}

# Prints the state of each host's process, e.g. "running 75"; nothing if the hosts do not answer.
answers() { ask_hosts status 2>/dev/null | sed -n 's/^gkd_jax: //p' | tr '\n' ' ' || true; }

# Sends SIGTERM: the run saves and ends. A TPU that was created here is then deleted.
cancel() {
  local waited
  ask_hosts stop || [ -n "${ACCELERATOR_TYPE:-}" ]
  [ -n "${ACCELERATOR_TYPE:-}" ] || return 0
  for ((waited = 0; waited < 10; waited++)); do
    [ -z "$DRY_RUN" ] && [[ $(answers) == *running* ]] || break
    pause
  done
  delete
}

is_going_on() {
  case "$(state)" in
    READY | ACTIVE) [[ $(answers) == *running* ]] ;;
    UNKNOWN) no_answer gcloud ;;
    *) false ;;
  esac
}

# A preemption may be visible in the processes before it is in the state, so that a fault only counts
# if the TPU still exists after a pause.
wait_for_end() {
  local one told="" fault=""
  unanswered=0
  while :; do
    pause
    case "$(state)" in
      ABSENT | PREEMPTED | SUSPENDED | FAILED | TERMINATED) STATUS="$SAVED" && return ;;
      READY | ACTIVE) ;;
      UNKNOWN)
        bear_silence || { STATUS=1 && return; }
        continue
        ;;
      *) continue ;;
    esac
    if [ -n "$fault" ]; then
      ask_hosts stop || true
      STATUS="$fault" && return
    fi
    told="$(answers)"
    if [ -z "$told" ]; then
      bear_silence || { STATUS=1 && return; }
      continue
    fi
    unanswered=0
    STATUS=0
    for one in $told; do
      case "$one" in
        0 | running) ;;
        "$SAVED" | "$LEFT_ALONE" | lost) STATUS="$SAVED" ;;
        *) fault="$one" ;;
      esac
    done
    if [[ $told == *lost* ]]; then
      # The others wait for a process that no longer exists.
      ask_hosts stop || true
      return
    fi
    [ -n "$fault" ] || [[ $told == *running* ]] || return 0
  done
}

carry_out
