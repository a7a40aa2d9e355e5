#!/usr/bin/env bash
# Runs gkd_jax under Slurm, with one process per GPU or per CPU node: see launch/README.md.
#
#   NAME=wmt NODES=2 GPUS_PER_NODE=8 TIME=8:00:00 bash launch/slurm.sh resume \
#     --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"/shared/runs/wmt"' ...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

LAUNCHER=slurm
SETTINGS=(NAME NODES GPUS_PER_NODE CPUS_PER_TASK TIME OPTIONS PYTHON LOCAL_MODEL_DIR)
read_command_line "$@"
need NAME
! is_starting || need NODES TIME
need_program sbatch "Slurm"
check_settings

JOB=""

submit() {
  local options=()
  # Further options of a site, such as --qos=long, separated by spaces.
  read -r -a options <<<"${OPTIONS:-}"
  keep_command
  # JAX uses one GPU per task, selected by the task's number on its node. All tasks of a node must
  # therefore see all of its GPUs, which are requested per node. Without B: the signal before the
  # time limit goes to the tasks, not to the shell that starts them.
  JOB="$(run sbatch --parsable --job-name="$NAME" --nodes="$NODES" \
    --ntasks-per-node="${GPUS_PER_NODE:-1}" ${GPUS_PER_NODE:+--gpus-per-node="$GPUS_PER_NODE"} \
    ${CPUS_PER_TASK:+--cpus-per-task="$CPUS_PER_TASK"} --time="$TIME" --signal=TERM@120 --requeue \
    --open-mode=append --output="$KEPT/slurm-%j.log" --chdir="$PWD" \
    ${options[@]+"${options[@]}"} \
    launch/slurm_job.sh "${PYTHON:-$PWD/.venv/bin/python}" "$KEPT" "${ARGUMENTS[@]}")"
  if [ -n "$DRY_RUN" ]; then
    echo "$JOB"
  else
    # The name of a federation may follow.
    JOB="${JOB%%;*}"
    say "submitted: job $JOB, its log: $KEPT/slurm-$JOB.log"
  fi
}

# Prints the ids of pending and running jobs of this name.
jobs_now() { squeue --noheader --me --name="$NAME" --format=%i; }

status() { run squeue --me --name="$NAME"; }

# Prints the path of the log of the last job that has one.
logs() {
  local log
  if [ -n "$DRY_RUN" ]; then
    run tail -n 100 -F "$KEPT/slurm-JOB.log"
    return
  fi
  log="$(find "$KEPT" -name 'slurm-*.log' 2>/dev/null | sort -V | tail -n 1)"
  [ -n "$log" ] || { say "there is no log in $KEPT yet" && return 1; }
  run tail -n 100 -F "$log"
}

# Sends SIGTERM to the tasks only: the run saves and ends. A pending job is cancelled.
cancel() {
  run scancel --me --name="$NAME" --state=PENDING
  run scancel --me --name="$NAME" --signal=TERM
}

is_going_on() {
  local answer
  answer="$(jobs_now)" || no_answer squeue
  JOB="${answer%%$'\n'*}"
  [ -n "$JOB" ]
}

# The job's shell records its exit status. A job that ended without a record was killed, with its node
# or at its time limit, and was not requeued by Slurm.
wait_for_end() {
  local answer
  unanswered=0
  while :; do
    pause
    if answer="$(jobs_now)"; then
      unanswered=0
      [[ $'\n'$answer$'\n' == *$'\n'"$JOB"$'\n'* ]] || break
    else
      bear_silence || { STATUS=1 && return; }
    fi
  done
  STATUS="$(cat "$KEPT/slurm-$JOB.status" 2>/dev/null || echo "$SAVED")"
}

carry_out
