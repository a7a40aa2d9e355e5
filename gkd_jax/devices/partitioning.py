"""Which array lies where on the device mesh: the only module that builds shardings.

Models name the axes of their parameters ('embed', 'mlp', ...); a table of rules turns those
names into axes of the mesh, 'data' and 'model'. Data parallelism splits the batch over 'data',
tensor parallelism splits wide layers over 'model', and one device is a mesh of 1x1. Several slices,
which a slower network joins, are one more axis, 'slice': it splits the batch, and each slice has
all parameters.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.common.mesh_axes import MeshAxes, use_mesh_axes
from gkd_jax.devices import mesh
from gkd_jax.devices.rules import Rules, table_of
from gkd_jax.models import stacking
from gkd_jax.models.base import LanguageModel

Rows = TypeVar("Rows", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """Which part of every global batch this process must load.

    Processes that together hold one copy of a model load the same part.

    Attributes:
      shard_id: number of the part, from 0.
      num_shards: how many parts there are.
    """

    shard_id: int
    num_shards: int


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh of devices and the rules that lay arrays out on it.

    Attributes:
      model_parallelism: devices that share one copy of a model; must divide the number of heads,
        the MLP's width and the vocabulary.
      data_parallelism: groups of such devices that share a batch; None takes all that there are.
      rules: 'standard' (parameters replicated over 'data'), 'fsdp' (parameters split over 'data'
        too: less memory, more traffic), or a table of (logical axis, mesh axis) pairs.
      teacher_rules: likewise, for the parameters of networks that teach (`teachers.Teacher`); None
        for `rules`. Activations of teacher and student lie as `rules` say.
      num_slices: parts of the devices that a slower network joins: parameters are split within one,
        batches over all. None takes what the devices say (TPU slices; hosts of GPUs). 1 makes one
        mesh of all: 'fsdp' then splits parameters over that network too, for less memory.
      devices: the devices of the mesh; None takes `jax.devices()`.
    """

    model_parallelism: int = 1
    data_parallelism: int | None = None
    rules: str | Rules = "standard"
    teacher_rules: str | Rules | None = None
    num_slices: int | None = None
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self) -> None:
        # Devices are not looked at yet: a Partitioner is made while a configuration is read,
        # before jax.distributed.initialize.
        for name in ("model_parallelism", "data_parallelism", "num_slices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"Partitioner.{name} must be at least 1; got {value}. "
                    f"Set Partitioner.{name} to a divisor of the number of devices."
                )
        for name in ("rules", "teacher_rules"):
            rules = getattr(self, name)
            if rules is not None:
                table = table_of(rules, setting=f"Partitioner.{name}")
                # A list, as gin gives it, could not be hashed.
                object.__setattr__(self, name, rules if isinstance(rules, str) else table)

    @property
    def rule_table(self) -> Rules:
        """The rules as pairs."""
        return table_of(self.rules, setting="Partitioner.rules")

    @property
    def of_teacher(self) -> "Partitioner":
        """The same mesh, with the rules for networks that teach."""
        if self.teacher_rules is None:
            return self
        return dataclasses.replace(self, rules=self.teacher_rules, teacher_rules=None)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh, with axes 'data' and 'model', and before them 'slice' if there are several.

        Raises:
          ValueError: if the devices cannot be laid out so.
        """
        devices = list(self.devices if self.devices is not None else jax.devices())
        if self.data_parallelism is None and len(devices) % self.model_parallelism:
            raise ValueError(
                "Partitioner.model_parallelism must divide the number of devices; got "
                f"{self.model_parallelism} and {len(devices)}. Set it to one of "
                f"{_divisors(len(devices))}."
            )
        data = self.data_parallelism or len(devices) // self.model_parallelism
        needed = data * self.model_parallelism
        if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
            raise ValueError(
                "Partitioner.data_parallelism * Partitioner.model_parallelism must be the number "
                f"of devices; got {data} * {self.model_parallelism} and {len(devices)}. Leave "
                "data_parallelism at None to use all devices."
            )
        return mesh.make_mesh(
            devices[:needed], data, self.model_parallelism, num_slices=self.num_slices
        )

    @property
    def mesh_axes(self) -> MeshAxes:
        """What each axis of the mesh splits."""
        return mesh.axes_of(self.mesh)

    @property
    def num_slices_of_mesh(self) -> int:
        """How many slices the mesh has."""
        return self.mesh.shape.get("slice", 1)

    @property
    def _row_axes(self) -> str | tuple[str, ...]:
        """The axes of the mesh that rows of a batch are split over."""
        rows = self.mesh_axes.rows
        return rows[0] if len(rows) == 1 else rows

    def sharding(self, *mesh_axes: str | tuple[str, ...] | None) -> NamedSharding:
        """The sharding of an array whose axes lie along the given axes of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*mesh_axes))

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on each device."""
        return self.sharding()

    @property
    def batch_sharding(self) -> NamedSharding:
        """The first axis split over 'data' and slices, for every leaf of a Batch."""
        return self.sharding(self._row_axes)

    def param_shardings(self, model: LanguageModel) -> PyTree[NamedSharding]:
        """The sharding of each parameter of a model, by its logical axes.

        Raises:
          ValueError: an axis has no rule, or does not divide by its mesh axis.
        """

        def one(path: Any, param: jax.ShapeDtypeStruct, axes: PartitionSpec) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self.sharding(*self._mesh_axes(name, param.shape, axes))

        return jax.tree_util.tree_map_with_path(one, model.abstract_params(), model.logical_axes())

    def gather_over_data(self, model: LanguageModel, params: Params) -> Params:
        """Within jit: parameters that lie whole on each group of devices with one copy of a model.

        For a loop that reads them at every step, as decoding does: where the rules split them over
        'data' too, they would be gathered anew at each.
        """

        def whole(sharding: NamedSharding) -> NamedSharding:
            return self.sharding(*(None if axis == "data" else axis for axis in sharding.spec))

        shardings = self.param_shardings(model)
        return jax.lax.with_sharding_constraint(params, jax.tree.map(whole, shardings))

    def _mesh_axes(
        self, name: str, shape: tuple[int, ...], axes: PartitionSpec
    ) -> list[str | None]:
        table = dict(reversed(self.rule_table))
        out: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and axis not in table:
                raise ValueError(
                    f"no rule for the logical axis {axis!r} of parameter {name}; got rules for "
                    f"{sorted(table)}. Add ({axis!r}, None) to Partitioner.rules to replicate it."
                )
            mesh_axis = None if axis is None else table[axis]
            if mesh_axis in out:
                mesh_axis = None  # A mesh axis splits an array once.
            if mesh_axis is not None and size % self.mesh.shape[mesh_axis]:
                parallelism = self.mesh.shape[mesh_axis]
                raise ValueError(
                    f"Partitioner.{mesh_axis}_parallelism must divide the axis {axis!r} of each "
                    f"parameter; got {parallelism}, and {size} in {name} {shape}. Set it to a "
                    f"divisor such as {math.gcd(size, parallelism)}, or give {axis!r} the rule "
                    "None."
                )
            out.append(mesh_axis)
        return out

    def state_shardings(
        self, abstract_state: PyTree[Any], param_shardings: PyTree[NamedSharding]
    ) -> PyTree[NamedSharding]:
        """The sharding of each leaf of a training state.

        Leaves shaped like a parameter (the parameter, moments, averages) lie as it does.
        Adafactor's rows and columns lie as the axes that they keep. All else is replicated.

        Args:
          abstract_state: shapes; its parameters are in the attribute or entry `params`, and the
            optimizer's trees repeat the parameters' paths.
          param_shardings: from `param_shardings`.
        """
        is_dict = isinstance(abstract_state, dict)
        params = abstract_state["params"] if is_dict else abstract_state.params
        shardings = jax.tree_util.tree_leaves(param_shardings)
        by_path = {
            _names(path): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(
                jax.tree_util.tree_leaves_with_path(params), shardings, strict=True
            )
        }

        def one(path: Any, leaf: Any) -> NamedSharding:
            names = _names(path)
            for start in range(len(names)):
                if names[start:] in by_path:
                    shape, sharding = by_path[names[start:]]
                    # Of stacked layers each has a state like a parameter of its own.
                    depth = int(stacking.STACKED in names[start:])
                    spec = _spec_like(
                        shape[depth:], sharding.spec[depth:], leaf.shape[depth:], names[:start]
                    )
                    return self.sharding(*sharding.spec[:depth], *spec)
            return self.replicated

        return jax.tree_util.tree_map_with_path(one, abstract_state)

    @functools.cached_property
    def data_layout(self) -> DataLayout:
        """Which part of every global batch this process must load.

        Not the process's index in general: where a model spans processes, several load the same
        part, and the mesh may order processes by topology.
        """
        if jax.process_count() == 1:
            return DataLayout(shard_id=0, num_shards=1)
        rows: dict[int, set[int]] = {}
        groups = self.mesh.devices.reshape(-1, self.mesh.devices.shape[-1])
        for index, row in enumerate(groups):
            for device in row:
                rows.setdefault(device.process_index, set()).add(index)
        parts = sorted({tuple(sorted(held)) for held in rows.values()})
        if sum(len(part) for part in parts) != len(groups):
            raise ValueError(
                "processes must hold the same rows of the mesh or none in common; got "
                f"{parts}. Set Partitioner.model_parallelism to a divisor or a multiple of the "
                "number of devices a process has."
            )
        return DataLayout(
            shard_id=parts.index(tuple(sorted(rows[jax.process_index()]))), num_shards=len(parts)
        )

    def shard_batch(self, batch: Rows) -> Rows:
        """Puts this process's rows (its `data_layout`) on its devices; returns global arrays.

        Args:
          batch: a Batch, or any tree of arrays with such rows.
        """
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(
                self.batch_sharding, np.asarray(rows)
            ),
            batch,
        )

    def local_rows(self, batch: PyTree[Any]) -> PyTree[np.ndarray]:
        """Copies this process's rows of a sharded batch to the host: undoes `shard_batch`.

        Nothing is sent between processes.
        """

        def rows(array: jax.Array) -> np.ndarray:
            # Devices that share a copy of a model hold the same rows.
            parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
            return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

        return jax.tree.map(rows, batch)

    @property
    def smallest_batch(self) -> int:
        """The least number of rows that the mesh can divide."""
        return self.mesh.shape["data"] * self.num_slices_of_mesh

    def check_batch_size(self, batch_size: int, num_microbatches: int = 1) -> None:
        """Checks that a global batch divides over microbatches and data-parallel devices.

        Raises:
          ValueError: it does not.
        """
        data = self.smallest_batch
        if num_microbatches < 1:
            raise ValueError(
                f"num_microbatches must be at least 1; got {num_microbatches}. Set it to 1 for "
                "whole batches."
            )
        unit = data * num_microbatches
        if batch_size < 1 or batch_size % unit:
            by, got = "the data axis", f"{batch_size} and {data}"
            if self.num_slices_of_mesh > 1:
                by = "the data axis of all slices"
            if num_microbatches > 1:
                by, got = f"{by} times num_microbatches", f"{got} * {num_microbatches}"
            raise ValueError(
                f"batch_size must be divisible by {by}; got {got}. "
                f"Set DatasetConfig.batch_size to a multiple of {unit}."
            )

    def annotate(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function to be jitted so that models' named activations obey the rules.

        Its arguments must lie on the mesh. Without it the compiler lays activations out by
        itself, from parameters and batch.
        """

        @functools.wraps(fn)
        def annotated(*args: Any, **kwargs: Any) -> Any:
            with self._axis_rules():
                return fn(*args, **kwargs)

        return annotated

    @contextlib.contextmanager
    def _axis_rules(self) -> Iterator[None]:
        # The abstract mesh: a concrete one may not be set while a function is traced.
        mesh = self.mesh.abstract_mesh
        rules = [
            (name, self._row_axes if (name, axis) == ("batch", "data") else axis)
            for name, axis in self.rule_table
        ]
        with (
            jax.sharding.use_abstract_mesh(mesh),
            use_mesh_axes(self.mesh_axes),
            nn.logical_axis_rules(rules),
        ):
            yield

    def fetch_to_host(self, tree: PyTree[Any]) -> PyTree[np.ndarray]:
        """Copies whole global arrays to every process as NumPy. All processes must call it."""
        return fetch_to_host(tree)


