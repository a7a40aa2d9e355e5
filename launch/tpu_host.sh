#!/usr/bin/env bash
# Runs on each host of a TPU VM, in the checkout; launch/tpu_vm.sh calls it over ssh.
#   start ARGUMENTS  starts a run that survives the connection
#   status           prints "gkd_jax: " and one of: running, the exit status, lost
#   stop             sends SIGTERM: the run saves and ends
set -euo pipefail
cd "$(dirname "$0")/.."

is_running() { [ -s gkd_jax.pid ] && kill -0 "$(cat gkd_jax.pid)" 2>/dev/null; }

case "$1" in
  start)
    shift
    if is_running; then
      echo "a run is going on here already: end it first (cancel)" >&2
      exit 1
    fi
    rm -f gkd_jax.status gkd_jax.pid
    setsid nohup bash launch/tpu_host.sh hold "$@" >>gkd_jax.log 2>&1 </dev/null &
    until [ -s gkd_jax.pid ]; do sleep 0.1; done
    ;;
  hold)
    shift
    .venv/bin/python -m gkd_jax.main "$@" &
    echo $! >gkd_jax.pid
    status=0
    wait $! || status=$?
    echo "$status" >gkd_jax.status
    ;;
  status)
    if is_running; then
      echo "gkd_jax: running"
    else
      # The process may have ended without its status being recorded yet.
      [ -s gkd_jax.status ] || sleep 1
      echo "gkd_jax: $(cat gkd_jax.status 2>/dev/null || echo lost)"
    fi
    ;;
  stop)
    ! is_running || kill "$(cat gkd_jax.pid)"
    ;;
esac
