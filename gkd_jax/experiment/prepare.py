"""Checks all that can be checked before any long work, and says everything wrong at once."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import jax
from etils import epath

from gkd_jax.checkpoints import load, manager
from gkd_jax.checkpoints.layout import OtherShapesError
from gkd_jax.common.array_types import Params
from gkd_jax.common.growing_files import check_writable, is_in_bucket
from gkd_jax.data.pipeline import Dataset, DatasetConfig
from gkd_jax.data.prompts import with_prompts
from gkd_jax.data.vocabularies import Vocabulary, check_same_vocabulary
from gkd_jax.devices.partitioning import layer_of
from gkd_jax.distillation.parameter_sources import FrozenBase, Initial, state_fields
from gkd_jax.distillation.rewards import RewardMix
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.checks.exports import check_export
from gkd_jax.experiment.checks.hugging_face import check_same_config, check_same_tokenizer
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
from gkd_jax.experiment.checks.vocabularies import check_own_tokens, check_padding, check_vocab_size
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.settings import Generation
from gkd_jax.models import lora, stacking
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.ensembles import RoutedModel
from gkd_jax.objectives.divergence_sums import WeightedSum
from gkd_jax.objectives.divergences import NegativeLogLikelihood
from gkd_jax.objectives.other_divergences import SampledReverseKL
from gkd_jax.sampling.methods import Sample


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
    storing_data: Dataset | None = None


class Problems:
    """What is wrong, gathered instead of stopping at the first."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextlib.contextmanager
    def collecting(self, where: str = "") -> Iterator[None]:
        """Notes a user's error, after `where`, instead of stopping, so that the rest is checked."""
        try:
            yield
        except (ValueError, OSError) as error:
            texts = error.problems if isinstance(error, ConfigurationError) else [str(error)]
            self.texts += [where + text for text in texts if where + text not in self.texts]

    def raise_if_any(self) -> None:
        """Raises a ConfigurationError that lists all that was noted."""
        if self.texts:
            raise ConfigurationError(self.texts)


def prepare(
    experiment: Experiment,
    *,
    run_mode: str,
    made_before: Mapping[str, LanguageModel] | None = None,
) -> Prepared:
    """Opens the data and checks files, vocabularies, checkpoints, shapes and batch sizes.

    Args:
      experiment: what is to run.
      run_mode: 'train', 'eval', 'generate', 'store_teacher', 'export' or 'interactive': decides
        what is needed.
      made_before: folders of checkpoints that other runs will have made by then, and the models
        in them: they need not exist yet.

    Returns:
      The data sets that the run mode needs.

    Raises:
      ConfigurationError: listing everything that is wrong, each with its remedy.
    """
    check = _Check(experiment, made_before or {})
    checks = {
        "train": check.train,
        "eval": check.evaluate,
        "generate": check.generate,
        "store_teacher": check.store_teacher,
        "export": check.export,
        "interactive": check.interactive,
    }
    checks[run_mode]()
    check.problems.raise_if_any()
    return Prepared(**check.opened)