def layer_of(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one layer's part of a stacked parameter, lying as the whole does."""
    sharding = leaf.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def layers_of(*leaves: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one parameter of several layers, stacked; undoes `layer_of`."""
    leaf, sharding = leaves[0], leaves[0].sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((len(leaves), *leaf.shape), leaf.dtype, sharding=sharding)


def stack_onto(params: Params, wanted: PyTree[jax.ShapeDtypeStruct]) -> Params:
    """Stacks layers as `wanted` has them, on its shardings.

    One parameter at a time, so that of no other there are two copies on the devices; the layers'
    own arrays are gone afterwards.
    """

    def join(*leaves: jax.Array) -> jax.Array:
        stacked = jax.jit(lambda *arrays: jax.numpy.stack(arrays))(*leaves)
        stacked.block_until_ready()
        for leaf in leaves:
            leaf.delete()
        return stacked

    def lay(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return array if leaf.sharding is None else jax.device_put(array, leaf.sharding)

    return jax.tree.map(lay, stacking.stack(params, join), wanted)


def fetch_to_host(tree: PyTree[Any]) -> PyTree[np.ndarray]:
    """Copies whole global arrays to every process as NumPy. All processes must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, jax.device_get(tree))


def process_zero_decides(decide: Callable[[], int]) -> int:
    """Runs `decide` on process 0 and gives all processes its result, which is 0 or more.

    What depends on the state of files must be decided so: processes may look at different times.

    Raises:
      OSError, ValueError: as `decide`; on the other processes a ValueError.
    """
    if jax.process_count() == 1:
        return decide()
    result, error = -1, None
    if jax.process_index() == 0:
        try:
            result = int(decide())
        except (OSError, ValueError) as caught:
            error = caught
    result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if error is not None:
        raise error
    if result < 0:
        raise ValueError("process 0 cannot go on with the files of this run: see its log")
    return result


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _spec_like(
    shape: tuple[int, ...],
    spec: Sequence[str | None],
    leaf_shape: tuple[int, ...],
    container: tuple[str, ...],
) -> tuple[str | None, ...]:
    """The layout of an optimizer's leaf that belongs to a parameter of `shape` and `spec`."""
    full = (*spec, *(None,) * (len(shape) - len(spec)))
    if leaf_shape == shape:
        return full
    # Adafactor factors the two largest axes: rows lose the largest, columns the second, with
    # NumPy's order among equals, which for a square parameter only the names tell apart.
    lost = {"v_row": -1, "v_col": -2}
    for name in container:
        if name in lost and len(shape) > 1:
            axis = int(np.argsort(shape)[lost[name]])
            if leaf_shape == shape[:axis] + shape[axis + 1 :]:
                return full[:axis] + full[axis + 1 :]
    return ()  # A placeholder of shape (1,), or what this module does not know.


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
