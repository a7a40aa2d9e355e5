"""Accumulation of metrics on the devices, and their means."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.array_types import Metrics


@dataclasses.dataclass
class MetricSums:
    """Accumulates (sum, weight) metrics on the devices, without waiting for steps to finish.

    Attributes:
      sums: sum and weight of each metric, by group and name.
    """

    sums: dict[str, Metrics] = dataclasses.field(default_factory=dict)

    def add(self, group: str, metrics: Metrics) -> None:
        """Adds the metrics of one step to a group."""
        present = self.sums.get(group, {})
        # The sums may come from a checkpoint that was saved with other settings and therefore has
        # other metrics. Metrics that are only in the sums or only in this step are kept unchanged.
        common = sorted(present.keys() & metrics.keys())
        added = _add(*({name: of[name] for name in common} for of in (present, metrics)))
        self.sums[group] = {**present, **metrics, **added}

    def to_host(self) -> dict[str, dict[str, list[float]]]:
        """Returns the sums as plain numbers, which `from_host` restores exactly."""
        return {
            group: {
                name: [float(total), float(weight)] for name, (total, weight) in metrics.items()
            }
            for group, metrics in jax.device_get(self.sums).items()
        }

    @classmethod
    def from_host(cls, host: Mapping[str, Mapping[str, Sequence[float]]]) -> "MetricSums":
        """Returns an accumulator that continues from the sums that `to_host` returned."""
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
        """Returns the mean of each metric added so far, by 'group/name'."""
        return means(self.to_host())


def means(sums: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Returns the mean, sum / weight, of each metric by 'group/name'. Skips metrics of weight 0."""
    return {
        f"{group}/{name}": total / weight
        for group, metrics in sums.items()
        for name, (total, weight) in metrics.items()
        if weight != 0
    }


@jax.jit
def _add(left: Metrics, right: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, left, right)
