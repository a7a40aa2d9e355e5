#!/usr/bin/env bash
# Slurm runs this on the first node of a job, in the checkout; launch/slurm.sh submits it.
#   slurm_job.sh PYTHON FOLDER ARGUMENTS
set -uo pipefail
python="$1" folder="$2"
shift 2

# Where a signal comes to this shell too it must outlive the tasks, to note how they ended. The
# empty command, unlike an ignored signal, is not passed on to them.
trap : TERM
rm -f "$folder/slurm-$SLURM_JOB_ID.status"
# When one process is lost the others wait for it: all are ended, a minute later, so that processes
# that have saved and end one after another do so themselves.
srun --kill-on-bad-exit=0 --wait=60 "$python" -m gkd_jax.main --multiprocess "$@"
status=$?
echo "$status" >"$folder/slurm-$SLURM_JOB_ID.status"
exit "$status"
