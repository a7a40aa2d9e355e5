"""One step of training, and the jitted functions that it calls.

A random draw decides whether a step samples outputs. If the run has a reward, the sampled outputs
are scored. Then the parameters are updated.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax.common.array_types import Metrics, Params, PyTree
from gkd_jax.common.batch import Batch
from gkd_jax.data.pipeline import Dataset
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import parameter_sources, train_step
from gkd_jax.distillation.optimizers import Optimizer
from gkd_jax.distillation.parameter_sources import ALL_RESTORED, Sources
from gkd_jax.distillation.replay import ReplayBuffer
from gkd_jax.distillation.train_state import TrainState, init_train_state
from gkd_jax.experiment.checks import adapters
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.step_objectives import measured_objective, on_policy_objective
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.objective import Objective
from gkd_jax.training import jitted_functions, parameters
from gkd_jax.training.keys import Purpose, make_key
from gkd_jax.training.profiling import PhaseTimes
from gkd_jax.training.rollout_scoring import make_scorer
from gkd_jax.training.step_kinds import StepKind
from gkd_jax.training.teacher_tokens import make_retokenizer


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """Jitted functions that build and update the training state.

    Attributes:
      init: builds the state from the trainable (not frozen) parameters, whose buffers are
        donated.
      step: makes a training step; the buffers of the old state are donated.
      abstract_state: shapes, dtypes and shardings of the state.
    """

    init: Callable[[Params], TrainState]
    step: train_step.StepFn
    abstract_state: TrainState


# The cache lets runs that call this function with equal arguments, such as many runs of one study,
# share the compiled functions.
@functools.cache
def jit_step_functions(
    student: LanguageModel,
    teacher: LanguageModel | None,
    objective: Objective,
    optimizer: Optimizer,
    partitioner: Partitioner,
    *,
    num_microbatches: int,
    sources: Sources = ALL_RESTORED,
    skips_non_finite: bool = False,
) -> StepFunctions:
    """Jits `init_train_state` and `train_step.make_train_step`."""
    transformation = optimizer.build()
    init = functools.partial(
        init_train_state,
        optimizer=transformation,
        with_average=parameter_sources.average_decay(sources) is not None,
    )
    trained, _ = lora.split(student, student.abstract_params())
    abstract = jax.eval_shape(init, trained)
    param_shardings, _ = lora.split(student, partitioner.param_shardings(student))
    shardings = partitioner.state_shardings(abstract, param_shardings)
    step = train_step.make_train_step(
        student,
        teacher,
        objective,
        transformation,
        num_microbatches=num_microbatches,
        sources=sources,
        skips_non_finite=skips_non_finite,
    )
    return StepFunctions(
        init=jax.jit(init, donate_argnums=0, out_shardings=shardings),
        step=jax.jit(
            partitioner.annotate(step),
            donate_argnums=0,
            out_shardings=(shardings, partitioner.replicated),
        ),
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        ),
    )


def step_functions_of(
    experiment: Experiment, objective: Objective, *, student: LanguageModel | None = None
) -> StepFunctions:
    """Returns the jitted functions of a run for one of its objectives.

    Args:
      experiment: the run.
      objective: the objective of steps on the data, or of steps on samples.
      student: model to use instead of the run's student, such as the same model without
        rematerialisation; None uses the run's student.
    """
    sources = teacher_sources(experiment)
    return jit_step_functions(
        student or experiment.student_model,
        experiment.teacher_model if experiment.objective.divergence.needs_teacher else None,
        objective,
        experiment.optimizer,
        experiment.partitioner,
        num_microbatches=experiment.num_microbatches,
        sources=sources,
        skips_non_finite=experiment.non_finite.action == "skip",
    )


def teacher_sources(experiment: Experiment) -> Sources:
    """Returns the sources of the teacher's parameters; empty if training uses no teacher."""
    teacher = experiment.teacher if experiment.objective.divergence.needs_teacher else None
    return () if teacher is None else teacher.parameter_sources(experiment.student_model)


