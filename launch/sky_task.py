"""Prints a task of SkyPilot that runs gkd_jax; launch/skypilot.sh calls it.

    NAME=wmt ACCELERATORS=H100:8 NODES=2 python launch/sky_task.py --gin_file=... ...

JSON is YAML.
"""

import json
import os
import shlex
import sys
from typing import Any

# EXIT_STATUS of gkd_jax/training/interruption.py: saved, to be restarted.
SAVED = 75

# The hosts of a TPU slice find each other. Elsewhere SkyPilot provides the node's number, and a
# process uses all GPUs of its node.
_BY_ITSELF = "--multiprocess"
_BY_SKYPILOT = (
    '--coordinator_address="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):8476" '
    '--process_count="$SKYPILOT_NUM_NODES" --process_index="$SKYPILOT_NODE_RANK"'
)


def task(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """Builds the task.

    Args:
      settings: settings of launch/README.md by name.
      arguments: arguments of gkd_jax.main.
    """
    accelerators, nodes = settings["ACCELERATORS"], int(settings.get("NODES") or 1)
    is_tpu = accelerators.lower().startswith("tpu-")
    extras = settings.get("EXTRAS") or ("tpu,data" if is_tpu else "cuda,data")
    found = _BY_ITSELF if is_tpu else _BY_SKYPILOT if nodes > 1 else ""
    resources: dict[str, Any] = {
        "accelerators": accelerators,
        # The number of such restarts is not limited, since each followed a SIGTERM.
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [SAVED]},
    }
    if settings.get("SPOT"):
        resources["use_spot"] = True
    if settings.get("INFRA"):
        resources["infra"] = settings["INFRA"]
    if settings.get("RUNTIME_VERSION"):
        resources["accelerator_args"] = {"runtime_version": settings["RUNTIME_VERSION"]}
    made: dict[str, Any] = {
        "name": settings["NAME"],
        # The checkout, without files that .gitignore excludes.
        "workdir": ".",
        "num_nodes": nodes,
        "resources": resources,
        "setup": "[ -x .venv/bin/python ] || uv venv --seed --python 3.11 .venv\n"
        f".venv/bin/pip install -q -c requirements.txt {shlex.quote(f'.[{extras}]')}\n",
        "run": f"exec .venv/bin/python -m gkd_jax.main {found} {shlex.join(arguments)}\n",
    }
    if settings.get("BUCKET"):
        made["file_mounts"] = {settings["MOUNT"]: {"source": settings["BUCKET"], "mode": "MOUNT"}}
    return made


if __name__ == "__main__":
    print(json.dumps(task(dict(os.environ), sys.argv[1:]), indent=1))
