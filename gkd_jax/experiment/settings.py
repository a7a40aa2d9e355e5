"""Settings of an experiment: frozen dataclasses that check their values on construction."""

import dataclasses
import types
import typing
from typing import Any

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.distillation.stored_distributions import Sparsification, TopK
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.t5_config import DTYPES
from gkd_jax.sampling.decode import DecodingMethod
from gkd_jax.sampling.methods import Greedy, Sample


def require_positive(owner: object, *names: str, otherwise: str = "") -> None:
    """Raises a `ValueError` if one of the named fields is less than 1.

    Args:
      owner: a dataclass.
      *names: names of its fields.
      otherwise: end of the error message. It tells users who set 0 to switch a feature off what to
        set instead.
    """
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be at least 1; got {value}. "
                f"Set {type(owner).__name__}.{name} to a positive number"
                f"{', or ' if otherwise else ''}{otherwise}."
            )


def check_kinds(owner: Any) -> None:
    """Checks that the fields of a dataclass have values of the annotated types.

    A field may be None only if its annotation allows None. The class of any other value is checked
    only if all classes in the annotation are dataclasses.

    Raises:
      ValueError: a field is None although its annotation excludes None, or is not an instance of
        the annotated dataclass.
    """
    for field in dataclasses.fields(owner):
        name = f"{type(owner).__name__}.{field.name}"
        value = getattr(owner, field.name)
        kinds = typing.get_args(field.type) or (field.type,)
        classes = tuple(kind for kind in kinds if kind is not types.NoneType)
        if value is None:
            is_wrong = types.NoneType not in kinds
        else:
            is_wrong = all(map(dataclasses.is_dataclass, classes)) and not isinstance(
                value, classes
            )
        if is_wrong:
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in classes)
            defaults = (field.default, field.default_factory)
            required = all(default is dataclasses.MISSING for default in defaults)
            remedy = "" if required else ", or leave the setting out for its default"
            raise ValueError(
                f"{name} must be of the kind {wanted}; got {value!r}. Set {name} to one (in gin, "
                f"an instance is written with brackets: @module.Name()){remedy}."
            )


@dataclasses.dataclass(frozen=True)
class Student:
    """The model that is trained.

    Attributes:
      model: the student's model.
      initial_checkpoint: checkpoint of gkd_jax, T5X or Hugging Face from which training starts.
        GKD starts from a student that was fine-tuned on the task. If None, training starts
        from random parameters. The frozen base of a model with adapters (`LoRA`) is read from this
        checkpoint at every start, also when a run resumes.
    """

    model: LanguageModel
    initial_checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out examples, during training and by `--run_mode=eval`.

    Attributes:
      data: held-out examples.
      period: number of steps between evaluations. There is also an evaluation before the first step
        and one after the last. For no evaluation, set `Experiment.evaluation` to None.
      method: decoding method for the task's metrics.
      num_divergence_examples: number of examples for which the objective is measured, rounded up to
        whole batches. The objective is measured on the data's outputs and, if there is a teacher
        that can score them, on the student's samples. 0 skips both.
    """

    data: DatasetConfig
    period: int = 1000
    method: DecodingMethod = dataclasses.field(default_factory=Greedy)
    num_divergence_examples: int = 512

    def __post_init__(self) -> None:
        check_kinds(self)
        require_positive(self, "period", otherwise="Experiment.evaluation to None for none")
        if self.num_divergence_examples < 0:
            raise ValueError(
                "Evaluation.num_divergence_examples must be at least 0; got "
                f"{self.num_divergence_examples}. Set it to 0 to leave the divergence out."
            )


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Saving of checkpoints, and which of them are kept.

    Attributes:
      period: number of steps between checkpoints. The last step is always saved. With
        `best_metric`, every step that is evaluated is saved as well.
      keep: number of recent checkpoints to keep; None keeps all.
      best_metric: evaluation metric, for example 'bleu', whose best checkpoint is kept as well;
        None keeps recent checkpoints only.
      best_mode: 'max' if a higher metric is better, 'min' if a lower metric is better.
    """

    period: int = 1000
    keep: int | None = 2
    best_metric: str | None = None
    best_mode: str = "max"

    def __post_init__(self) -> None:
        check_kinds(self)
        require_positive(self, "period", *(() if self.keep is None else ("keep",)))
        if self.best_mode not in ("max", "min"):
            raise ValueError(
                f"Checkpoints.best_mode must be 'max' or 'min'; got {self.best_mode!r}."
            )


