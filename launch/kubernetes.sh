# shellcheck shell=bash
# Functions that the launchers on GKE share: both create the JobSet NAME in NAMESPACE. They source this
# after common.sh.

kubectl_here() { kubectl --namespace="${NAMESPACE:-default}" "$@"; }

# Prints how the JobSet ended: Completed, Failed, nothing while active; ABSENT; UNKNOWN without answer.
jobset_state() {
  local answer
  if answer="$(kubectl_here get jobset "$NAME" --output='jsonpath={.status.terminalState}' 2>&1)"; then
    echo "$answer"
  elif [[ $answer == *NotFound* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

is_going_on() {
  local now
  now="$(jobset_state)"
  [ "$now" != UNKNOWN ] || no_answer kubectl
  [ -z "$now" ]
}

logs() {
  run kubectl --namespace="${NAMESPACE:-default}" logs --follow --tail=100 --prefix \
    --max-log-requests=100 --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
}

# Prints the exit codes of the remaining processes, and "True" for each pod whose node was taken away.
pods_end() {
  kubectl_here get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output='jsonpath={range .items[*]}{.status.containerStatuses[*].state.terminated.exitCode}{" "}{.status.conditions[?(@.type=="DisruptionTarget")].status}{"\n"}{end}'
}

# shellcheck disable=SC2034 # STATUS is for resume.
wait_for_end() {
  local one told
  unanswered=0
  while :; do
    pause
    case "$(jobset_state)" in
      Completed) STATUS=0 && return ;;
      Failed) break ;;
      ABSENT) say "the JobSet $NAME is gone" && STATUS=1 && return ;;
      UNKNOWN) bear_silence || { STATUS=1 && return; } ;;
      *) unanswered=0 ;;
    esac
  done
  told="$(pods_end || true)"
  # After the loss of a node the exit codes of the other processes are meaningless.
  [[ $told != *True* ]] || { STATUS="$SAVED" && return; }
  STATUS=1
  for one in $told; do
    case "$one" in
      0) ;;
      "$SAVED" | "$LEFT_ALONE") STATUS="$SAVED" ;;
      *) STATUS="$one" && return ;;
    esac
  done
}
