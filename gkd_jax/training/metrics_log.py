"""Log of a run's metrics: means since the last entry, times, utilisation, alarms."""

import functools
import time
from collections.abc import Mapping, Sequence

from absl import logging

from gkd_jax.devices import chips
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.training import metric_sums, non_finite, writers
from gkd_jax.training.profiling import PhaseTimes
from gkd_jax.training.programs import flops_of_step
from gkd_jax.training.step_kinds import StepKind

# Maps a group of metrics to the word by which alarms describe the outputs of this group.
_OUTPUT_NAMES = {"rollout": "sampled", "outputs": "evaluated"}


class MetricsLog:
    """Writes metrics, and warns if sampled or evaluated outputs collapse."""

    def __init__(
        self,
        experiment: Experiment,
        phases: PhaseTimes,
        *,
        start_step: int,
        owes_evaluation: bool,
    ):
        self._experiment = experiment
        self._phases = phases
        self._writer = writers.default_writer(
            experiment.model_dir,
            start_step=start_step,
            num_steps=experiment.num_steps,
            owes_evaluation=owes_evaluation,
        )
        self._step = start_step
        self._time = time.monotonic()
        self._seconds_of_fetching = 0.0

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text, such as the plan of the run."""
        self._writer.write_text(step, name, text)

    def add_fetching(self, seconds: float) -> None:
        """Records how long a step waited for its data."""
        self._seconds_of_fetching += seconds

    def leave_out(self, seconds: float) -> None:
        """Excludes seconds that were not spent on training from the time per step."""
        self._time += seconds

    def write_training(
        self, step: int, sums: Mapping[str, Mapping[str, Sequence[float]]], *, num_updates: int
    ) -> None:
        """Writes the metrics of the steps since the last call.

        Args:
          step: number of the last of these steps, counted from 1.
          sums: sum and weight of each metric, by group and name.
          num_updates: number of updates since the start of the run. Skipped steps are not counted.

        Raises:
          FloatingPointError: a mean is NaN or infinite.
        """
        means = metric_sums.means(sums)
        now, num_steps = time.monotonic(), step - self._step
        seconds = (now - self._time) / num_steps
        means["seconds_of_fetching"] = self._seconds_of_fetching / num_steps
        self._step, self._time, self._seconds_of_fetching = step, now, 0.0
        non_finite.check_means(means, step)
        means["seconds_per_step"] = seconds
        for kind, phases in self._phases.take().items():
            means |= {f"{kind}/seconds_of_{name}": value for name, value in phases.items()}
            utilisation = self._utilisation(kind, phases["update"])
            if utilisation is not None:
                means[f"{kind}/update_mfu"] = utilisation
        means["learning_rate"] = float(self._experiment.optimizer.schedule(max(num_updates - 1, 0)))
        # The number of tokens per step is a mean over all steps, whatever their kind.
        tokens = [sums[kind]["target_tokens"] for kind in StepKind if kind in sums]
        tokens_per_step = sum(total for total, _ in tokens) / sum(weight for _, weight in tokens)
        means["target_tokens_per_second"] = tokens_per_step / seconds
        means["target_tokens_per_second_per_chip"] = tokens_per_step / seconds / self._num_chips
        self._writer.write(step, {f"train/{name}": value for name, value in means.items()})
        self._raise_alarms(means, "rollout", step)

    def write_evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes the scores of an evaluation."""
        self._writer.write(step, {f"eval/{name}": value for name, value in scores.items()})
        self._raise_alarms(scores, "outputs", step)

    @property
    def _num_chips(self) -> int:
        return self._experiment.partitioner.mesh.size

    def _utilisation(self, kind: str, seconds: float) -> float | None:
        """Returns the model FLOPs utilisation (MFU) of an update; None if it is not known.

        MFU is the number of FLOPs per second, divided by the peak rate of all chips.
        """
        device = self._experiment.partitioner.mesh.devices.flat[0]
        chip = chips.of_device(device.device_kind)
        is_smaller = kind == StepKind.DATA and self._experiment.rollout.num_samples > 1
        if chip is None or is_smaller:
            return None
        start = time.monotonic()
        flops = self._flops_of_step
        self.leave_out(time.monotonic() - start)
        if flops is None:
            return None
        return flops / seconds / (self._num_chips * chip.flops)

    @functools.cached_property
    def _flops_of_step(self) -> float | None:
        return flops_of_step(self._experiment)

    def _raise_alarms(self, values: Mapping[str, float], group: str, step: int) -> None:
        alarms = self._experiment.alarms
        limits = {"truncated_share": alarms.truncated_share, "repetition": alarms.repetition}
        for name, limit in limits.items():
            value = values.get(f"{group}/{name}", 0.0)
            if value > limit:
                logging.warning(
                    "ALARM at step %d: %s of the %s outputs is %.2f, above Alarms.%s = %.2f: "
                    "outputs collapse or do not end. Look at the predictions; compare the "
                    "end-of-sequence ids of teacher and student, the learning rate and the target "
                    "length.",
                    step, name, _OUTPUT_NAMES[group], value, name, limit,
                )  # fmt: skip

    def sync(self) -> None:
        """Makes the entries durable. Call it before a checkpoint of the same step is committed."""
        self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()