class _Check:
    """The checks of one experiment by run mode; each notes what is wrong and goes on."""

    def __init__(self, experiment: Experiment, made_before: Mapping[str, LanguageModel]):
        self.problems = Problems()
        self.opened: dict[str, Dataset] = {}
        self._experiment = experiment
        self._made_before = made_before

    def train(self) -> None:
        """Data, objective, both models, the evaluation, and where results go."""
        experiment, collecting = self._experiment, self.problems.collecting
        vocabulary = experiment.train_data.vocabulary
        self._open("train_data", experiment.train_data, experiment.num_microbatches)
        for check in (
            *(_check_objective, check_stored_teacher, check_packing, check_policy, check_replay),
            *(check_reward, _check_best_metric, adapters.check_base),
        ):
            with collecting():
                check(experiment)
        self._check_model_dir()
        with collecting():
            check_vocab_size(experiment.student.model, vocabulary)
        if experiment.student.initial_checkpoint is not None:
            self._check_initial_checkpoint(vocabulary)
        if experiment.objective.divergence.needs_teacher:
            self._check_teacher(vocabulary)
        if experiment.evaluation is not None:
            self._open("eval_data", experiment.evaluation.data)
            with collecting():
                check_same_vocabulary(
                    vocabulary, experiment.evaluation.data.vocabulary, whose="evaluation"
                )

    def evaluate(self) -> None:
        """The evaluation, a trained student, and the teacher for the divergence if there is one."""
        experiment = self._experiment
        if experiment.evaluation is None:
            self.problems.texts.append(
                "--run_mode=eval measures Experiment.evaluation; got None. Set it."
            )
            return
        data = experiment.evaluation.data
        with self.problems.collecting():
            check_not_packed("Evaluation.data", data)
        self._open("eval_data", data)
        self._check_model_dir()
        self._check_student_to_use(data.vocabulary)
        if experiment.objective.divergence.needs_teacher:
            self._check_teacher_to_use(data.vocabulary)

    def generate(self) -> None:
        """The prompts, the model that answers them, and where its outputs go."""
        experiment, collecting = self._experiment, self.problems.collecting
        generation = experiment.generation
        if generation is None:
            self.problems.texts.append(
                "--run_mode=generate writes what Experiment.generation says; got None. Set it."
            )
            return
        with collecting():
            check_not_packed("Generation.data", generation.data)
        with collecting():
            given = generation.data
            if generation.prompts is not None:
                given = with_prompts(given, generation.prompts)
            self._open("generation_data", given)
        with collecting():
            folder = epath.Path(generation.output).parent
            check_writable("Generation.output", folder, remedy="Set it to a file in")
        self._check_writer(generation)

    def interactive(self) -> None:
        """The model that answers."""
        generation = self._experiment.generation
        if generation is None:
            self.problems.texts.append(
                "--run_mode=interactive answers as Experiment.generation says; got None. Set it "
                "(gin_configs/interactive.gin)."
            )
            return
        self._check_writer(generation)

    def _check_writer(self, generation: Generation) -> None:
        experiment = self._experiment
        if generation.model == "student":
            self._check_student_to_use(generation.data.vocabulary)
        elif experiment.teacher_model is None:
            self.problems.texts.append(
                f"Generation.model = 'teacher' needs a teacher; got Experiment.teacher = "
                f"{experiment.teacher}. Set Experiment.teacher to one with a model, or "
                "Generation.model to 'student'."
            )
        elif isinstance(experiment.teacher_model, RoutedModel):
            self.problems.texts.append(
                "Generation.model = 'teacher' needs one that writes; got RoutedTeachers, which "
                "score outputs only. Set Experiment.teacher to one of them."
            )
        else:
            own = None if experiment.teacher is None else experiment.teacher.own_tokens
            with self.problems.collecting("Generation.data, which Generation.model writes in: "):
                if own is not None:
                    check_same_vocabulary(generation.data.vocabulary, own.vocabulary)
            self._check_teacher_to_use(generation.data.vocabulary)

    def store_teacher(self) -> None:
        """The data, a teacher that can be asked, and where the store goes."""
        experiment, collecting = self._experiment, self.problems.collecting
        with collecting():
            storing = storing_of(experiment)
            self._open("storing_data", storing.data)
            with collecting():
                if is_in_bucket(storing.output):
                    raise ValueError(
                        "Storing.output must be a folder of this machine, since steps read from "
                        f"anywhere in it; got {storing.output}. Set it to a local folder, or to "
                        "where the bucket is mounted (for example by Cloud Storage FUSE)."
                    )
                folder = epath.Path(storing.output)
                check_writable("Storing.output", folder, remedy="Set it to a folder in")
            self._check_teacher_to_use(storing.data.vocabulary)

    def export(self) -> None:
        """A trained student, an architecture that can hold it, and where it goes."""
        experiment, collecting = self._experiment, self.problems.collecting
        with collecting():
            folder = check_export(experiment)
            check_writable("Export.output", folder, remedy="Set it to a directory in")
        self._check_student_to_use(experiment.train_data.vocabulary)

    def _open(self, name: str, config: DatasetConfig, num_microbatches: int = 1) -> None:
        with self.problems.collecting():
            self.opened[name] = Dataset(config)
            if name == "eval_data":
                self.opened[name].check_metrics()
            attach_teacher(self._experiment, name, self.opened[name])
        with self.problems.collecting():
            self._experiment.partitioner.check_batch_size(config.batch_size, num_microbatches)

    def _check_model_dir(self) -> None:
        with self.problems.collecting():
            folder = epath.Path(self._experiment.model_dir)
            check_writable("Experiment.model_dir", folder, remedy="Set MODEL_DIR to")

    def _check_student_to_use(self, vocabulary: Vocabulary) -> None:
        experiment, collecting = self._experiment, self.problems.collecting
        with collecting():
            check_vocab_size(experiment.student.model, vocabulary)
        with collecting():
            if manager.newest_step(experiment.model_dir) is not None:
                self._check_checkpoint(
                    "Experiment.model_dir", experiment.model_dir, experiment.student.model,
                    vocabulary,
                )  # fmt: skip
                adapters.check_base(experiment)
                if lora.has_adapters(experiment.student.model):
                    self._check_initial_checkpoint(vocabulary)
            elif experiment.student.initial_checkpoint is None:
                raise ValueError(no_student(experiment))
            else:
                self._check_initial_checkpoint(vocabulary)

    def _check_initial_checkpoint(self, vocabulary: Vocabulary) -> None:
        student = self._experiment.student
        assert student.initial_checkpoint is not None
        with self.problems.collecting():
            self._check_checkpoint(
                "Student.initial_checkpoint", student.initial_checkpoint,
                lora.base_of(student.model), vocabulary,
            )  # fmt: skip

    def _check_teacher(self, vocabulary: Vocabulary) -> None:
        """Every network of the teacher; one made from the student is checked as the student is."""
        if self._experiment.teacher is None:
            return
        own = self._experiment.teacher.own_tokens
        if own is not None:
            with self.problems.collecting():
                check_own_tokens(self._experiment, self._experiment.train_data.vocabulary)
            vocabulary = own.vocabulary
        for network in self._experiment.teacher.networks:
            self._check_network(network, vocabulary)
        sources = self._experiment.teacher.parameter_sources(self._experiment.student.model)
        if any(isinstance(source, Initial | FrozenBase) for source in sources):
            self._check_initial_student(vocabulary)

    def _check_network(self, teacher: Teacher, vocabulary: Vocabulary) -> None:
        student, collecting = self._experiment.student, self.problems.collecting
        is_known = teacher.vocabulary is not None
        with collecting():
            is_known |= self._check_checkpoint(
                "Teacher.checkpoint", teacher.checkpoint, teacher.model, vocabulary
            )
        with collecting():
            check_padding(student.model, teacher, vocabulary, is_known=is_known)
        with collecting():
            check_vocab_size(teacher.model, vocabulary, whose="teacher")
        with collecting():
            if teacher.vocabulary is not None:
                check_same_vocabulary(vocabulary, teacher.vocabulary)

    def _check_initial_student(self, vocabulary: Vocabulary) -> None:
        if self._experiment.student.initial_checkpoint is not None:
            self._check_initial_checkpoint(vocabulary)

    def _check_teacher_to_use(self, vocabulary: Vocabulary) -> None:
        """Outside training a teacher in the state must be in the run's checkpoint."""
        experiment, teacher = self._experiment, self._experiment.teacher
        self._check_teacher(vocabulary)
        if teacher is None:
            return
        fields = state_fields(teacher.parameter_sources(experiment.student.model))
        if not fields:
            return
        self._check_student_to_use(vocabulary)
        with self.problems.collecting():
            if manager.newest_step(experiment.model_dir) is not None:
                model = experiment.student.model
                trained, _ = lora.split(model, model.abstract_params())
                for field in fields:
                    load.check_compatible(experiment.model_dir, trained, part=field)

    def _check_checkpoint(
        self, setting: str, path: str, model: LanguageModel, vocabulary: Vocabulary
    ) -> bool:
        """Checks shapes and vocabulary; whether it tells, or will, what it was trained with.

        Of a model with adapters the checkpoint holds those alone.
        """
        if setting != "Experiment.model_dir":
            adapters.check_whole(setting, path, model, self._made_before.get(path))
        if path in self._made_before:
            _check_same_shapes(setting, path, model, self._made_before[path])
            return True
        try:
            trained, _ = lora.split(model, model.abstract_params())
            info = load.check_compatible(path, trained)
        except (ValueError, OSError) as error:
            if isinstance(error, OtherShapesError):
                adapters.check_whole(setting, path)
            raise ValueError(f"{setting}: {error}") from error
        if info.kind == "hf":
            check_same_config(setting, path, model)
            return check_same_tokenizer(info.folder, vocabulary, setting=setting)
        trained_with = info.host.get("vocabulary")
        if trained_with is not None and trained_with["fingerprint"] != vocabulary.fingerprint:
            raise ValueError(
                f"{setting} {path} was trained with another vocabulary, so that its token ids "
                f"mean other pieces; got {trained_with['name']} ({trained_with['size']} ids, "
                f"{trained_with['fingerprint'][:12]}) there and {vocabulary.name} "
                f"({vocabulary.size} ids, {vocabulary.fingerprint[:12]}) here. Set "
                "DatasetConfig.vocabulary (VOCABULARY_PATH) to that one, or take another "
                "checkpoint."
            )
        return trained_with is not None