@dataclasses.dataclass(frozen=True)
class Alarms:
    """Thresholds for warnings about degenerate outputs.

    A warning is logged if a share is above its threshold.

    Attributes:
      truncated_share: threshold for the share of sampled outputs that do not end within the target
        length.
      repetition: threshold for the share of repeated 4-grams within sampled outputs.
    """

    truncated_share: float = 0.5
    repetition: float = 0.5

    def __post_init__(self) -> None:
        check_kinds(self)


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Handling of steps whose loss or gradient is NaN or infinite.

    With either action, the batch is written to `non_finite/` in the run's folder, as text and as
    arrays.

    Attributes:
      action: 'stop' ends the run; 'skip' continues with parameters and optimizer state unchanged.
      most_in_a_row: maximum number of consecutive skipped steps. The run ends if the loss or the
        gradient of the next step is not finite either.
    """

    action: str = "stop"
    most_in_a_row: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "most_in_a_row")
        if self.action not in ("stop", "skip"):
            raise ValueError(
                f"NonFinite.action must be 'stop' or 'skip'; got {self.action!r}. Set it "
                "(NON_FINITE_ACTION) to one of them."
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings of `--run_mode=generate`, which writes the outputs of a model.

    Attributes:
      data: prompts, vocabulary and lengths.
      output: JSON lines file to write, with the fields `inputs` (the whole prompt), `targets` (the
        sampled text), `references`, `log_prob` and `index`. The task `recipes.instruction` over a
        `JsonLines` source reads the file as training data, with unchanged prompts.
      model: model that generates, 'student' or 'teacher'. The teacher's outputs are the training
        data of sequence-level distillation.
      method: decoding method.
      num_samples: number of outputs per prompt.
      prompts: file of prompts to use instead of those in `data`; '-' reads standard input. A file
        with the suffix .jsonl has JSON lines with the field 'inputs'. Other files have one prompt
        per line. Each prompt is the whole text that the model reads.
    """

    data: DatasetConfig
    output: str
    model: str = "student"
    method: DecodingMethod = dataclasses.field(default_factory=Greedy)
    num_samples: int = 1
    prompts: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        require_positive(self, "num_samples")
        if self.model not in ("student", "teacher"):
            raise ValueError(
                f"Generation.model must be 'student' or 'teacher'; got {self.model!r}."
            )
        if self.num_samples > 1 and not isinstance(self.method, Sample):
            raise ValueError(
                "Generation.num_samples above 1 needs a random method; got "
                f"{self.num_samples} and {self.method}. Set Generation.method to Sample()."
            )


@dataclasses.dataclass(frozen=True)
class Storing:
    """Settings of `--run_mode=store_teacher`, which writes the teacher's distributions.

    There is one distribution for each token of the data's outputs, at the objective's teacher
    temperature. `teachers.StoredTeacher` reads them in training.

    Attributes:
      data: examples whose outputs the teacher scores, such as the training examples. Their order
        does not matter.
      output: folder to write.
      sparsification: choice of the entries of each distribution that are stored: the whole
        vocabulary, the most likely tokens, or tokens drawn from the distribution.
    """

    data: DatasetConfig
    output: str
    sparsification: Sparsification = dataclasses.field(default_factory=TopK)

    def __post_init__(self) -> None:
        if not isinstance(self.sparsification, Sparsification):
            raise ValueError(
                f"Storing.sparsification must be a Sparsification; got {self.sparsification!r}. "
                "Use Full(), TopK() or Draws() of gkd_jax.distillation.stored_distributions; in "
                "gin, @stored_distributions.TopK() with brackets."
            )


@dataclasses.dataclass(frozen=True)
class Export:
    """Settings of `--run_mode=export`, which writes the student for Hugging Face or T5X.

    Adapters (`LoRA`) are merged into their base unless `adapters` is set.

    Attributes:
      output: local directory to create. It must not exist.
      format: 'hf' for a directory that `transformers` loads, or 't5x' for a directory with a
        native T5X checkpoint, `checkpoint_<step>`. 't5x' is for T5 models only.
      dtype: dtype of the weights, 'bfloat16' or 'float32'.
      tokenizer: checkpoint directory whose tokenizer files are copied. If None, the files of the
        training data's vocabulary are copied.
      shard_bytes: maximum size in bytes of a weights file in format 'hf'.
      adapters: whether only the adapters are written, in PEFT's format.
    """

    output: str
    format: str = "hf"
    dtype: str = "bfloat16"
    tokenizer: str | None = None
    shard_bytes: int = 5_000_000_000
    adapters: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "shard_bytes")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"Export.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}. Set it to "
                "one of them."
            )
        if self.format not in ("hf", "t5x"):
            raise ValueError(
                f"Export.format must be 'hf' or 't5x'; got {self.format!r}. Set it (EXPORT_FORMAT) "
                "to 'hf' for Hugging Face's transformers, or to 't5x' for T5X."
            )
        if self.format == "t5x" and self.adapters:
            raise ValueError(
                "Export.adapters writes adapters as PEFT loads them; got Export.format = 't5x', "
                "and T5X has none. Set adapters (EXPORT_ADAPTERS) to False to write them merged, "
                "or format (EXPORT_FORMAT) to 'hf'."
            )
