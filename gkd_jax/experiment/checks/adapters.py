"""Checks and descriptions of a student with adapters (`models.lora.LoRA`) and its frozen base."""

from collections.abc import Mapping
from typing import Any

import jax

from gkd_jax.checkpoints import load
from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models import lora
from gkd_jax.models.base import LanguageModel


def check_base(experiment: Experiment) -> None:
    """Checks that a student with adapters has an initial checkpoint with its base.

    Raises:
      ValueError: the initial checkpoint is not set.
    """
    student = experiment.student
    if lora.has_adapters(student.model) and student.initial_checkpoint is None:
        raise ValueError(
            "LoRA trains adapters of a model that is there already, and a run keeps the adapters "
            "alone; got Student.initial_checkpoint = None. Set it (INITIAL_CHECKPOINT_PATH) to "
            "the base's checkpoint."
        )


def describe_frozen(frozen: Params | None) -> dict[str, Any]:
    """Returns the entries of a checkpoint's metadata that identify the frozen parameters.

    The checkpoint itself does not hold these parameters.
    """
    return {} if frozen is None else {"base": lora.fingerprint(frozen)}


def check_frozen(
    experiment: Experiment, described: Mapping[str, Any], host: Mapping[str, Any]
) -> None:
    """Checks that the restored base has the weights on which a checkpoint's adapters were trained.

    Args:
      experiment: the experiment.
      described: result of `describe_frozen` for the restored base.
      host: metadata of the checkpoint.

    Raises:
      ValueError: the bases are different.
    """
    if described.get("base") != host.get("base"):
        raise ValueError(
            f"Student.initial_checkpoint {experiment.student.initial_checkpoint} holds other "
            "weights than those that the adapters in Experiment.model_dir "
            f"({experiment.model_dir}) were trained on. Set it (INITIAL_CHECKPOINT_PATH) to the "
            "base of that run, with the same LoRA.base_dtype, or train in a new MODEL_DIR."
        )


def check_whole(setting: str, path: str, *models: LanguageModel | None) -> None:
    """Checks that a checkpoint holds a whole model, not only adapters.

    Args:
      setting: the setting that gives the path, for messages.
      path: the checkpoint.
      models: models whose parameters the checkpoint must hold or will hold; None is skipped. If no
        models are given, the shapes in the checkpoint itself are inspected.

    Raises:
      ValueError: the checkpoint holds adapters alone.
    """
    if models:
        is_whole = not any(lora.has_adapters(model) for model in models)
    else:
        is_whole = not lora.are_adapters(load.describe_checkpoint(path).shapes)
    if not is_whole:
        raise ValueError(
            f"{setting} must hold a whole model; got {path} with LoRA, whose runs keep the "
            "adapters alone. Export that run (--run_mode=export), which merges them into the base, "
            "and set it to the directory that this writes, with the model that the base is."
        )


def describe_memory(experiment: Experiment) -> str:
    """Describes in one line the trained and the frozen parameters and the optimizer state."""
    model = experiment.student.model
    trained, frozen = lora.split(model, model.abstract_params())
    init = experiment.optimizer.build().init
    state = _num_bytes(jax.eval_shape(init, trained))
    line = f"trained: {_describe(trained)}, with {state:,} bytes of optimizer state"
    if frozen is None:
        return line
    every = _num_bytes(jax.eval_shape(init, lora.base_of(model).abstract_params()))
    return f"{line} ({every:,} where all were trained); frozen: {_describe(frozen)}"


def _describe(tree: PyTree[jax.ShapeDtypeStruct]) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return f"{count:,} parameters of {_num_bytes(tree):,} bytes"


def _num_bytes(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
