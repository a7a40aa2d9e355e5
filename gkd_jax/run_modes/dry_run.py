"""`--dry_run`: checks everything that can be checked without training, in seconds."""

from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.plan import describe_plan
from gkd_jax.run_modes.study import Study, check_study


def dry_run(experiment: Experiment | Study, *, run_mode: str = "train") -> str:
    """Checks files, vocabularies, checkpoints, shapes and batch sizes, and describes the plan.

    Args:
      experiment: an experiment, or a study whose cells are all checked.
      run_mode: run mode for which an experiment is checked. Ignored for a study.

    Returns:
      The plan as text: parameter counts, objective, data, mesh.

    Raises:
      ConfigurationError: lists everything that is wrong.
    """
    if isinstance(experiment, Study):
        return check_study(experiment)
    prepared = prepare.prepare(experiment, run_mode=run_mode)
    return describe_plan(experiment, prepared)
