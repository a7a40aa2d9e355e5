"""Partitions parameters, training states and batches over the device mesh.

Models name the logical axes of their parameters ('embed', 'mlp', ...); a table of rules maps these
names to axes of the mesh, 'data' and 'model'. Data parallelism splits the batch over 'data', and
tensor parallelism splits wide layers over 'model'. A single device is a 1x1 mesh. With several
slices, which are connected by a slower network, the mesh has a third axis, 'slice': it splits the
batch, and each slice holds all parameters.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.common.array_types import Params, PyTree
from gkd_jax.common.mesh_axes import MeshAxes, use_mesh_axes
from gkd_jax.common.moved import load_moved
from gkd_jax.devices import mesh, processes
from gkd_jax.devices.rules import Rules, parse_rules
from gkd_jax.devices.state_specs import state_specs
from gkd_jax.models.base import LanguageModel

Rows = TypeVar("Rows", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """The shard that this process loads from each global batch.

    Processes that together hold one copy of a model load the same shard.

    Attributes:
      shard_id: index of the shard, from 0.
      num_shards: number of shards of a global batch.
    """

    shard_id: int
    num_shards: int


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh of devices and the rules by which arrays are partitioned over it.

    Attributes:
      model_parallelism: number of devices that share one copy of a model. Must divide the number of
        heads, the width of the MLP and the vocabulary size.
      data_parallelism: number of model replicas, each of which processes a part of the batch; None
        uses all devices.
      rules: 'standard' (parameters are replicated over 'data'), 'fsdp' (parameters are also split
        over 'data': less memory, more communication), or a table of (logical axis, mesh axis)
        pairs.
      teacher_rules: rules for the parameters of teacher networks (`teachers.Teacher`); None uses
        `rules`. The activations of teacher and student always follow `rules`.
      num_slices: number of slices, which are connected by a slower network. Parameters are split
        within a slice, and batches are split over all slices. None uses the slices that the devices
        report (TPU slices, or hosts with GPUs). 1 treats all devices as one slice: 'fsdp' then
        splits parameters over all slices, which needs less memory but uses the slower network.
      devices: devices of the mesh; None uses `jax.devices()`.
    """

    model_parallelism: int = 1
    data_parallelism: int | None = None
    rules: str | Rules = "standard"
    teacher_rules: str | Rules | None = None
    num_slices: int | None = None
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self) -> None:
        # Must not access devices: a Partitioner is created while the configuration is parsed,
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
                table = parse_rules(rules, setting=f"Partitioner.{name}")
                # gin passes lists, which are not hashable.
                object.__setattr__(self, name, rules if isinstance(rules, str) else table)

    @property
    def rule_table(self) -> Rules:
        """The rules as (logical axis, mesh axis) pairs."""
        return parse_rules(self.rules, setting="Partitioner.rules")

    def for_teacher(self) -> "Partitioner":
        """Returns a partitioner with the same mesh and the rules for teacher networks."""
        if self.teacher_rules is None:
            return self
        return dataclasses.replace(self, rules=self.teacher_rules, teacher_rules=None)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh with the axes 'data' and 'model', after 'slice' if there are several slices.

        Raises:
          ValueError: the devices cannot form such a mesh.
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
        """The axes of the mesh that split rows of a batch, and the axis that splits wide layers."""
        return mesh.axes_of(self.mesh)

    @property
    def num_slices_of_mesh(self) -> int:
        """Number of slices of the mesh."""
        return self.mesh.shape.get("slice", 1)

    @property
    def _row_axes(self) -> str | tuple[str, ...]:
        """The mesh axes over which the rows of a batch are split."""
        rows = self.mesh_axes.rows
        return rows[0] if len(rows) == 1 else rows

    def sharding(self, *mesh_axes: str | tuple[str, ...] | None) -> NamedSharding:
        """Returns the sharding of an array, given the mesh axis or axes of each dimension."""
        return NamedSharding(self.mesh, PartitionSpec(*mesh_axes))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array of which each device holds a full copy."""
        return self.sharding()

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of the arrays of a batch: rows are split over 'slice' and 'data'."""
        return self.sharding(self._row_axes)

    def param_shardings(self, model: LanguageModel) -> PyTree[NamedSharding]:
        """Returns the sharding of each parameter of a model, from its logical axes.

        Raises:
          ValueError: a logical axis has no rule, or its size is not divisible by the size of the
            mesh axis.
        """

        def sharding_of(
            path: Any, param: jax.ShapeDtypeStruct, axes: PartitionSpec
        ) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return self.sharding(*self._mesh_axes(name, param.shape, axes))

        return jax.tree_util.tree_map_with_path(
            sharding_of, model.abstract_params(), model.logical_axes()
        )

    def gather_over_data(self, model: LanguageModel, params: Params) -> Params:
        """All-gathers parameters over 'data', so that each model replica holds a full copy.

        Call it inside `jit` before a loop that reads the parameters at every step, such as
        decoding. Parameters that the rules split over 'data' would otherwise be gathered again at
        every step of the loop.
        """

        def without_data(sharding: NamedSharding) -> NamedSharding:
            return self.sharding(*(None if axis == "data" else axis for axis in sharding.spec))

        shardings = self.param_shardings(model)
        return jax.lax.with_sharding_constraint(params, jax.tree.map(without_data, shardings))

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
                mesh_axis = None  # A mesh axis can split only one axis of an array.
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
        """Returns the sharding of each array of a training state.

        Args:
          abstract_state: shapes of the state, with the parameters in its attribute or entry
            `params`. An array that the optimizer keeps for a parameter is recognized by its path,
            which ends in the path of the parameter.
          param_shardings: sharding of each parameter, as returned by `param_shardings`.
        """
        specs = state_specs(abstract_state, param_shardings)
        return jax.tree.map(
            lambda spec: self.sharding(*spec),
            specs,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    @functools.cached_property
    def data_layout(self) -> DataLayout:
        """The shard that this process loads from each global batch.

        The index of the shard is in general not the process index: processes that share a model
        replica load the same shard, and the mesh may order processes by topology.

        Raises:
          ValueError: two processes have some, but not all, of their model replicas in common.
        """
        if jax.process_count() == 1:
            return DataLayout(shard_id=0, num_shards=1)
        rows: dict[int, set[int]] = {}
        groups = self.mesh.devices.reshape(-1, self.mesh.devices.shape[-1])
        for index, row in enumerate(groups):
            for device in row:
                rows.setdefault(device.process_index, set()).add(index)
        shards = sorted({tuple(sorted(held)) for held in rows.values()})
        if sum(len(shard) for shard in shards) != len(groups):
            raise ValueError(
                "processes must hold the same rows of the mesh or none in common; got "
                f"{shards}. Set Partitioner.model_parallelism to a divisor or a multiple of the "
                "number of devices a process has."
            )
        return DataLayout(
            shard_id=shards.index(tuple(sorted(rows[jax.process_index()]))), num_shards=len(shards)
        )

    def shard_batch(self, batch: Rows) -> Rows:
        """Builds global arrays from the rows that each process has loaded (its `data_layout`).

        Args:
          batch: a Batch, or any other tree of arrays with this process's rows.
        """
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(
                self.batch_sharding, np.asarray(rows)
            ),
            batch,
        )

    def local_rows(self, batch: PyTree[Any]) -> PyTree[np.ndarray]:
        """Copies this process's rows of a sharded batch to the host. The inverse of `shard_batch`.

        Processes do not communicate in this function.
        """

        def rows(array: jax.Array) -> np.ndarray:
            # Devices that share a model replica hold the same rows.
            shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
            return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

        return jax.tree.map(rows, batch)

    @property
    def smallest_batch(self) -> int:
        """The smallest global batch size that the mesh can split evenly."""
        return self.mesh.shape["data"] * self.num_slices_of_mesh

    def check_batch_size(self, batch_size: int, num_microbatches: int = 1) -> None:
        """Checks that a global batch splits evenly over microbatches and model replicas.

        Raises:
          ValueError: `batch_size` is not divisible by `num_microbatches` times the number of
            replicas.
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
        """Wraps a function for `jit`, so that activations with logical axes follow the rules.

        The arguments of the function must be placed on the mesh. Without this wrapper, the compiler
        derives the shardings of activations from the shardings of the parameters and the batch.
        """

        @functools.wraps(fn)
        def annotated(*args: Any, **kwargs: Any) -> Any:
            with self._axis_rules():
                return fn(*args, **kwargs)

        return annotated

    @contextlib.contextmanager
    def _axis_rules(self) -> Iterator[None]:
        # A concrete mesh may not be set while a function is traced.
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
        """Copies entire global arrays to every process as NumPy arrays.

        All processes must call this method.
        """
        return processes.fetch_to_host(tree)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def __getattr__(name: str) -> Any:
    return load_moved(__name__, name)
