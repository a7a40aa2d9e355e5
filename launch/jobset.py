"""Prints the manifest of a JobSet that runs gkd_jax on GKE's TPUs; launch/jobset.sh calls it.

    NAME=wmt IMAGE=... TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 \
      python launch/jobset.py --gin_file=gin_configs/wmt_ende.gin ...

JSON is YAML. Each host of a slice is a pod; GKE itself gives pods that ask for TPUs the variables
by which JAX finds its processes: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, and MEGASCALE_* where
there are several slices.
"""

import json
import os
import sys
from typing import Any

# EXIT_STATUS of gkd_jax/training/interruption.py: saved, to be started again.
SAVED = 75
# That of a process that JAX aborts since another one of its run is lost.
LEFT_ALONE = 134
CONTAINER = "gkd"


def literal(argument: str) -> str:
    """Keeps Kubernetes from putting variables in: it reads $(NAME), and $$ as one $."""
    return argument.replace("$", "$$")


def _pod(settings: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": settings["IMAGE"],
        # After the image's entry point, python -m gkd_jax.main.
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
            # A lost node is known as such when the other processes end for want of it, after
            # JAX's 100 seconds (--heartbeat_timeout_s).
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
        # A pod that ends so ends its job: one that is started again alone finds no others.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # The node was taken away: whatever the status, not a fault of the run.
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
    """Makes the JobSet.

    Args:
      settings: those that launch/README.md lists, by name.
      arguments: of gkd_jax.main.
    """
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings["NAME"],
            "namespace": settings.get("NAMESPACE") or "default",
            # A job is a slice: none shares its node pool.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": int(settings.get("MAX_RESTARTS") or 20),
                # All processes of a try are gone before the next begins: they share MODEL_DIR.
                "restartStrategy": "BlockingRecreate",
                # Other ends of a job restart all jobs.
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
