"""Sums of metrics on the device, and their means."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Metrics


@dataclasses.dataclass
class MetricSums:
    """Sums of (sum, weight) metrics on the device: adding does not wait for the step."""

    sums: dict[str, Metrics] = dataclasses.field(default_factory=dict)

    def add(self, group: str, metrics: Metrics) -> None:
        """Adds one step's metrics to those of its group."""
        present = self.sums.get(group, {})
        # Those of a run that was stopped may be of other settings.
        common = sorted(present.keys() & metrics.keys())
        added = _add(*({name: of[name] for name in common} for of in (present, metrics)))
        self.sums[group] = {**present, **metrics, **added}

    def to_host(self) -> dict[str, dict[str, list[float]]]:
        """The sums as plain numbers, for a checkpoint; `from_host` gives the very same back."""
        return {
            group: {
                name: [float(total), float(weight)] for name, (total, weight) in metrics.items()
            }
            for group, metrics in jax.device_get(self.sums).items()
        }

    @classmethod
    def from_host(cls, host: Mapping[str, Mapping[str, Sequence[float]]]) -> "MetricSums":
        """Goes on with sums that `to_host` gave."""
        return cls(
            {
                group: {
                    name: (np.float32(total), np.float32(weight))
                    for name, (total, weight) in metrics.items()
                }
                for group, metrics in host.items()
            }
        )

    def means(self) -> dict[str, float]:
        """As the function `means`, of the sums until now."""
        return means(self.to_host())


def means(sums: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Sum over weight of every metric as 'group/name'; metrics of weight 0 are left out."""
    return {
        f"{group}/{name}": total / weight
        for group, metrics in sums.items()
        for name, (total, weight) in metrics.items()
        if weight != 0
    }


@jax.jit
def _add(left: Metrics, right: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, left, right)
