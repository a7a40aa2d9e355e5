# shellcheck shell=bash
# Functions that the launchers share and source. launch/README.md describes their use.
#
# A launcher sets LAUNCHER, NAME and SETTINGS, and defines:
#   submit        starts the run
#   is_going_on   whether a run of this name has been started and has not ended
#   wait_for_end  waits for its end, and sets STATUS: 0, $SAVED (to be restarted), or a fault
#   status, logs, cancel

# The exit status of a process that saved and ended: EXIT_STATUS of gkd_jax/training/interruption.py.
SAVED=75
# The exit status of a process that JAX aborts because another one of its run is lost.
# shellcheck disable=SC2034 # Some launchers ask for it.
LEFT_ALONE=134

SUBCOMMAND="" DRY_RUN="" ARGUMENTS=() MODEL_DIR="" STATUS="" LAST=0 DONE="" missing=()

say() { printf '%s\n' "$*" >&2; }

read_command_line() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry_run) DRY_RUN=1 ;;
      submit | status | logs | cancel | resume)
        [ -z "$SUBCOMMAND" ] || break
        SUBCOMMAND="$1"
        ;;
      *) break ;;
    esac
    shift
  done
  ARGUMENTS=("$@")
  if [ -z "$SUBCOMMAND" ]; then
    say "usage: SETTING=... bash $0 submit|status|logs|cancel|resume [--dry_run] [arguments of gkd_jax.main]"
    exit 2
  fi
}

# Records the required settings that are unset.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || missing+=("$name")
  done
}

# Records a program that is not installed; a dry run does not need it.
need_program() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null || missing+=("$1 ($2)")
}

is_starting() { [ "$SUBCOMMAND" = submit ] || [ "$SUBCOMMAND" = resume ]; }

