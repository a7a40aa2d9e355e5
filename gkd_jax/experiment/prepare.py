"""Opens the data of an experiment and checks everything that can be checked beforehand.

All problems are reported at once. Each run mode has a function below that lists its checks. The
checks themselves are in `experiment.checks`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from etils import epath

from gkd_jax.common.growing_files import check_writable, is_in_bucket
from gkd_jax.data.pipeline import Dataset, DatasetConfig
from gkd_jax.data.prompts import with_prompts
from gkd_jax.data.vocabularies import check_same_vocabulary
from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.checks.exports import check_export
from gkd_jax.experiment.checks.models import ModelChecks
from gkd_jax.experiment.checks.objective import check_best_metric, check_objective
from gkd_jax.experiment.checks.outputs import (
    check_not_packed,
    check_packing,
    check_policy,
    check_replay,
    check_reward,
)
from gkd_jax.experiment.checks.stored_teacher import (
    attach_teacher,
    check_stored_teacher,
    storing_of,
)
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.problems import ConfigurationError, Problems
from gkd_jax.experiment.settings import Generation
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.ensembles import RoutedModel

__all__ = ["ConfigurationError", "Prepared", "prepare"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Opened and checked data sets. A data set that the run mode does not read is None."""

    train_data: Dataset | None = None
    eval_data: Dataset | None = None
    generation_data: Dataset | None = None
    storing_data: Dataset | None = None


def prepare(
    experiment: Experiment,
    *,
    run_mode: str,
    made_before: Mapping[str, LanguageModel] | None = None,
) -> Prepared:
    """Opens the data and checks files, vocabularies, checkpoints, shapes and batch sizes.

    Args:
      experiment: the experiment that is to run.
      run_mode: 'train', 'eval', 'generate', 'store_teacher', 'export' or 'interactive'. It
        determines which data are opened and what is checked.
      made_before: model of each checkpoint that another run of a study will write, by the
        checkpoint's path. These checkpoints need not exist yet.

    Returns:
      The data sets that the run mode reads.

    Raises:
      ConfigurationError: lists everything that is wrong, each problem with its remedy.
    """
    preparation = _Preparation(experiment, made_before or {})
    _CHECKS[run_mode](preparation)
    preparation.problems.raise_if_any()
    return Prepared(**preparation.opened)


class _Preparation:
    """State of `prepare`, and the checks that several run modes share.

    Attributes:
      experiment: the experiment.
      problems: the problems that were found so far.
      opened: the opened data sets, by the name of their field in `Prepared`.
      models: checks of the student and the teacher.
    """

    def __init__(self, experiment: Experiment, made_before: Mapping[str, LanguageModel]):
        self.experiment = experiment
        self.problems = Problems()
        self.opened: dict[str, Dataset] = {}
        self.models = ModelChecks(experiment, made_before, self.problems)

    def open(self, name: str, config: DatasetConfig, num_microbatches: int = 1) -> None:
        """Opens a data set as the field `name` of `Prepared`, and checks its batch size."""
        with self.problems.collecting():
            self.opened[name] = Dataset(config)
            if name == "eval_data":
                self.opened[name].check_metrics()
            attach_teacher(self.experiment, name, self.opened[name])
        with self.problems.collecting():
            self.experiment.partitioner.check_batch_size(config.batch_size, num_microbatches)

    def check_model_dir(self) -> None:
        """Checks that the run's folder can be written."""
        with self.problems.collecting():
            folder = epath.Path(self.experiment.model_dir)
            check_writable("Experiment.model_dir", folder, remedy="Set MODEL_DIR to")


def _train(preparation: _Preparation) -> None:
    """Checks data, objective, both models, the evaluation, and the run's folder."""
    experiment, collecting = preparation.experiment, preparation.problems.collecting
    vocabulary = experiment.train_data.vocabulary
    preparation.open("train_data", experiment.train_data, experiment.num_microbatches)
    for check in (
        *(check_objective, check_stored_teacher, check_packing, check_policy, check_replay),
        *(check_reward, check_best_metric, adapters.check_base),
    ):
        with collecting():
            check(experiment)
    preparation.check_model_dir()
    preparation.models.student_to_train(vocabulary)
    if experiment.objective.divergence.needs_teacher:
        preparation.models.teacher_to_train(vocabulary)
    if experiment.evaluation is not None:
        preparation.open("eval_data", experiment.evaluation.data)
        with collecting():
            check_same_vocabulary(
                vocabulary, experiment.evaluation.data.vocabulary, whose="evaluation"
            )


