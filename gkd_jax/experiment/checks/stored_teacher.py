"""Checks that a stored teacher fits the run, and adds the teacher's fields to data sets."""

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.teacher_store import StoreReader
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.settings import Storing


def check_stored_teacher(experiment: Experiment) -> None:
    """Checks that a run with a stored teacher trains on the data's outputs alone.

    The store has no distributions for other outputs.

    Raises:
      ValueError: the run also trains on the student's own outputs.
    """
    teacher, outputs = experiment.teacher, experiment.outputs
    if teacher is None or teacher.store_for("train_data") is None:
        return
    if experiment.objective.divergence.needs_teacher and outputs.student_data_fraction != 0:
        raise ValueError(
            f"{teacher} holds what a teacher said of the data's outputs, and knows no others; got "
            f"{outputs}. Set OutputMix.student_data_fraction (STUDENT_DATA_FRACTION) to 0.0, or "
            "take the teacher itself."
        )


def attach_teacher(experiment: Experiment, name: str, dataset: Dataset) -> None:
    """Adds to a data set's batches the fields that the teacher reads.

    The fields are stored distributions, the source of each example in a mixture, or prompts in the
    teacher's own tokens.

    Args:
      experiment: the experiment.
      name: 'train_data', 'eval_data' or 'storing_data'. Other data sets get no fields.
      dataset: the opened data set.

    Raises:
      FileNotFoundError, ValueError: the store does not exist, or does not fit the data, the
        student, the temperature or the divergence; or the data are not the mixture that the teacher
        needs.
    """
    teacher, objective = experiment.teacher, experiment.objective
    if teacher is None:
        return
    if teacher.num_sources is not None and (
        name == "storing_data" or (name != "generation_data" and objective.divergence.needs_teacher)
    ):
        dataset.use_source_ids(teacher.num_sources)
    if not objective.divergence.needs_teacher:
        return
    if name not in ("train_data", "eval_data"):
        return
    own = teacher.own_tokens
    if own is not None:
        dataset.use_teacher_vocabulary(
            own.vocabulary, inputs_length=own.inputs_length, inputs_eos=own.inputs_eos,
            inputs_bos=own.inputs_bos,
        )  # fmt: skip
    path = teacher.store_for(name)
    if path is None:
        return
    dataset.use_stored_teacher(path)
    assert dataset.stored_teacher is not None
    _check_fits(experiment, path, dataset.stored_teacher)


def _check_fits(experiment: Experiment, path: str, store: StoreReader) -> None:
    about, objective = store.description, experiment.objective
    vocab_size = experiment.student.model.vocab_size
    problems = []
    if about["vocab_size"] != vocab_size:
        problems.append(
            f"it is of a teacher whose output layer has {about['vocab_size']} entries, and the "
            f"student's has {vocab_size}: set vocab_size of both models alike"
        )
    if about["temperature"] != objective.teacher_temperature:
        problems.append(
            f"it is of the teacher temperature {about['temperature']}, and the objective's is "
            f"{objective.teacher_temperature}: set Objective.teacher_temperature "
            "(TEACHER_TEMPERATURE) to that of the store"
        )
    if about["packing"]["kind"] == "counts" and not objective.divergence.is_linear_in_teacher:
        problems.append(
            f"{about['support']} estimates the teacher's distribution without bias, but not "
            f"{objective.divergence}, which is not linear in it: use ForwardKL, or a store of TopK"
        )
    if problems:
        raise ValueError(f"the store {path} cannot be used: {'; '.join(problems)}.")


def storing_of(experiment: Experiment) -> Storing:
    """Returns the settings of `--run_mode=store_teacher`.

    Raises:
      ValueError: `Experiment.storing` is None, the teacher has no model, or the teacher has a
        tokenizer of its own.
    """
    if experiment.storing is None:
        raise ValueError(
            "--run_mode=store_teacher writes what Experiment.storing says; got None. Set it "
            "(gin_configs/store_teacher.gin)."
        )
    if experiment.teacher_model is None:
        raise ValueError(
            "--run_mode=store_teacher needs a teacher with a model; got Experiment.teacher = "
            f"{experiment.teacher}. Set it to the teacher itself."
        )
    assert experiment.teacher is not None
    if experiment.teacher.own_tokens is not None:
        raise ValueError(
            "--run_mode=store_teacher keeps distributions over the student's tokens; got "
            f"{experiment.teacher}, which has tokens of its own. Train with it directly."
        )
    return experiment.storing
