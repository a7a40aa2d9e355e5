"""The loss of `weighted_loss` in chunks, without an array over all positions and the vocabulary.

A chunk holds some of the positions that have weight. For each chunk, the forward pass computes the
logits of both models, the divergence and its gradient with respect to the student's logits, and
from that gradient the gradients of the student's hidden states and output layer. Only the latter
are kept. The backward pass recomputes nothing: it multiplies the kept gradients by the cotangent of
the loss. Positions of weight 0 cost nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from gkd_jax.common.array_types import Array, Float, Int, Params, PyTree
from gkd_jax.common.batch import TeacherDistributions
from gkd_jax.common.mesh_axes import current_mesh_axes, num_shards
from gkd_jax.objectives.chunks import Chunks
from gkd_jax.objectives.objective import Objective, Predictions, check_predictions
from gkd_jax.objectives.per_token import TokenTeacher, check_advantages

CHUNK_ENTRIES = 1 << 22
"""Number of logits of one model in a chunk on a CPU, chosen to fit the CPU's caches: 16 MB in
float32."""
ACCELERATOR_CHUNK_ENTRIES = 1 << 25
"""Like `CHUNK_ENTRIES`, but for each device of a TPU or GPU: 128 MB. Each chunk reads the whole
output layer and adds to the gradient of the whole output layer. If a chunk has fewer than a few
hundred positions, this memory traffic takes longer than the matrix products."""
MIN_CHUNK, MAX_CHUNK = 8, 1024

GROUP_ENTRIES = 1 << 18
"""Number of logits in a group, the part of a chunk whose divergences a CPU computes at a time:
1 MB. Matrix products are fastest over a whole chunk, but the dozen arrays between logits and
gradient should stay in the cache of one core: otherwise XLA writes each of them to memory, which
takes two to three times as long."""


def chunk_positions(vocab_size: int, num_positions: int, *, platform: str) -> int:
    """Returns the number of positions in a chunk.

    It is a multiple of 8 from 8 to 1,024, or `num_positions` if that is smaller.

    Args:
      vocab_size: vocabulary entries per device.
      num_positions: total number of positions.
      platform: 'cpu', 'tpu' or 'gpu'.
    """
    entries = CHUNK_ENTRIES if platform == "cpu" else ACCELERATOR_CHUNK_ENTRIES
    wanted = entries // vocab_size // MIN_CHUNK * MIN_CHUNK
    return max(1, min(num_positions, max(MIN_CHUNK, min(MAX_CHUNK, wanted))))


def group_positions(vocab_size: int, chunk: int, *, platform: str) -> int:
    """Returns the number of positions in a group, the part of a chunk that is computed at a time.

    On a CPU a group has at least two positions, because XLA is slower on a vector of logits (one
    position) than on a matrix. On other platforms the whole chunk is one group.

    Args:
      vocab_size: vocabulary entries per device.
      chunk: number of positions in a chunk.
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
    """Computes `weighted_loss` in chunks. Arguments, values, gradients and errors are the same.

    On a mesh whose axes have roles (`common.mesh_axes`), rows are sharded over the axes with the
    role `rows`, and positions over the axes with the role `sequence`. The number of rows must be a
    multiple of the number of row shards, and the number of positions a multiple of the number of
    sequence shards. The vocabulary may be sharded over the axes with the role `width`. Second
    derivatives are not supported.
    """
    check_predictions(objective.divergence, student, teacher, weights)
    check_advantages(objective.divergence, advantages, targets)
    teacher_source: _Teacher | None = None
    make_teacher: Callable[[Params, Any], TokenTeacher] = _stored_distributions
    if isinstance(teacher, Predictions):
        teacher_source, make_teacher = (teacher.hidden, teacher.head), teacher.unembed
    elif teacher is not None:
        teacher_source = (teacher, None)
    return chunked_loss(
        objective,
        student=student,
        teacher=teacher_source,
        make_teacher=make_teacher,
        targets=targets,
        weights=weights,
        advantages=advantages,
    )


