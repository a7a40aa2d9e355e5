"""Settings of an experiment: frozen dataclasses, each checked when it is made."""

import dataclasses
import types
import typing
from typing import Any

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.distillation.stored_distributions import Support, TopK
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.t5_config import DTYPES
from gkd_jax.sampling.decode import DecodingMethod
from gkd_jax.sampling.methods import Greedy, Sample


def require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise ValueError(
                f"{type(owner).__name__}.{name} must be at least 1; got {value}. "
                f"Set {type(owner).__name__}.{name} to a positive number."
            )


def check_kinds(owner: Any) -> None:
    """Refuses None where a field may not be None, and what is no instance of its dataclass."""
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
      initial_checkpoint: where training starts: a checkpoint of gkd_jax, of T5X or of Hugging
        Face. GKD starts from a student already fine-tuned on the task. None starts from scratch.
        A model with adapters (`LoRA`) has its base from here, at every start.
    """

    model: LanguageModel
    initial_checkpoint: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out examples, during training and by `--run_mode=eval`.

    Attributes:
      data: the examples.
      period: steps between evaluations; the first is before the first step, the last after the
        last.
      method: how outputs are decoded for the task's metrics.
      num_divergence_examples: on how many examples the objective is measured (in whole batches),
        on the data's outputs and, where there is a teacher, on the student's own samples too;
        0 for neither.
    """

    data: DatasetConfig
    period: int = 1000
    method: DecodingMethod = dataclasses.field(default_factory=Greedy)
    num_divergence_examples: int = 512

    def __post_init__(self) -> None:
        check_kinds(self)
        require_positive(self, "period")
        if self.num_divergence_examples < 0:
            raise ValueError(
                "Evaluation.num_divergence_examples must be at least 0; got "
                f"{self.num_divergence_examples}. Set it to 0 to leave the divergence out."
            )


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When states are saved and which are kept.

    Attributes:
      period: steps between saves; the last step is always saved, and with `best_metric` every
        step that is evaluated.
      keep: how many recent checkpoints to keep; None keeps all.
      best_metric: the evaluation metric whose best checkpoint is kept too, e.g. 'bleu'; None
        keeps no best.
      best_mode: 'max' or 'min'.
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
    """Shares above which a warning is logged: signs that outputs collapse or never end.

    Attributes:
      truncated_share: share of sampled outputs that do not end within the target length.
      repetition: share of repeated 4-grams within sampled outputs.
    """

    truncated_share: float = 0.5
    repetition: float = 0.5

    def __post_init__(self) -> None:
        check_kinds(self)


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """What happens when the loss or the gradient of a step is NaN or infinite.

    The batch is written to `non_finite/` in the run's folder, as text and as arrays.

    Attributes:
      action: 'stop' ends the run; 'skip' leaves parameters and optimizer as they were, and goes on.
      most_in_a_row: of skipped steps; one more ends the run.
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
    """What `--run_mode=generate` writes.

    Attributes:
      data: the prompts, and the vocabulary and lengths.
      output: the JSON lines file to write: `inputs` (the whole prompt), `targets` (the sampled
        text), `references`, `log_prob`, `index`. The task `recipes.instruction` over a
        `JsonLines` source reads it back as training data, prompts as they are.
      model: 'student' or 'teacher' (sequence-level distillation trains on the teacher's).
      method: how outputs are decoded.
      num_samples: outputs a prompt.
      prompts: a file of prompts in the place of the data's, each the whole of what a model reads:
        one a line, JSON lines with the field 'inputs' (.jsonl), or '-' for standard input.
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
    """What `--run_mode=store_teacher` writes: the teacher's distributions for the data's outputs.

    At the objective's teacher temperature. `teachers.StoredTeacher` reads them back.

    Attributes:
      data: the examples, such as those of training; the order is of no account.
      output: the folder to write.
      support: what is kept of a distribution: the whole, the likeliest tokens, or draws from it.
    """

    data: DatasetConfig
    output: str
    support: Support = dataclasses.field(default_factory=TopK)

    def __post_init__(self) -> None:
        if not isinstance(self.support, Support):
            raise ValueError(
                f"Storing.support must be a support; got {self.support!r}. Use Full(), TopK() or "
                "Draws() of gkd_jax.distillation.stored_distributions; in gin, "
                "@stored_distributions.TopK() with brackets."
            )


@dataclasses.dataclass(frozen=True)
class Export:
    """What `--run_mode=export` writes: the student as a checkpoint of Hugging Face or of T5X.

    Adapters (`LoRA`) are merged into their base, unless they are wanted alone.

    Attributes:
      output: the local directory to make, which does not exist yet.
      format: 'hf', a directory that `transformers` loads; or 't5x', one that holds the native T5X
        checkpoint `checkpoint_<step>` of a T5.
      dtype: of the weights, 'bfloat16' or 'float32'.
      tokenizer: directory of a checkpoint whose tokenizer files are copied; None takes those of
        the training's vocabulary.
      shard_bytes: most bytes of a file of weights, in format 'hf'.
      adapters: whether the adapters alone are written, as PEFT loads them onto the base.
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
