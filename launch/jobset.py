"""Prints the manifest of a JobSet that runs gkd_jax on GKE's TPUs; launch/jobset.sh calls it.

    NAME=wmt IMAGE=... TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 \
      python launch/jobset.py --gin_file=gin_configs/wmt_ende.gin ...

The manifest is JSON, which is valid YAML. Each host of a slice is a pod. For pods that request
TPUs, GKE sets the environment variables by which JAX finds its processes: TPU_WORKER_ID and
TPU_WORKER_HOSTNAMES, and MEGASCALE_* for several slices.
"""

import json
import os
import sys
from typing import Any

# EXIT_STATUS of gkd_jax/training/interruption.py: saved, to be restarted.
SAVED = 75
# The exit status of a process that JAX aborts because another one of its run is lost.
LEFT_ALONE = 134
CONTAINER = "gkd"


def literal(argument: str) -> str:
    """Escapes an argument: Kubernetes expands $(NAME), and reads $$ as one $."""
    return argument.replace("$", "$$")


def _pod(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": settings["IMAGE"],
        # Appended to the image's entry point, python -m gkd_jax.main.
        "args": ["--multiprocess", *map(literal, arguments)],
        "resources": {"limits": {"google.com/tpu": int(settings["CHIPS"])}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(settings.get("GRACE_SECONDS") or 120),
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": settings["TPU"],
            "cloud.google.com/gke-tpu-topology": settings["TOPOLOGY"],
        },
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            # Kubernetes must recognise a lost node before the other processes end because of it,
            # after JAX's 100 seconds (--heartbeat_timeout_s).
            *(
                {
                    "key": f"node.kubernetes.io/{condition}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 30,
                }
                for condition in ("not-ready", "unreachable")
            ),
        ],
        "containers": [container],
    }
    if settings.get("SPOT"):
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"].append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        )
    if settings.get("CLAIM"):
        container["volumeMounts"] = [{"name": "runs", "mountPath": settings["MOUNT"]}]
        claim = {"claimName": settings["CLAIM"]}
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": claim}]
    return pod


def _job(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    hosts = int(settings["HOSTS"])
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        # Such a pod ends its job, since a pod that is restarted alone finds no others.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # The node was taken away: not a fault of the run, whatever the status.
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "NotIn",
                        "values": [SAVED, LEFT_ALONE],
                    },
                },
            ]
        },
        "template": {"spec": _pod(settings, arguments)},
    }


def manifest(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    """Builds the manifest of the JobSet.

    Args:
      settings: settings of launch/README.md by name.
      arguments: arguments of gkd_jax.main.
    """
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings["NAME"],
            "namespace": settings.get("NAMESPACE") or "default",
            # A job is a slice, and has its node pool to itself.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": int(settings.get("MAX_RESTARTS") or 20),
                # All processes of an attempt end before the next starts: they share MODEL_DIR.
                "restartStrategy": "BlockingRecreate",
                # Any other failure of a job restarts all jobs.
                "rules": [
                    {
                        "name": "fault",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": int(settings.get("SLICES") or 1),
                    "template": {"spec": _job(settings, arguments)},
                }
            ],
        },
    }


if __name__ == "__main__":
    print(json.dumps(manifest(dict(os.environ), sys.argv[1:]), indent=1))
