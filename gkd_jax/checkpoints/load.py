"""Loading parameters from a checkpoint of any supported kind."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from gkd_jax.checkpoints import hf, layout
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.checkpoints.manifest import MANIFEST, CorruptCheckpointError, verify_manifest
from gkd_jax.common import hub
from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.devices.stacked_layers import layer_shape, stack_params, stacked_shape
from gkd_jax.models import stacking


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint, without the values of its arrays.

    Attributes:
      kind: 'run' (the directory of a run, whose last checkpoint is described), 'state' (one
        checkpoint of a run), 'params' (exported parameters), 't5x-native', 't5x-orbax' or 'hf'
        (Hugging Face).
      folder: folder of the checkpoint itself.
      step: number of updates made; None if unknown.
      shapes: shape and dtype of each parameter, by its name, such as 'decoder/norm/scale'.
      host: JSON values stored beside the arrays; empty for checkpoints of other frameworks.
    """

    kind: str
    folder: str
    step: int | None
    shapes: layout.Shapes
    host: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_params(
    path: epath.PathLike,
    abstract_params: PyTree[jax.ShapeDtypeStruct],
    *,
    step: int | None = None,
    field: str = "params",
) -> Params:
    """Loads parameters from a checkpoint of any kind.

    The optimizer state is not read. If the checkpoint has digests, its files are verified first.

    Args:
      path: the directory of a run (its last intact checkpoint is loaded), one `checkpoint_<step>`
        of a run, a folder written by `save_params`, a T5X checkpoint (native or Orbax), a Hugging
        Face directory with safetensors files, or the name of a model on the Hugging Face hub.
      abstract_params: shape, dtype and sharding of each parameter. Stored values are converted to
        this dtype, such as bfloat16 for a teacher.
      step: step to load if `path` is the directory of a run; None loads the last intact
        checkpoint.
      field: field of a run's state to load: 'params', or 'average' if the run keeps an average of
        the student's parameters.

    Returns:
      The parameters with the requested dtypes and shardings.

    Raises:
      FileNotFoundError: `path` does not exist.
      CorruptCheckpointError: files are missing or have changed since they were written.
      ValueError: `path` is not a checkpoint, or its parameters differ from `abstract_params`.
    """
    folder = _existing(path)
    form = _LayerForm.of(abstract_params, are_stacked=_are_stacked(folder))
    return form.convert(_load(folder, form.stored, step=step, field=field))


def _load(
    folder: epath.Path,
    abstract_params: PyTree[jax.ShapeDtypeStruct],
    *,
    step: int | None,
    field: str,
) -> Params:
    kind = _kind(folder)
    if kind.startswith("t5x"):
        from gkd_jax.checkpoints import t5x

        _check_field({}, field, folder)
        return t5x.read_t5x_params(folder, abstract_params)
    if kind == "hf":
        _check_field({}, field, folder)
        return hf.read_hf_params(folder, abstract_params)
    if kind == "run":
        manager = CheckpointManager(folder, read_only=True)
        folder = manager.folder(manager.choose(step))
    else:
        _verify(folder)
    header = layout.read_header(folder)
    shapes = _field_only(header.shapes, field)
    _check_field(shapes, field, folder)
    layout.check_shapes(shapes, layout.shapes_of(abstract_params), folder=folder)
    nested = layout.read_arrays(folder, {field: layout.to_nested(abstract_params)})
    return layout.from_nested(nested[field], abstract_params)


def describe_checkpoint(path: epath.PathLike, *, field: str = "params") -> CheckpointInfo:
    """Describes a checkpoint without reading its arrays.

    Checks the sizes of files but not their digests.

    Args:
      path: as in `load_params`.
      field: field of a run's state to describe. Checkpoints of other frameworks have only 'params'.

    Raises:
      The errors of `load_params`.
    """
    folder = _existing(path)
    kind = _kind(folder)
    if kind.startswith("t5x"):
        return _describe_t5x(folder, kind)
    if kind == "hf":
        return CheckpointInfo(kind, str(folder), None, hf.shapes(folder))
    if kind == "run":
        manager = CheckpointManager(folder, read_only=True)
        latest = manager.latest_step()
        if latest is None:
            raise FileNotFoundError(
                f"there is no complete checkpoint in {folder}: its only save was cut off. Choose "
                "another path."
            )
        folder = manager.folder(latest)
    verify_manifest(folder, digests=False)
    header = layout.read_header(folder)
    kind = header.kind if kind != "run" else kind
    shapes = _field_only(header.shapes, field)
    return CheckpointInfo(kind, str(folder), header.step, shapes, header.host)


def check_compatible(
    path: epath.PathLike, abstract_params: PyTree[jax.ShapeDtypeStruct], *, field: str = "params"
) -> CheckpointInfo:
    """Checks that a checkpoint has the requested parameters, without reading its arrays.

    Returns:
      The description of the checkpoint.

    Raises:
      The errors of `load_params`. A ValueError about shapes names the first few parameters whose
      shapes differ.
    """
    info = describe_checkpoint(path, field=field)
    is_foreign = info.kind.startswith("t5x") or info.kind == "hf"
    _check_field({} if is_foreign else info.shapes, field, epath.Path(info.folder))
    form = _LayerForm.of(abstract_params, are_stacked=stacking.are_stacked(info.shapes))
    wanted = layout.shapes_of(form.stored)
    layout.check_shapes(info.shapes, wanted, folder=epath.Path(info.folder))
    return info