# Call it after all checks: reads MODEL_DIR, and exits with a list of everything that is missing.
check_settings() {
  if is_starting; then
    [ ${#ARGUMENTS[@]} -gt 0 ] ||
      missing+=("arguments of gkd_jax.main, e.g. --gin_file=gin_configs/wmt_ende.gin")
    MODEL_DIR="$(text_of MODEL_DIR)"
    case "$MODEL_DIR" in
      /* | gs://*) ;;
      *)
        missing+=("--gin.MODEL_DIR='\"/...\"', a folder that all hosts share, or '\"gs://...\"'; got ${MODEL_DIR:-none}")
        ;;
    esac
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 2
  fi
  HERE_MODEL_DIR="${LOCAL_MODEL_DIR:-$MODEL_DIR}"
  # shellcheck disable=SC2153 # The launcher sets it.
  OF_NAME="$PWD/runs/launch/$LAUNCHER-$NAME"
  CANCELLED="$OF_NAME/cancelled"
  # In the run's folder if this machine sees it. Without LOCAL_MODEL_DIR a folder of that name is
  # only taken for the run's if its parent exists.
  if ! is_starting; then
    KEPT="$(cat "$OF_NAME/kept" 2>/dev/null || echo "$OF_NAME")"
  elif [ -n "${LOCAL_MODEL_DIR:-}" ] || [ -w "$(dirname "$MODEL_DIR")" ]; then
    KEPT="$HERE_MODEL_DIR/launch"
  else
    KEPT="$OF_NAME"
  fi
}

# Prints the value of the last --gin.$1='"value"', without its quotes.
text_of() {
  python3 - "$1" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} <<'PYTHON'
import ast, sys

start = f"--gin.{sys.argv[1]}="
values = [one.removeprefix(start) for one in sys.argv[2:] if one.startswith(start)]
try:
    print(ast.literal_eval(values[-1].strip()) if values else "")
except (SyntaxError, ValueError):
    print("")
PYTHON
}

# Runs a command; a dry run prints it, quoted for a shell.
run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Writes standard input to a file of the launch record; a dry run prints it.
keep_as() {
  if [ -n "$DRY_RUN" ]; then
    say "would be written to $KEPT/$1:"
    cat
  else
    mkdir -p "$KEPT"
    cat >"$KEPT/$1"
  fi
}

# Appends the current command, with its settings, to the launch record.
keep_command() {
  local name
  [ -z "$DRY_RUN" ] || return 0
  mkdir -p "$KEPT" "$OF_NAME"
  # `logs` finds it there without the run's arguments.
  echo "$KEPT" >"$OF_NAME/kept"
  {
    echo "# $(date -u +%Y-%m-%dT%H:%M:%SZ), gkd_jax $(revision)"
    for name in "${SETTINGS[@]}"; do
      [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
    done
    printf 'bash launch/%s.sh submit' "$LAUNCHER"
    printf ' %q' "${ARGUMENTS[@]}"
    echo
  } >>"$KEPT/commands.sh"
  say "kept: $KEPT/commands.sh"
}

revision() {
  git describe --always --dirty 2>/dev/null || echo "of no repository"
}

# Sets LAST and DONE from the checkpoints. The present --gin.TRAIN_STEPS takes precedence over the one
# that the run was started with.
read_progress() {
  local answer steps
  steps="$(text_of TRAIN_STEPS)"
  answer="$(python3 -m gkd_jax.checkpoints.last_step "$HERE_MODEL_DIR" ${steps:+--train_steps="$steps"})" || exit
  [[ $answer =~ \"last_step\":\ ([0-9]+) ]] && LAST="${BASH_REMATCH[1]}"
  DONE=""
  [[ $answer != *'"done": true'* ]] || DONE=1
}

pause() { sleep "${POLL_SECONDS:-60}"; }

# Exits if it is unknown whether the run is active, since a second one beside it would do harm.
no_answer() {
  say "$1 does not answer: nothing is started"
  exit 1
}

# Counts consecutive status checks without an answer; false after too many.
unanswered=0
bear_silence() {
  unanswered=$((unanswered + 1))
  [ "$unanswered" -lt 10 ] || { say "no answer for $unanswered times: given up" && return 1; }
}

# Restarts the run until it is done. Each attempt must save a later step than those before it.
resume() {
  local try before tries="${MAX_TRIES:-20}"
  if [[ $HERE_MODEL_DIR != gs://* && ! -d $HERE_MODEL_DIR && ! -w $(dirname "$HERE_MODEL_DIR") ]]; then
    say "resume reads the last step from $HERE_MODEL_DIR, which this machine does not see. Mount" \
      "the shared folder, and set LOCAL_MODEL_DIR to where it is."
    return 2
  fi
  [ -n "$DRY_RUN" ] || rm -f "$CANCELLED"
  for ((try = 1; try <= tries; try++)); do
    read_progress
    if [ -n "$DONE" ]; then
      say "done: step $LAST is saved in $HERE_MODEL_DIR"
      return 0
    fi
    before="$LAST"
    say "try $try of at most $tries, after step $before"
    if [ -n "$DRY_RUN" ]; then
      submit
      say "would then wait, and do this again while the run ends with status $SAVED or is taken" \
        "away, has saved a later step, and is not done"
      return 0
    fi
    if [ "$try" -eq 1 ] && is_going_on; then
      say "it is going on already: not started again"
    else
      submit
    fi
    wait_for_end
    [ "$STATUS" != 0 ] || { say "done: the run ended with status 0" && return 0; }
    [ ! -e "$CANCELLED" ] || { say "cancelled: not started again" && return 1; }
    if [ "$STATUS" != "$SAVED" ]; then
      say "the run ended with status $STATUS, which is a fault: not started again. See its logs:" \
        "bash launch/$LAUNCHER.sh logs"
      return "$STATUS"
    fi
    read_progress
    if [ -z "$DONE" ] && [ "$LAST" -le "$before" ]; then
      say "stopped: the try saved nothing after step $before, and another would do no better." \
        "Lower CHECKPOINT_PERIOD, or see its logs: bash launch/$LAUNCHER.sh logs"
      return 1
    fi
  done
  say "stopped after $tries tries, at step $LAST. Give the same command again to go on (MAX_TRIES)."
  return 1
}

# Executes the subcommand. `cancel` first stops an active `resume`.
carry_out() {
  if [ "$SUBCOMMAND" = submit ] && [ -z "$DRY_RUN" ] && is_going_on; then
    say "a run named $NAME is going on: cancel it first, or give resume to wait for it"
    exit 1
  fi
  if [ "$SUBCOMMAND" = cancel ] && [ -z "$DRY_RUN" ]; then
    mkdir -p "$OF_NAME"
    touch "$CANCELLED"
  fi
  "$SUBCOMMAND"
}
