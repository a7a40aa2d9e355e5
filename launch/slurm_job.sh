#!/usr/bin/env bash
# Slurm runs this on the first node of a job, in the checkout; launch/slurm.sh submits it.
#   slurm_job.sh PYTHON FOLDER ARGUMENTS
set -uo pipefail
python="$1" folder="$2"
shift 2

# If this shell receives the signal too, it must outlive the tasks to record how they ended. A trap
# with the empty command, unlike an ignored signal, is not inherited by them.
trap : TERM
rm -f "$folder/slurm-$SLURM_JOB_ID.status"
# If a process is lost, the others wait for it. They are ended after a minute, so that processes that
# have saved can end by themselves, one after another.
srun --kill-on-bad-exit=0 --wait=60 "$python" -m gkd_jax.main --multiprocess "$@"
status=$?
echo "$status" >"$folder/slurm-$SLURM_JOB_ID.status"
exit "$status"
