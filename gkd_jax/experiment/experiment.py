"""A whole run as one frozen dataclass, filled in by a gin file or in Python."""

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
    """All settings of one run.

    Attributes:
      student: model that is trained, and its initial checkpoint.
      objective: divergence, temperatures and reduction.
      train_data: training examples and the global batch size.
      optimizer: optimizer and learning-rate schedule.
      num_steps: total number of updates.
      model_dir: folder or bucket for checkpoints, metrics and predictions. A run that was stopped
        resumes from the last checkpoint there.
      teacher: model whose predictions the student is trained to match: one or more frozen networks,
        the student itself (initial, averaged, live), or precomputed distributions
        (`gkd_jax.distillation.teachers`). None for supervised fine-tuning (SFT).
      outputs: share of steps that train on the student's own outputs (lambda of GKD's Algorithm 1).
      rollout: sampling of the student's outputs during training.
      reward: reward of the student's own outputs in addition to the divergence (`RewardMix`, for
        RL), or the sequence-level reverse KL (`SequenceReverseKL`, for MiniLLM). If None,
        only the divergence of each token is minimised.
      replay: buffer of sampled outputs that are trained on again; if None, each output is
        used once.
      evaluation: evaluation on held-out examples; None for no evaluation.
      generation: settings of `--run_mode=generate` and `--run_mode=interactive`.
      storing: settings of `--run_mode=store_teacher`.
      export: settings of `--run_mode=export`.
      topology: TPU topology that `--run_mode=compile_ahead` compiles for, such as 'v5e:4x4'.
      partitioner: device mesh and the rules that shard arrays over it.
      num_microbatches: number of microbatches whose gradients are accumulated for one update.
      checkpoints: saving of checkpoints.
      alarms: thresholds above which a warning is logged.
      non_finite: handling of steps whose loss or gradient is NaN or infinite.
      hang_seconds: time limit in seconds for each step and each evaluation batch. If no step
        and no evaluation batch finishes within this time, each process writes the stacks of its
        threads and exits. None disables the limit.
      profile_steps: first and last step of a profiler trace, counted from 1; None for no trace.
      log_period: number of steps between lines of training metrics.
      seed: seed of all random numbers of the run. Only the order of examples has another seed,
        `train_data.seed`.
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
        # gin may give a list.
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
        """Description of the student's initial parameters."""
        return self.student.initial_checkpoint or f"random parameters of seed {self.seed}"

    @property
    def student_model(self) -> LanguageModel:
        """The student's model, restricted to the vocabulary entries that the teacher has too.

        Training and divergences use this model, since the teacher has no embedding for tokens
        outside the shared entries. Without a teacher it is `student.model` itself. Task metrics,
        generation and export always use `student.model`.
        """
        sizes: tuple[int, ...] = ()
        if self.teacher is not None and self.objective.divergence.needs_teacher:
            sizes = self.teacher.vocab_sizes
        return restrict_vocabulary(self.student.model, min((self.student.model.vocab_size, *sizes)))

    @property
    def teacher_model(self) -> LanguageModel | None:
        """The teacher's model, restricted to the vocabulary entries that the student has too.

        None if there is no teacher or its distributions are precomputed.
        """
        return None if self.teacher is None else self.teacher.model_for(self.student_model)