class Trainer:
    """Makes the steps of a run.

    Holds the jitted functions, the restored parameters of the teacher and the frozen parameters of
    the student. The training state is passed in and returned.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset):
        self.experiment = experiment
        self.dataset = dataset
        student, partitioner = experiment.student_model, experiment.partitioner
        self.frozen = parameters.load_frozen(experiment)
        self.frozen_description = adapters.describe_frozen(self.frozen)
        self._sources = teacher_sources(experiment)
        self.teacher_params = parameters.load_teacher(experiment) if self._sources else None
        vocabulary = dataset.config.vocabulary
        functions = step_functions_of(experiment, measured_objective(experiment, vocabulary))
        # If the objective has no reward, this call returns `functions` again, from the cache.
        on_policy = step_functions_of(experiment, on_policy_objective(experiment))
        self.on_policy_step_fn = on_policy.step
        self._scorer = make_scorer(experiment, dataset)
        self._retokenizer = make_retokenizer(experiment, vocabulary)
        self.phases = PhaseTimes()
        self.abstract_state: PyTree[jax.ShapeDtypeStruct] = functions.abstract_state
        self._init_fn, self.step_fn = functions.init, functions.step
        assistance, sampled_model = experiment.rollout.teacher_assistance, student
        self._is_teacher_assisted = assistance is not None
        if assistance is not None:
            assert experiment.teacher_model is not None
            sampled_model = assistance.combine(student, experiment.teacher_model)
        self.rollout_fn = jitted_functions.jit_rollout(
            experiment.rollout,
            sampled_model,
            partitioner,
            eos_ids=vocabulary.eos_ids,
            pad_id=vocabulary.pad_id,
        )
        self.rollout_metrics_fn = jitted_functions.jit_rollout_metrics(vocabulary.eos_ids)
        self.mix_fn = jitted_functions.jit_mix_outputs(partitioner)
        self.replay: ReplayBuffer | None = None
        if experiment.replay is not None:
            sampled = jitted_functions.abstract_rollout(experiment)
            self.replay = ReplayBuffer(
                experiment.replay, sampled, partitioner, seed=experiment.seed
            )
            self.abstract_state = self.replay.attach_abstract(functions.abstract_state)

    def init_state(self) -> TrainState:
        """Builds the state before the first step, already sharded."""
        return self._init_fn(parameters.init_params(self.experiment))

    def student_params(self, state: TrainState) -> Params:
        """Returns all parameters of the student at this state, trainable and frozen."""
        return lora.join(state.params, self.frozen)

    def _rollout_params(self, state: TrainState) -> Params:
        """Returns the parameters that outputs are sampled with: the student's, or both models'."""
        student_params = self.student_params(state)
        if self._is_teacher_assisted:
            return (student_params, self.teaching_params(state))
        return student_params

    def teaching_params(self, state: TrainState) -> Params | None:
        """Returns the parameters of the teacher's model at this state; None without a teacher."""
        return parameter_sources.resolve(self._sources, state, self.teacher_params, self.frozen)

    def step(
        self, state: TrainState, batch: Batch, step: int
    ) -> tuple[TrainState, dict[str, Metrics], Batch]:
        """Makes update number `step`, counted from 0.

        A random draw decides whether the step trains on the targets of the batch or on outputs of
        the student. With `OutputMix.per_example`, a separate draw decides for each example instead.
        Sampling and scoring use the parameters before the update.

        Returns:
          The new state, the metrics by group, and the batch that the step trained on.
        """
        seed, outputs = self.experiment.seed, self.experiment.outputs
        fraction = outputs.fraction(step)
        if outputs.per_example:
            kind = StepKind.MIXED if fraction > 0 else StepKind.DATA
        else:
            is_on_policy = outputs.is_on_policy(step, seed=seed)
            kind = StepKind.ON_POLICY if is_on_policy else StepKind.DATA
        groups: dict[str, Metrics] = {}
        replay = self.replay
        if kind == StepKind.ON_POLICY and replay is not None and replay.is_used(step):
            self.phases.begin(StepKind.REPLAY, state)
            batch, staleness = replay.draw(step)
            state, batch = self._update(state, batch, step, StepKind.REPLAY, groups)
            groups[StepKind.REPLAY] |= {"staleness": staleness}
            return state, groups, batch
        self.phases.begin(kind, state)
        if kind != StepKind.DATA:
            sampled = self._sample(state, batch, step, groups)
            if kind == StepKind.MIXED:
                key = make_key(seed, Purpose.EXAMPLE_COIN, step)
                batch = self.mix_fn(batch, sampled, jnp.float32(fraction), key)
            else:
                batch = sampled
        state, batch = self._update(state, batch, step, kind, groups)
        return state, groups, batch

    def _sample(
        self, state: TrainState, batch: Batch, step: int, groups: dict[str, Metrics]
    ) -> Batch:
        """Samples outputs, and scores them if the run has a reward.

        If the run has a replay buffer, the outputs are also added to it, without their scores.
        """
        key = make_key(self.experiment.seed, Purpose.ROLLOUT, step)
        with self.phases.phase("rollout") as wait:
            sampled = wait(self.rollout_fn(self._rollout_params(state), batch, key))
        groups["rollout"] = self.rollout_metrics_fn(sampled)
        unscored = sampled = jitted_functions.without_log_probs(sampled)
        if self._scorer is not None:
            params, teaching_params = self.student_params(state), self.teaching_params(state)
            with self.phases.phase("reward") as wait:
                scored = self._scorer(params, teaching_params, batch, sampled)
                sampled, groups["reward"] = wait(scored)
        if self.replay is not None:
            self.replay.add(unscored, step)
        return sampled

    def _update(
        self,
        state: TrainState,
        batch: Batch,
        step: int,
        kind: StepKind,
        groups: dict[str, Metrics],
    ) -> tuple[TrainState, Batch]:
        if self._retokenizer is not None:
            with self.phases.phase("reading") as wait:
                batch, groups["spans"] = wait(self._retokenizer(batch))
        key = make_key(self.experiment.seed, Purpose.DROPOUT, step)
        step_fn = self.on_policy_step_fn if kind == StepKind.ON_POLICY else self.step_fn
        with self.phases.phase("update") as wait:
            arguments = (state, self.teacher_params, batch, key, self.frozen)
            state, groups[kind] = wait(step_fn(*arguments))
        return state, batch