def _layer_by_layer(model: LanguageModel) -> Params:
    """A model's shapes, each layer on its own: a checkpoint of either form serves the other."""
    return stacking.unstack(model.abstract_params(), lambda leaf, _: layer_of(leaf))


def _check_same_shapes(
    setting: str, path: str, model: LanguageModel, trained: LanguageModel
) -> None:
    shapes, trained_shapes = (
        {
            jax.tree_util.keystr(name, simple=True, separator="/"): leaf.shape
            for name, leaf in jax.tree_util.tree_leaves_with_path(_layer_by_layer(each))
        }
        for each in (model, trained)
    )
    if shapes != trained_shapes:
        raise ValueError(
            f"{setting} {path} will hold a model of another shape; got {trained.config} there and "
            f"{model.config} here. Give both runs a model of the same sizes."
        )


def _check_objective(experiment: Experiment) -> None:
    divergence = experiment.objective.divergence
    if divergence.needs_teacher and experiment.teacher is None:
        raise ValueError(
            f"{type(divergence).__name__} compares the student with a teacher; got "
            "Experiment.teacher = None. Set Experiment.teacher, or Objective.divergence to "
            "NegativeLogLikelihood() for fine-tuning."
        )
    parts = divergence.divergences if isinstance(divergence, WeightedSum) else (divergence,)
    fraction = experiment.outputs.student_data_fraction
    # At an alpha of 0 the student's own outputs meet the reward alone.
    reward = experiment.reward
    is_measured = not (isinstance(reward, RewardMix) and reward.alpha == 0)
    has_likelihood = any(isinstance(part, NegativeLogLikelihood) for part in parts)
    if has_likelihood and fraction != 0 and is_measured:
        # Cross-entropy on one's own samples teaches nothing but to repeat them.
        raise ValueError(
            "NegativeLogLikelihood on the student's own outputs is no objective; got "
            f"{experiment.outputs}. Set OutputMix.student_data_fraction to 0, or choose a "
            "divergence to the teacher."
        )
    rollout, lengths = experiment.rollout, experiment.train_data.feature_lengths
    target_length = rollout.target_length or lengths["targets"]
    if experiment.outputs.per_example and (rollout.num_samples, target_length) != (
        1, lengths["targets"],
    ):  # fmt: skip
        raise ValueError(
            "OutputMix.per_example puts one sample in the place of an example's output; got "
            f"Rollout.num_samples = {rollout.num_samples} and Rollout.target_length = "
            f"{rollout.target_length}. Set them to 1 and None, or per_example to False."
        )
    if any(isinstance(part, SampledReverseKL) for part in parts):
        own = Sample(temperature=experiment.objective.student_temperature)
        if fraction != 1 or experiment.rollout.method != own:
            raise ValueError(
                "SampledReverseKL is an estimate for outputs drawn from the very distribution "
                f"that it measures; got {experiment.outputs} and {experiment.rollout.method}. Set "
                f"OutputMix.student_data_fraction to 1.0 and Rollout.method to {own}, or use "
                "ReverseKL."
            )


def _check_best_metric(experiment: Experiment) -> None:
    name = experiment.checkpoints.best_metric
    if name is not None and experiment.evaluation is None:
        raise ValueError(
            f"Checkpoints.best_metric is measured by an evaluation; got {name!r} and "
            "Experiment.evaluation = None. Set Experiment.evaluation, or best_metric to None."
        )


def no_student(experiment: Experiment) -> str:
    """The message where neither the run nor the configuration has a student's parameters."""
    return (
        f"there is no checkpoint in Experiment.model_dir ({experiment.model_dir}), and "
        "Student.initial_checkpoint is None. Set MODEL_DIR to a run's folder, or "
        "Student.initial_checkpoint to a checkpoint."
    )
