"""A whole experiment as one frozen dataclass: what a gin file or a Python user fills in."""

import dataclasses

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.optimizers import Optimizer
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.rewards import RewardMix, SequenceReverseKL
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import AbstractTeacher
from gkd_jax.experiment.settings import (
    Alarms,
    Checkpoints,
    Evaluation,
    Export,
    Generation,
    NonFinite,
    Storing,
    Student,
    check_kinds,
    require_positive,
)
from gkd_jax.models.base import LanguageModel
from gkd_jax.models.wrapper import restrict_vocabulary
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, complete.

    Attributes:
      student: the model that is trained.
      objective: divergence, temperatures, reduction.
      train_data: the training examples and the global batch size.
      optimizer: optimizer and learning-rate schedule.
      num_steps: updates in all.
      model_dir: where checkpoints, metrics and predictions go. A run that was stopped goes on
        from the last checkpoint in it.
      teacher: who scores: a network, several, the student itself at another time, or a store of
        what a teacher said (`gkd_jax.distillation.teachers`); None for fine-tuning (SFT).
      outputs: Algorithm 1's coin: how often a step trains on the student's own outputs.
      rollout: how the student's outputs are sampled in training.
      reward: a reward of the student's own outputs beside the divergence (`RewardMix`: RL), or
        the teacher's judgement of whole outputs (`SequenceReverseKL`: MiniLLM); None for the
        divergence of each token alone.
      replay: keeps sampled outputs to train on them again; None trains on each once.
      evaluation: what is measured on held-out examples; None for nothing.
      generation: what `--run_mode=generate` writes.
      storing: what `--run_mode=store_teacher` writes.
      export: what `--run_mode=export` writes.
      topology: what `--run_mode=compile_ahead` compiles for, such as 'v5e:4x4'.
      partitioner: the device mesh and the rules that shard arrays over it.
      num_microbatches: parts of the batch whose gradients are added up before an update.
      checkpoints: when states are saved and which are kept.
      alarms: shares above which a warning is logged.
      non_finite: what happens when a step's loss or gradient is NaN or infinite.
      hang_seconds: after so long without a step or an evaluation's batch each process writes the
        stacks of its threads and ends; None waits for ever.
      profile_steps: first and last step of a trace for a profiler, counted from 1; None for none.
      log_period: steps between lines of training metrics.
      seed: root of every random number of the run, apart from the order of examples, which is
        the data's own.
    """

    student: Student
    objective: Objective
    train_data: DatasetConfig
    optimizer: Optimizer
    num_steps: int
    model_dir: str
    teacher: AbstractTeacher | None = None
    outputs: OutputMix = dataclasses.field(default_factory=OutputMix)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    reward: RewardMix | SequenceReverseKL | None = None
    replay: Replay | None = None
    evaluation: Evaluation | None = None
    generation: Generation | None = None
    storing: Storing | None = None
    export: Export | None = None
    topology: str | None = None
    partitioner: Partitioner = dataclasses.field(default_factory=Partitioner)
    num_microbatches: int = 1
    checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
    alarms: Alarms = dataclasses.field(default_factory=Alarms)
    non_finite: NonFinite = dataclasses.field(default_factory=NonFinite)
    hang_seconds: float | None = 3600.0
    profile_steps: tuple[int, int] | None = None
    log_period: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        require_positive(self, "num_steps", "num_microbatches", "log_period")
        self._check_watching()
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(
                f"Experiment.seed must be from 0 to 2**32 - 1; got {self.seed}. Set another."
            )
        if self.teacher is not None and not isinstance(self.teacher, AbstractTeacher):
            raise ValueError(
                f"Experiment.teacher must be a teacher; got {self.teacher!r}. Use a class of "
                "gkd_jax.distillation.teachers, e.g. Teacher(model, checkpoint); in gin, "
                "@teachers.Teacher() with brackets."
            )

    def _check_watching(self) -> None:
        if self.hang_seconds is not None and not self.hang_seconds > 0:
            raise ValueError(
                f"Experiment.hang_seconds must be above 0; got {self.hang_seconds}. Set it "
                "(HANG_SECONDS) to None to wait for ever."
            )
        steps = self.profile_steps
        if steps is None:
            return
        # A list where it comes from gin.
        given = tuple(steps)
        if len(given) != 2 or not 1 <= given[0] <= given[1] <= self.num_steps:
            raise ValueError(
                "Experiment.profile_steps must be the first and the last step of a trace, from 1 "
                f"to num_steps ({self.num_steps}); got {given}. Set it (PROFILE_STEPS) to a pair "
                "such as (10, 12)."
            )
        object.__setattr__(self, "profile_steps", given)

    @property
    def start(self) -> str:
        """What the student's parameters are before training, as text."""
        return self.student.initial_checkpoint or f"random parameters of seed {self.seed}"

    @property
    def student_model(self) -> LanguageModel:
        """The student as training and its divergences take it.

        Over the entries of the output layer that the teacher has too: a token beyond them would
        have no embedding in the teacher. Where there is no teacher, and where a student is decoded
        to be judged or used, it is `student.model`, all of it.
        """
        sizes: tuple[int, ...] = ()
        if self.teacher is not None and self.objective.divergence.needs_teacher:
            sizes = self.teacher.vocab_sizes
        return restrict_vocabulary(self.student.model, min((self.student.model.vocab_size, *sizes)))

    @property
    def teacher_model(self) -> LanguageModel | None:
        """The model that scores, over the entries that the student has too.

        None without a teacher, or where it is a store.
        """
        return None if self.teacher is None else self.teacher.model_for(self.student_model)