@dataclasses.dataclass(frozen=True)
class _LayerForm:
    """Conversion of a checkpoint's parameters to stacked or separate layers, as requested.

    Attributes:
      stored: shapes of the requested parameters as they are stored in the checkpoint, i.e. with
        its layers stacked or separate.
      convert: function that converts the parameters read from the checkpoint to the requested form.
    """

    stored: PyTree[jax.ShapeDtypeStruct]
    convert: Callable[[Params], Params] = lambda params: params

    @classmethod
    def of(cls, wanted: PyTree[jax.ShapeDtypeStruct], *, are_stacked: bool) -> "_LayerForm":
        """Returns the conversion from a checkpoint to the parameters `wanted`.

        Args:
          wanted: shapes of the requested parameters, with stacked or separate layers.
          are_stacked: whether the layers are stacked in the checkpoint.
        """
        wants_stacked = stacking.are_stacked(layout.shapes_of(wanted))
        if wants_stacked == are_stacked:
            return cls(wanted)
        if wants_stacked:
            one_by_one = stacking.unstack(wanted, lambda array, _: layer_shape(array))
            return cls(one_by_one, lambda params: stack_params(params, wanted))
        return cls(stacking.stack(wanted, stacked_shape), stacking.unstack)


def _are_stacked(folder: epath.Path) -> bool:
    """Returns whether the layers of a checkpoint are stacked. Reads only its header."""
    kind = _kind(folder)
    if kind == "hf" or kind.startswith("t5x"):
        return False
    folders = [folder]
    if kind == "run":
        manager = CheckpointManager(folder, read_only=True)
        folders = [manager.folder(step) for step in reversed(manager.all_steps())]
    for one in folders:
        try:
            return stacking.are_stacked(layout.read_header(one).shapes)
        except CorruptCheckpointError:
            continue  # The caller reports the error when it reads the checkpoint.
    return False


def _existing(path: epath.PathLike) -> epath.Path:
    folder = hub.find(path)
    if not folder.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: the path does not exist. Set "
            "Student.initial_checkpoint, Teacher.checkpoint or MODEL_DIR to one that does."
        )
    return layout.absolute(folder)


def _kind(folder: epath.Path) -> str:
    """Returns 'run', 'folder' (one checkpoint of gkd_jax), 'hf', 't5x-native' or 't5x-orbax'."""
    ours = (layout.HOST, MANIFEST, layout.UNFINISHED)
    if any((folder / name).exists() for name in ours):
        return "folder"
    if hf.is_hf_checkpoint(folder):
        return "hf"
    steps = [
        child
        for child in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"checkpoint_\d+", child.name)
    ]
    if any((step / name).exists() for step in steps for name in (*ours, layout.ARRAYS)):
        return "run"
    from gkd_jax.checkpoints import t5x

    t5x_kind = t5x.is_t5x_checkpoint(folder)
    if t5x_kind:
        return f"t5x-{t5x_kind}"
    raise ValueError(
        f"{folder} is not a checkpoint. Looked for: checkpoint_<step> folders with {MANIFEST} (a "
        f"run of gkd_jax), {MANIFEST} (one checkpoint of it, or exported parameters), {hf.CONFIG} "
        "(Hugging Face), and T5X's `checkpoint` file or `state` folder. Give the path of one of "
        "those."
    )


def _verify(folder: epath.Path) -> None:
    if not (folder / MANIFEST).exists():
        raise CorruptCheckpointError(
            f"the checkpoint {folder} is unfinished or has lost its {MANIFEST}. Choose another "
            "step, or copy it again from its source."
        )
    try:
        verify_manifest(folder)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(
            f"the checkpoint {folder} cannot be used: {error} Choose another step, or copy it "
            "again from its source."
        ) from error


def _field_only(shapes: layout.Shapes, field: str) -> layout.Shapes:
    prefix = f"{field}/"
    return {
        name.removeprefix(prefix): entry
        for name, entry in shapes.items()
        if name.startswith(prefix)
    }


def _check_field(shapes: layout.Shapes, field: str, folder: epath.Path) -> None:
    """Checks that a checkpoint has the requested field. All checkpoints have 'params'."""
    if field != "params" and not shapes:
        raise ValueError(
            f"the checkpoint {folder} holds no {field} of the student's parameters. Choose a run "
            "that was trained with teachers.AverageStudent as its Experiment.teacher."
        )


def _describe_t5x(root: epath.Path, kind: str) -> CheckpointInfo:
    import tensorstore

    from gkd_jax.checkpoints import t5x

    folder = t5x.find_step(root)
    assert folder is not None
    native = kind == "t5x-native"
    stored = t5x.native_arrays(folder) if native else t5x.orbax_arrays(folder)
    # All arrays are opened concurrently, because opening them one by one is slow in a bucket.
    opening = {
        name: one if isinstance(one, np.ndarray) else tensorstore.open(one, open=True, read=True)
        for name, one in stored.items()
    }
    shapes: layout.Shapes = {}
    for name, one in opening.items():
        if isinstance(one, np.ndarray):
            shapes[name] = (one.shape, str(one.dtype))
        else:
            array = one.result()
            shapes[name] = (tuple(array.shape), array.dtype.name)
    match = re.fullmatch(r"checkpoint_(\d+)", folder.name)
    return CheckpointInfo(kind, str(folder), int(match[1]) if match else None, shapes)
