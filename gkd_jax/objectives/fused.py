"""The same loss as `weighted_loss`, in chunks: no array of all positions and the whole vocabulary.

A chunk is a few positions that count. In one pass over it the logits of both models are made, the
divergence, the gradient of the student's logits, and from that the gradients of its hidden states
and of its head; then all but those is dropped. Nothing is computed again in the backward pass,
which multiplies by the cotangent of the loss. Positions of weight 0 cost nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gkd_jax.common.array_types import Array, Float, Int, Params
from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.objectives.objective import Objective, Predictions, check_predictions
from gkd_jax.objectives.per_token import TokenTeacher, check_advantages

CHUNK_ENTRIES = 1 << 22
"""Logits that one model makes at a time on a CPU, for its caches: 16 MB in float32."""
ACCELERATOR_CHUNK_ENTRIES = 1 << 25
"""Likewise on a TPU or GPU, a device: 128 MB. A chunk reads the head and adds to its gradient: with
fewer than some hundred positions the memory's speed decides, not that of the matrix units."""
MIN_CHUNK, MAX_CHUNK = 8, 1024

GROUP_ENTRIES = 1 << 18
"""Logits whose divergence a CPU makes at a time: 1 MB. Matrix products want all the positions of a
chunk, but the dozen arrays between logits and gradient want to stay in a core's own cache. XLA
writes each of them to memory otherwise, which takes two to three times as long."""

# The mesh axes that sequences are split over, where they are there; each shard runs through chunks
# of its own.
_ROW_AXES = ("slice", "data")


def chunk_positions(vocab_size: int, num_positions: int, *, platform: str) -> int:
    """Positions in a chunk: about so many logits a device, from 8 to 1,024, in eights.

    Args:
      vocab_size: entries that a device has.
      num_positions: how many there are.
      platform: 'cpu', 'tpu' or 'gpu'.
    """
    entries = CHUNK_ENTRIES if platform == "cpu" else ACCELERATOR_CHUNK_ENTRIES
    wanted = entries // vocab_size // MIN_CHUNK * MIN_CHUNK
    return max(1, min(num_positions, max(MIN_CHUNK, min(MAX_CHUNK, wanted))))