def _stored_distributions(head: None, distributions: TeacherDistributions) -> TeacherDistributions:
    """Returns the distributions unchanged: a store has no output layer to apply."""
    del head
    return distributions


def chunked_loss(
    objective: Objective,
    *,
    student: Predictions,
    teacher: "_Teacher | None",
    make_teacher: Callable[[Params, Any], Any] = _stored_distributions,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes the weighted loss of all positions in chunks, with `objective.value_and_gradient`.

    This is `fused_weighted_loss` for any kind of teacher, without the checks of the arguments.

    Args:
      objective: its `value_and_gradient` is called on the positions of a chunk.
      student: hidden states and output layer, which get gradients.
      teacher: None, or a pair (data, head). `data` is a tree of arrays [B, T, ...] with the
        teacher's data at each position; `head` has the parameters of the teacher's output layer.
      make_teacher: function of (parameters of the output layer, tree at the positions of a chunk)
        that returns the argument `teacher` of `objective.value_and_gradient`.
      targets: output tokens.
      weights: final weights; nothing is computed at positions where they are 0.
      advantages: advantages of the output tokens, or None.

    Returns:
      The loss and the divergence per token, as returned by `weighted_loss`.
    """
    functions = _Functions(objective, student.unembed, make_teacher)
    states, teacher_head = (None, None) if teacher is None else teacher
    constants = (
        _Positions(
            lax.stop_gradient(states),
            targets,
            lax.stop_gradient(weights.astype(jnp.float32)),
            lax.stop_gradient(advantages),
        ),
        lax.stop_gradient(teacher_head),
    )
    loss, per_token = _fused(functions, (student.hidden, student.head), constants)
    return loss, lax.stop_gradient(per_token)


@dataclasses.dataclass(frozen=True)
class _Functions:
    """Static arguments of the fused loss.

    Hashable, so that `custom_vjp` can treat them as non-differentiable.
    """

    objective: Objective
    student_unembed: Callable[[Params, Array], Array]
    make_teacher: Callable[[Params, Any], TokenTeacher]


class _Positions(NamedTuple):
    """Constants that have a value at each position; the leading axes are the positions.

    Attributes:
      teacher: tree of the teacher's data (hidden states, or distributions of a store), or None.
      targets: output tokens.
      weights: final weights, float32.
      advantages: advantages of the output tokens, or None.
    """

    teacher: PyTree
    targets: Int[Array, "*n"]
    weights: Float[Array, "*n"]
    advantages: Float[Array, "*n"] | None


# Hidden states and output layer of the student; also their gradients, of the same structure.
_Student: TypeAlias = tuple[Float[Array, "B T D"], Params]
# A tree of the teacher's data at each position, and its output layer.
_Teacher: TypeAlias = tuple[Any, Params]
# Arguments without gradient: arrays with a value at each position, and the teacher's output layer.
_Constants: TypeAlias = tuple[_Positions, Params]
# The loss, and the divergence per token.
_Values: TypeAlias = tuple[Float[Array, ""], Float[Array, "B T"]]
# Function that returns values and gradients. The gradients are a _Student, or None if not needed.
_Run: TypeAlias = Callable[[_Student, _Constants], tuple[_Values, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(functions: _Functions, student: _Student, constants: _Constants) -> _Values:
    return _over_shards(functions, student, constants, with_gradients=False)[0]


def _forward(
    functions: _Functions, student: _Student, constants: _Constants
) -> tuple[_Values, _Student]:
    values, gradients = _over_shards(functions, student, constants, with_gradients=True)
    return values, gradients


def _backward(
    functions: _Functions, gradients: _Student, cotangents: _Values
) -> tuple[_Student, None]:
    del functions
    loss_cotangent, _ = cotangents  # The values per token have no gradient.

    def scaled(gradient: Array) -> Array:
        # With a cotangent of 0, the product with an infinite gradient would be NaN.
        scaled = jnp.where(loss_cotangent == 0, 0.0, loss_cotangent * gradient)
        return scaled.astype(gradient.dtype)

    return jax.tree.map(scaled, gradients), None


_fused.defvjp(_forward, _backward)


def _over_shards(
    functions: _Functions, student: _Student, constants: _Constants, *, with_gradients: bool
) -> tuple[_Values, Any]:
    """Runs the chunks of each shard separately; sums the loss and the head's gradient over shards.

    If the sharding were left to the compiler, each chunk would take positions from all devices, and
    the head's gradient would be summed over all devices once per chunk.
    """
    run: _Run = functools.partial(_run_chunks, functions, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    roles = current_mesh_axes()
    # Mesh axes that split rows (B) and positions (T) into more than one shard.
    split = tuple(
        tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        for axes in (roles.rows, roles.sequence)
    )
    if any(split):
        run = _split_positions(run, mesh, split, student, with_gradients)
    values, gradients = run(student, constants)
    if with_gradients:
        hidden_gradient, head_gradient = gradients
        # The sums over chunks and shards are float32. They are cast to the parameters' dtype here.
        head_gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), head_gradient, student[1])
        gradients = (hidden_gradient, head_gradient)
    return values, gradients


def _split_positions(
    run: _Run,
    mesh: jax.sharding.AbstractMesh,
    split: tuple[tuple[str, ...], ...],
    student: _Student,
    with_gradients: bool,
) -> _Run:
    """Maps `run` over shards; `split` has the mesh axes of rows and the mesh axes of positions."""
    _check_divisible(mesh, split, student[0].shape)
    axes = (*split[0], *split[1])

    def one_shard(student: _Student, constants: _Constants) -> tuple[_Values, Any]:
        (loss, per_token), gradients = run(student, constants)
        loss = lax.psum(loss, axes)
        if with_gradients:
            gradients = (gradients[0], lax.psum(gradients[1], axes))
        return (loss, per_token), gradients

    sharded, whole = PartitionSpec(*(axes or None for axes in split)), PartitionSpec()
    return jax.shard_map(
        one_shard,
        mesh=mesh,
        in_specs=((sharded, whole), (sharded, whole)),
        out_specs=((whole, sharded), (sharded, whole) if with_gradients else None),
        axis_names=set(axes),
        check_vma=False,
    )


def _check_divisible(
    mesh: jax.sharding.AbstractMesh, split: tuple[tuple[str, ...], ...], shape: tuple[int, ...]
) -> None:
    for axes, size, what, setting in (
        (split[0], shape[0], "rows", "DatasetConfig.batch_size"),
        (split[1], shape[1], "positions", "DatasetConfig.feature_lengths['targets']"),
    ):
        shards = num_shards(mesh.shape, axes)
        if size % shards:
            names = " and ".join(map(repr, axes))
            raise ValueError(
                f"the {what} of a batch must divide over the mesh's axis {names}; "
                f"got {size} {what} and {shards}. Set {setting} to a multiple of {shards}."
            )


def _run_chunks(
    functions: _Functions, student: _Student, constants: _Constants, *, with_gradients: bool
) -> tuple[_Values, Any]:
    """Computes values and gradients of the positions with weight, one chunk at a time."""
    (hidden, head), (positions, teacher_head) = student, constants
    shape = hidden.shape
    # Merges rows and positions into one axis: [B * T, ...].
    hidden, positions = jax.tree.map(
        lambda x: x.reshape(shape[0] * shape[1], *x.shape[2:]), (hidden, positions)
    )
    size, group = _chunk_and_group(functions.student_unembed, head, hidden)
    chunks = Chunks.of(positions.weights != 0, size)

    def add_chunk(index: Array, sums: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        loss, per_token, gradients = sums
        chunk_hidden, chunk = chunks.take((hidden, positions), index)
        teacher = None
        if chunk.teacher is not None:
            teacher = functions.make_teacher(teacher_head, chunk.teacher)
        logits, pullback = jax.vjp(functions.student_unembed, head, chunk_hidden)
        value, chunk_loss, gradient = _chunk_loss(
            functions.objective, logits, chunk._replace(teacher=teacher), group=group
        )
        if with_gradients:
            head_gradient, hidden_gradient = pullback(gradient.astype(logits.dtype))
            gradients = (
                chunks.put(gradients[0], hidden_gradient, index),
                jax.tree.map(jnp.add, gradients[1], head_gradient),
            )
        return loss + chunk_loss, chunks.put(per_token, value, index), gradients

    gradients = None
    if with_gradients:
        # Sums over many chunks are computed in float32, whatever the dtype of the parameters.
        head_gradient = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
        gradients = (jnp.zeros((chunks.num_slots, shape[-1]), hidden.dtype), head_gradient)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(chunks.num_slots, jnp.float32), gradients)
    loss, per_token, gradients = lax.fori_loop(0, chunks.num_chunks, add_chunk, start)
    per_token = chunks.restore(per_token).reshape(shape[:-1])
    if with_gradients:
        gradients = (chunks.restore(gradients[0]).reshape(shape), gradients[1])
    return (loss, per_token), gradients


def _chunk_and_group(
    unembed: Callable[[Params, Array], Array], head: Params, hidden: Float[Array, "N D"]
) -> tuple[int, int]:
    """Returns the positions per chunk and per group. A chunk is a whole number of groups."""
    vocab_size = jax.eval_shape(unembed, head, hidden[:1]).shape[-1]
    # A vocabulary whose size is not divisible by the number of shards is not sharded.
    mesh = jax.sharding.get_abstract_mesh()
    shards = num_shards(mesh.shape, current_mesh_axes().width)
    if vocab_size % shards == 0:
        vocab_size //= shards
    # The platform is the mesh's, if there is a mesh: a program may be compiled for devices that
    # this machine does not have.
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    size = chunk_positions(vocab_size, len(hidden), platform=platform)
    group = group_positions(vocab_size, size, platform=platform)
    return -(-size // group) * group, group


def _chunk_loss(
    objective: Objective, logits: Float[Array, "C V"], chunk: _Positions, *, group: int
) -> tuple[Float[Array, " C"], Float[Array, ""], Float[Array, "C V"]]:
    """Computes the divergence of each position, the loss, and its gradient in the logits.

    Groups are computed one after another. A group's gradients overwrite its logits to save memory.
    """
    size = len(chunk.targets)
    if group == size:
        return _group_loss(objective, logits, chunk)

    def add_group(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, loss, logits_or_gradients = carry

        def take(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, index * group, group)

        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), index * group, axis=0)

        group_logits, positions = jax.tree.map(take, (logits_or_gradients, chunk))
        value, group_loss, gradient = _group_loss(objective, group_logits, positions)
        return put(values, value), loss + group_loss, put(logits_or_gradients, gradient)

    start = (jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.float32), logits)
    return lax.fori_loop(0, size // group, add_group, start)


def _group_loss(
    objective: Objective, logits: Float[Array, "G V"], group: _Positions
) -> tuple[Float[Array, " G"], Float[Array, ""], Float[Array, "G V"]]:
    """Computes the results of `_chunk_loss` for the positions of one group, all at once."""
    teacher, targets, weights, advantages = group
    value, gradient = objective.value_and_gradient(logits, teacher, targets, advantages)
    mask = weights != 0
    value = jnp.where(mask, value, 0.0)
    loss = value
    if objective.z_loss:
        logits = logits.astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        loss = loss + objective.z_loss * jnp.square(log_z)
        probs = jnp.exp(logits - log_z[:, None])
        gradient = gradient + (2.0 * objective.z_loss) * log_z[:, None] * probs
    # Positions of weight 0 must not change the result, but 0 times an infinite gradient is NaN.
    gradient = jnp.where(mask[:, None], weights[:, None] * gradient, 0.0)
    return value, jnp.sum(jnp.where(mask, weights * loss, 0.0)), gradient
