"""Checks all that can be checked before any long work, and says everything wrong at once."""

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator

import jax
from etils import epath

from gkd_jax.checkpoints import load
from gkd_jax.data.pipeline import Dataset, DatasetConfig
from gkd_jax.data.vocabularies import check_same_vocabulary
from gkd_jax.experiment import Experiment
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.divergences import NegativeLogLikelihood


class ConfigurationError(ValueError):
    """One or more things of an experiment are wrong; the message lists them all."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        if len(problems) == 1:
            super().__init__(problems[0])
        else:
            lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, start=1))
            super().__init__(f"{len(problems)} things are wrong:\n{lines}")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data sets of an experiment, opened and checked; None where not wanted."""

    train_data: Dataset | None = None
    eval_data: Dataset | None = None
    generation_data: Dataset | None = None


class _Problems:
    def __init__(self):
        self.texts: list[str] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Notes a user's error instead of stopping, so that the rest is checked as well."""
        try:
            yield
        except (ValueError, OSError) as error:
            if str(error) not in self.texts:
                self.texts.append(str(error))


def prepare(experiment: Experiment, *, run_mode: str) -> Prepared:
    """Opens the data and checks files, vocabularies, shapes and batch sizes.

    Args:
      experiment: what is to run.
      run_mode: 'train', 'eval' or 'generate': decides what is needed.

    Returns:
      The data sets that the run mode needs.

    Raises:
      ConfigurationError: listing everything that is wrong, each with its remedy.
    """
    problems = _Problems()
    opened: dict[str, Dataset] = {}

    def open_data(name: str, config: DatasetConfig | None) -> None:
        if config is not None:
            with problems.collecting():
                opened[name] = Dataset(config)

    if run_mode == "train":
        open_data("train_data", experiment.train_data)
        with problems.collecting():
            experiment.partitioner.check_batch_size(
                experiment.train_data.batch_size, experiment.num_microbatches
            )
        with problems.collecting():
            _check_objective(experiment)
        with problems.collecting():
            _check_writable(experiment.model_dir)
    if run_mode in ("train", "eval") and experiment.evaluation is not None:
        open_data("eval_data", experiment.evaluation.data)
        with problems.collecting():
            experiment.partitioner.check_batch_size(experiment.evaluation.data.batch_size, 1)
        with problems.collecting():
            _check_same_data_vocabulary(experiment)
    if run_mode == "eval" and experiment.evaluation is None:
        problems.texts.append(
            "--run_mode=eval measures Experiment.evaluation; got None. Set Experiment.evaluation."
        )
    if run_mode == "generate":
        if experiment.generation is None:
            problems.texts.append(
                "--run_mode=generate writes what Experiment.generation says; got None. "
                "Set Experiment.generation."
            )
        else:
            open_data("generation_data", experiment.generation.data)
            with problems.collecting():
                experiment.partitioner.check_batch_size(experiment.generation.data.batch_size, 1)
    _check_models(experiment, run_mode, problems)
    if problems.texts:
        raise ConfigurationError(problems.texts)
    return Prepared(**opened)


def _check_models(experiment: Experiment, run_mode: str, problems: _Problems) -> None:
    student, teacher = experiment.student, experiment.teacher
    with problems.collecting():
        _check_vocab_size("student", student.model, experiment.train_data)
    if student.initial_checkpoint is not None and run_mode == "train":
        with problems.collecting():
            _check_checkpoint(
                "Student.initial_checkpoint", student.initial_checkpoint, student.model
            )
    if teacher is None:
        return
    with problems.collecting():
        _check_checkpoint("Teacher.checkpoint", teacher.checkpoint, teacher.model)
    with problems.collecting():
        if teacher.model.vocab_size != student.model.vocab_size:
            raise ValueError(
                "the teacher's output layer must have the student's size; got "
                f"{teacher.model.vocab_size} (teacher) and {student.model.vocab_size} (student). "
                "Set vocab_size of both models to the same number."
            )
    with problems.collecting():
        if teacher.vocabulary is not None:
            check_same_vocabulary(experiment.train_data.vocabulary, teacher.vocabulary)


def _check_vocab_size(name: str, model: LanguageModel, data: DatasetConfig) -> None:
    vocabulary = data.vocabulary
    if vocabulary is not None and model.vocab_size < vocabulary.size:
        raise ValueError(
            f"the {name}'s vocab_size must be at least that of its vocabulary; got "
            f"{model.vocab_size} and {vocabulary.size} ({vocabulary.name}). "
            f"Set vocab_size of the {name}'s model to {vocabulary.size} or more."
        )


def _check_checkpoint(setting: str, path: str, model: LanguageModel) -> None:
    try:
        load.check_compatible(path, model.abstract_params())
    except (ValueError, OSError) as error:
        raise ValueError(f"{setting}: {error}") from error


def _check_same_data_vocabulary(experiment: Experiment) -> None:
    assert experiment.evaluation is not None
    check_same_vocabulary(
        experiment.train_data.vocabulary, experiment.evaluation.data.vocabulary
    )


def _check_objective(experiment: Experiment) -> None:
    divergence = experiment.objective.divergence
    if divergence.needs_teacher and experiment.teacher is None:
        raise ValueError(
            f"{type(divergence).__name__} compares the student with a teacher; got "
            "Experiment.teacher = None. Set Experiment.teacher, or Objective.divergence to "
            "NegativeLogLikelihood() for fine-tuning."
        )
    if isinstance(divergence, NegativeLogLikelihood) and experiment.outputs.student_data_fraction != 0:
        # Cross-entropy on one's own samples teaches nothing but to repeat them.
        raise ValueError(
            "NegativeLogLikelihood on the student's own outputs is no objective; got "
            f"{experiment.outputs}. Set OutputMix.student_data_fraction to 0, or choose a "
            "divergence to the teacher."
        )


def _check_writable(model_dir: str) -> None:
    folder = epath.Path(model_dir)
    probe = folder / f".write_check_{jax.process_index()}_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Experiment.model_dir is not writable: {model_dir} ({error.strerror or error}). "
            "Set MODEL_DIR to a folder that this user may write to."
        ) from error


def num_params(model: LanguageModel) -> int:
    """Counts a model's parameters without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))


def describe_plan(experiment: Experiment, prepared: Prepared) -> str:
    """Describes in a few lines what will run."""
    lines = [f"student: {num_params(experiment.student.model):,} parameters"]
    if experiment.teacher is not None:
        lines.append(f"teacher: {num_params(experiment.teacher.model):,} parameters")
    lines.append(f"objective: {experiment.objective}")
    lines.append(f"outputs: {experiment.outputs}, sampled with {experiment.rollout}")
    lines.append(f"steps: {experiment.num_steps:,} of {experiment.train_data.batch_size} examples")
    lines.append(f"mesh: {dict(experiment.partitioner.mesh.shape)}")
    if prepared.train_data is not None:
        passes = experiment.num_steps * experiment.train_data.batch_size
        passes /= prepared.train_data.num_examples
        lines.append(f"training data: {prepared.train_data.num_examples:,} examples, "
                     f"{passes:.2f} passes")
        lines.append(prepared.train_data.describe())
    if prepared.eval_data is not None:
        lines.append(f"evaluation data: {prepared.eval_data.num_examples:,} examples")
    return "\n".join(lines)