def group_positions(vocab_size: int, chunk: int, *, platform: str) -> int:
    """Positions of a chunk whose divergences are made at a time: all, but on a CPU.

    At least two there: one alone is a vector to the compiler, which it is slower on.

    Args:
      vocab_size: entries that a device has.
      chunk: positions in a chunk.
      platform: 'cpu', 'tpu' or 'gpu'.
    """
    return min(chunk, max(2, GROUP_ENTRIES // vocab_size)) if platform == "cpu" else chunk


def fused_weighted_loss(
    objective: Objective,
    *,
    student: Predictions,
    teacher: Predictions | TeacherDistributions | None,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes what `weighted_loss` does, with its arguments, values, gradients and errors.

    On a mesh with an axis 'data', and perhaps 'slice', the rows are split over those, which must
    divide them; the vocabulary may be split over another axis. There are no second derivatives.
    """
    check_predictions(objective.divergence, student, teacher, weights)
    check_advantages(objective.divergence, advantages, targets)
    of_teacher: _Teacher | None = None
    make_teacher: Callable[[Params, Any], TokenTeacher] = _as_stored
    if isinstance(teacher, Predictions):
        of_teacher, make_teacher = (teacher.hidden, teacher.head), teacher.unembed
    elif teacher is not None:
        of_teacher = (teacher, None)
    return chunked_loss(
        objective,
        student=student,
        teacher=of_teacher,
        make_teacher=make_teacher,
        targets=targets,
        weights=weights,
        advantages=advantages,
    )


def _as_stored(head: None, distributions: TeacherDistributions) -> TeacherDistributions:
    """A store has no output layer: its distributions are made already."""
    del head
    return distributions


def chunked_loss(
    objective: Objective,
    *,
    student: Predictions,
    teacher: "_Teacher | None",
    make_teacher: Callable[[Params, Any], Any] = _as_stored,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Sums weights times what `objective.of_logits` gives, as `fused_weighted_loss`, unchecked.

    Args:
      objective: gives value and gradient of a chunk.
      student: gets gradients.
      teacher: a tree of what there is of the teacher at each position, and its head.
      make_teacher: `(head, the tree at some positions)` to what `objective.of_logits` takes.
      targets: the output tokens.
      weights: final weights; where they are 0 nothing is computed.
      advantages: of the output tokens.
    """
    functions = _Functions(objective, student.unembed, make_teacher)
    others = (
        lax.stop_gradient(teacher),
        targets,
        lax.stop_gradient(weights.astype(jnp.float32)),
        lax.stop_gradient(advantages),
    )
    loss, per_token = _fused(functions, (student.hidden, student.head), others)
    return loss, lax.stop_gradient(per_token)


@dataclasses.dataclass(frozen=True)
class _Functions:
    """What is no array."""

    objective: Objective
    student_unembed: Callable[[Params, Array], Array]
    make_teacher: Callable[[Params, Any], TokenTeacher]


# Hidden states and head of the student, and with those its gradients.
_Model: TypeAlias = tuple[Float[Array, "B T D"], Params]
# Of the teacher, what there is at each position (hidden states, or from a store), and its head.
_Teacher: TypeAlias = tuple[Any, Params]
# The teacher, the targets, the weights and the advantages: what gets no gradient.
_Others: TypeAlias = tuple[
    _Teacher | None, Int[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"] | None
]
# The loss, and the divergence per token.
_Values: TypeAlias = tuple[Float[Array, ""], Float[Array, "B T"]]
# All of it; the gradients are of type _Model, or None where they are not wanted.
_Run: TypeAlias = Callable[[_Model, _Others], tuple[_Values, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(functions: _Functions, student: _Model, others: _Others) -> _Values:
    return _over_shards(functions, student, others, with_gradients=False)[0]


def _forward(functions: _Functions, student: _Model, others: _Others) -> tuple[_Values, _Model]:
    values, gradients = _over_shards(functions, student, others, with_gradients=True)
    return values, gradients


def _backward(functions: _Functions, gradients: _Model, cotangents: _Values) -> tuple[_Model, None]:
    del functions
    of_loss, _ = cotangents  # The values per token have no gradient.

    def scaled(gradient: Array) -> Array:
        # A loss that does not count may be infinite: 0 times its gradient is NaN.
        return jnp.where(of_loss == 0, 0.0, of_loss * gradient).astype(gradient.dtype)

    return jax.tree.map(scaled, gradients), None


_fused.defvjp(_forward, _backward)


def _over_shards(
    functions: _Functions, student: _Model, others: _Others, *, with_gradients: bool
) -> tuple[_Values, Any]:
    """Runs every shard of the rows through chunks of its own, and adds up what they share.

    Left to the compiler, a chunk would take positions from all devices, and the head's gradient
    would be added up over them in every chunk.
    """
    run: _Run = functools.partial(_all_chunks, functions, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in _ROW_AXES if not mesh.empty and mesh.shape.get(axis, 1) > 1)
    if axes:
        run = _split_over_rows(run, mesh, axes, student, others, with_gradients)
    values, gradients = run(student, others)
    if with_gradients:
        of_hidden, of_head = gradients
        # Added up in float32 until here, over chunks and over shards.
        of_head = jax.tree.map(lambda g, p: g.astype(p.dtype), of_head, student[1])
        gradients = (of_hidden, of_head)
    return values, gradients


def _split_over_rows(
    run: _Run,
    mesh: jax.sharding.AbstractMesh,
    axes: tuple[str, ...],
    student: _Model,
    others: _Others,
    with_gradients: bool,
) -> _Run:
    num_shards = math.prod(mesh.shape[axis] for axis in axes)
    if student[0].shape[0] % num_shards:
        names = " and ".join(map(repr, axes))
        raise ValueError(
            f"the rows of a batch must divide over the mesh's axis {names}; "
            f"got {student[0].shape[0]} rows and {num_shards}. Set DatasetConfig.batch_size to a "
            f"multiple of {num_shards}."
        )

    def one_shard(student: _Model, others: _Others) -> tuple[_Values, Any]:
        (loss, per_token), gradients = run(student, others)
        loss = lax.psum(loss, axes)
        if with_gradients:
            gradients = (gradients[0], lax.psum(gradients[1], axes))
        return (loss, per_token), gradients

    rows, whole = PartitionSpec(axes), PartitionSpec()
    model = (rows, whole)
    of_others = (None if others[0] is None else model, rows, rows, rows)
    return jax.shard_map(
        one_shard,
        mesh=mesh,
        in_specs=(model, of_others),
        out_specs=((whole, rows), model if with_gradients else None),
        axis_names=set(axes),
        check_vma=False,
    )


def _all_chunks(
    functions: _Functions, student: _Model, others: _Others, *, with_gradients: bool
) -> tuple[_Values, Any]:
    """Runs through the positions that count, a chunk at a time."""
    (hidden, head), (teacher, targets, weights, advantages) = student, others
    shape = hidden.shape
    # All positions in a row: [B * T, ...].
    hidden, targets, weights = hidden.reshape(-1, shape[-1]), targets.ravel(), weights.ravel()
    num_positions = weights.size
    vocab_size = jax.eval_shape(functions.student_unembed, head, hidden[:1]).shape[-1]
    # The vocabulary lies over all axes but that of the rows, if it divides over them.
    mesh = jax.sharding.get_abstract_mesh()
    num_shards = math.prod(mesh.shape.get(axis, 1) for axis in _ROW_AXES)
    num_parts = 1 if mesh.empty else mesh.size // num_shards
    if vocab_size % num_parts == 0:
        vocab_size //= num_parts
    # That of the mesh: a program may be compiled for other devices than this machine's.
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    size = chunk_positions(vocab_size, num_positions, platform=platform)
    group = group_positions(vocab_size, size, platform=platform)
    size = -(-size // group) * group
    counts = weights != 0
    # Those that count come first; the places behind them are none, and read as 0.
    places = -(-num_positions // size) * size
    (order,) = jnp.nonzero(counts, size=places, fill_value=num_positions)

    def chunk(index: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        loss, per_token, gradients = carry
        rows = lax.dynamic_slice_in_dim(order, index * size, size)

        def take(x: Array) -> Array:
            picked = jnp.asarray(x).at[rows]
            return picked.get(mode="fill", fill_value=0, indices_are_sorted=True)

        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part, index * size, axis=0)

        of_teacher = None
        if teacher is not None:
            at_positions = jax.tree.map(
                lambda x: take(x.reshape(num_positions, *x.shape[2:])), teacher[0]
            )
            of_teacher = functions.make_teacher(teacher[1], at_positions)
        logits, pullback = jax.vjp(functions.student_unembed, head, take(hidden))
        value, of_loss, of_logits = _of_chunk(
            functions.objective,
            logits,
            of_teacher,
            take(targets),
            take(weights),
            None if advantages is None else take(advantages.ravel()),
            group=group,
        )
        if with_gradients:
            of_head, of_hidden = pullback(of_logits.astype(logits.dtype))
            gradients = (
                put(gradients[0], of_hidden),
                jax.tree.map(jnp.add, gradients[1], of_head),
            )
        return loss + of_loss, put(per_token, value), gradients

    gradients = None
    if with_gradients:
        # Sums over many chunks: in float32, whatever the parameters are.
        of_head = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
        gradients = (jnp.zeros((places, shape[-1]), hidden.dtype), of_head)
    num_chunks = -(-jnp.sum(counts) // size)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(places, jnp.float32), gradients)
    loss, per_token, gradients = lax.fori_loop(0, num_chunks, chunk, start)
    # Back to where they came from; what does not count has 0.
    place = jnp.where(counts, jnp.cumsum(counts) - 1, places)
    per_token = per_token.at[place].get(mode="fill", fill_value=0).reshape(shape[:-1])
    if with_gradients:
        of_hidden = gradients[0].at[place].get(mode="fill", fill_value=0).reshape(shape)
        gradients = (of_hidden, gradients[1])
    return (loss, per_token), gradients


def _of_chunk(
    objective: Objective,
    logits: Float[Array, "C V"],
    teacher: TokenTeacher | None,
    targets: Int[Array, " C"],
    weights: Float[Array, " C"],
    advantages: Float[Array, " C"] | None,
    *,
    group: int,
) -> tuple[Float[Array, " C"], Float[Array, ""], Float[Array, "C V"]]:
    """Divergence of each position, the loss, and its gradient in the student's logits.

    A group of positions at a time, whose gradients take the place of its logits.
    """
    parts = (logits, teacher, targets, weights, advantages)
    if group == len(targets):
        return _of_group(objective, *parts)

    def one_group(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, loss, logits_or_gradients = carry

        def take(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, index * group, group)

        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), index * group, axis=0)

        arguments = jax.tree.map(take, (logits_or_gradients, *parts[1:]))
        value, of_loss, of_logits = _of_group(objective, *arguments)
        return put(values, value), loss + of_loss, put(logits_or_gradients, of_logits)

    start = (jnp.zeros(len(targets), jnp.float32), jnp.zeros((), jnp.float32), logits)
    return lax.fori_loop(0, len(targets) // group, one_group, start)


def _of_group(
    objective: Objective,
    logits: Float[Array, "G V"],
    teacher: TokenTeacher | None,
    targets: Int[Array, " G"],
    weights: Float[Array, " G"],
    advantages: Float[Array, " G"] | None,
) -> tuple[Float[Array, " G"], Float[Array, ""], Float[Array, "G V"]]:
    """As `_of_chunk`, all positions at once."""
    value, gradient = objective.of_logits(logits, teacher, targets, advantages)
    counts = weights != 0
    value = jnp.where(counts, value, 0.0)
    loss = value
    if objective.z_loss:
        logits = logits.astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        loss = loss + objective.z_loss * jnp.square(log_z)
        probs = jnp.exp(logits - log_z[:, None])
        gradient = gradient + (2.0 * objective.z_loss) * log_z[:, None] * probs
    # 0 times an infinite gradient would be NaN, and what does not count must not matter.
    of_logits = jnp.where(counts[:, None], weights[:, None] * gradient, 0.0)
    return value, jnp.sum(jnp.where(counts, weights * loss, 0.0)), of_logits
