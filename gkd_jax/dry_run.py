"""`--dry_run`: everything that can be checked without training, in seconds."""

from gkd_jax import prepare
from gkd_jax.experiment import Experiment
from gkd_jax.study import Study


def dry_run(experiment: Experiment | Study, *, run_mode: str = "train") -> str:
    """Checks files, vocabularies, shapes and batch sizes, and describes the plan.

    Args:
      experiment: an experiment, or a study whose cells are all checked.
      run_mode: 'train', 'eval' or 'generate'.

    Returns:
      The plan as text: parameter counts, objective, data, mesh.

    Raises:
      gkd_jax.prepare.ConfigurationError: something is wrong; the message lists all of it.
    """
    if isinstance(experiment, Study):
        return _dry_run_study(experiment)
    prepared = prepare.prepare(experiment, run_mode=run_mode)
    return prepare.describe_plan(experiment, prepared)


def _dry_run_study(study: Study) -> str:
    problems: list[str] = []
    plans: list[str] = []
    for cell in study.cells:
        # Checkpoints of earlier cells do not exist yet; their models' shapes are checked.
        experiment = study.experiment_of(cell, before_running=True)
        try:
            plans.append(f"{cell.name}:\n{dry_run(experiment)}")
        except prepare.ConfigurationError as error:
            problems.extend(f"{cell.name}: {text}" for text in error.problems)
    if problems:
        raise prepare.ConfigurationError(problems)
    return "\n\n".join(plans)