def _evaluate(preparation: _Preparation) -> None:
    """Checks the evaluation data, the student's checkpoint, and the teacher if one is needed."""
    experiment = preparation.experiment
    if experiment.evaluation is None:
        preparation.problems.texts.append(
            "--run_mode=eval measures Experiment.evaluation; got None. Set it."
        )
        return
    data = experiment.evaluation.data
    with preparation.problems.collecting():
        check_not_packed("Evaluation.data", data)
    preparation.open("eval_data", data)
    preparation.check_model_dir()
    preparation.models.student_to_use(data.vocabulary)
    if experiment.objective.divergence.needs_teacher:
        preparation.models.teacher_to_use(data.vocabulary)


def _generate(preparation: _Preparation) -> None:
    """Checks the prompts, the model that answers them, and the output file."""
    generation, collecting = preparation.experiment.generation, preparation.problems.collecting
    if generation is None:
        preparation.problems.texts.append(
            "--run_mode=generate writes what Experiment.generation says; got None. Set it."
        )
        return
    with collecting():
        check_not_packed("Generation.data", generation.data)
    with collecting():
        given = generation.data
        if generation.prompts is not None:
            given = with_prompts(given, generation.prompts)
        preparation.open("generation_data", given)
    with collecting():
        folder = epath.Path(generation.output).parent
        check_writable("Generation.output", folder, remedy="Set it to a file in")
    _check_generating_model(preparation, generation)


def _interactive(preparation: _Preparation) -> None:
    """Checks the model that answers the prompts."""
    generation = preparation.experiment.generation
    if generation is None:
        preparation.problems.texts.append(
            "--run_mode=interactive answers as Experiment.generation says; got None. Set it "
            "(gin_configs/interactive.gin)."
        )
        return
    _check_generating_model(preparation, generation)


def _check_generating_model(preparation: _Preparation, generation: Generation) -> None:
    experiment, vocabulary = preparation.experiment, generation.data.vocabulary
    if generation.model == "student":
        preparation.models.student_to_use(vocabulary)
    elif experiment.teacher_model is None:
        preparation.problems.texts.append(
            f"Generation.model = 'teacher' needs a teacher; got Experiment.teacher = "
            f"{experiment.teacher}. Set Experiment.teacher to one with a model, or "
            "Generation.model to 'student'."
        )
    elif isinstance(experiment.teacher_model, RoutedModel):
        preparation.problems.texts.append(
            "Generation.model = 'teacher' needs one that writes; got RoutedTeachers, which "
            "score outputs only. Set Experiment.teacher to one of them."
        )
    else:
        own = None if experiment.teacher is None else experiment.teacher.own_tokens
        where = "Generation.data, which Generation.model writes in: "
        with preparation.problems.collecting(where):
            if own is not None:
                check_same_vocabulary(vocabulary, own.vocabulary)
        preparation.models.teacher_to_use(vocabulary)


def _store_teacher(preparation: _Preparation) -> None:
    """Checks the data, the teacher's model and checkpoint, and the folder of the store."""
    collecting = preparation.problems.collecting
    with collecting():
        storing = storing_of(preparation.experiment)
        preparation.open("storing_data", storing.data)
        with collecting():
            if is_in_bucket(storing.output):
                raise ValueError(
                    "Storing.output must be a folder of this machine, since steps read from "
                    f"anywhere in it; got {storing.output}. Set it to a local folder, or to "
                    "where the bucket is mounted (for example by Cloud Storage FUSE)."
                )
            folder = epath.Path(storing.output)
            check_writable("Storing.output", folder, remedy="Set it to a folder in")
        preparation.models.teacher_to_use(storing.data.vocabulary)


def _export(preparation: _Preparation) -> None:
    """Checks the student's checkpoint, the export format and the output directory."""
    experiment = preparation.experiment
    with preparation.problems.collecting():
        folder = check_export(experiment)
        check_writable("Export.output", folder, remedy="Set it to a directory in")
    preparation.models.student_to_use(experiment.train_data.vocabulary)


_CHECKS: dict[str, Callable[[_Preparation], None]] = {
    "train": _train,
    "eval": _evaluate,
    "generate": _generate,
    "store_teacher": _store_teacher,
    "export": _export,
    "interactive": _interactive,
}
