"""Run mode `store_teacher`: writes the teacher's distributions for a data set's outputs.

Training from such a store (`teachers.StoredTeacher`) does not run the teacher. A stopped run of
this mode resumes.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax

from gkd_jax.common.array_types import Array, Key, Params
from gkd_jax.common.batch import Batch
from gkd_jax.data import vocabularies
from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.teacher_store import Block, StoreWriter
from gkd_jax.devices.processes import process_zero_decides
from gkd_jax.distillation.stored_distributions import Sparsification, token_keys
from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.settings import Storing
from gkd_jax.models.base import LanguageModel
from gkd_jax.objectives.per_token import tempered_log_probs
from gkd_jax.training import parameters
from gkd_jax.training.keys import Purpose, make_key


def store_teacher(experiment: Experiment) -> str:
    """Writes a store with the settings of `Experiment.storing`.

    Examples that an earlier run with the same settings wrote are kept.

    Returns:
      One line with the folder of the store, its size, and its size per token.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
      ValueError: the folder contains a store that was written with other settings.
    """
    prepared = prepare.prepare(experiment, run_mode="store_teacher")
    storing, dataset = experiment.storing, prepared.storing_data
    model = experiment.teacher_model
    assert storing is not None
    assert dataset is not None
    assert model is not None
    teacher = parameters.teacher_to_use(experiment)
    description = _describe(experiment, storing, dataset, teacher.source, teacher.params)
    writer: StoreWriter | None = None

    def begin() -> int:
        nonlocal writer
        writer = StoreWriter(storing.output, description)
        return writer.num_done

    # Only process 0 reads and writes the files.
    num_done = process_zero_decides(begin)
    logging.info("store_teacher: %d of %d examples are done", num_done, dataset.num_examples)
    choose = jax.jit(
        experiment.partitioner.annotate(
            make_choose(model, storing.sparsification, experiment.objective.teacher_temperature)
        ),
        out_shardings=experiment.partitioner.batch_sharding,
    )
    key = make_key(experiment.seed, Purpose.STORED_DRAWS)
    layout = experiment.partitioner.data_layout
    for number, (batch, _) in enumerate(
        dataset.eval_batches(process_index=layout.shard_id, process_count=layout.num_shards)
    ):
        end = min((number + 1) * storing.data.batch_size, dataset.num_examples)
        if end <= num_done:
            continue
        batch = experiment.partitioner.shard_batch(batch)
        chosen = choose(teacher.params, batch, key)
        rows, chosen = experiment.partitioner.fetch_to_host((batch, chosen))
        if writer is not None:
            packing = storing.sparsification.packing(model.vocab_size)
            writer.append(list(_blocks(packing, rows, chosen, first=num_done)))
        logging.log_every_n_seconds(
            logging.INFO, "store_teacher: %d of %d examples are done", 10, end,
            dataset.num_examples,
        )  # fmt: skip
    return _report(storing, writer, model.vocab_size)


def _report(storing: Storing, writer: StoreWriter | None, vocab_size: int) -> str:
    if writer is None:
        return storing.output
    num_tokens, num_bytes = writer.summary()
    return (
        f"{storing.output}: {num_tokens:,} tokens, {num_bytes:,} bytes, "
        f"{num_bytes / max(num_tokens, 1):.1f} a token (float32 of the whole vocabulary: "
        f"{4 * vocab_size:,})"
    )


def make_choose(
    model: LanguageModel, sparsification: Sparsification, temperature: float
) -> Callable[[Params, Batch, Key[Array, ""]], tuple[Array, ...]]:
    """Returns a function of `(params, batch, key)` that returns the entries to store, [B, T, ...].

    The function processes one position of all rows at a time, so that it holds only logits [B, V].
    """

    def choose(params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Array, ...]:
        hidden = model.hidden_states(params, batch.as_teacher_reads())
        head = model.head(params)

        def at_position(arrays: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            hidden, targets, position = arrays
            log_probs = tempered_log_probs(model.unembed(head, hidden), temperature)
            keys = token_keys(key, batch.example_id, position)
            return sparsification.choose(log_probs, targets, keys)

        positions = jnp.arange(batch.targets.shape[1])
        arrays = (jnp.swapaxes(hidden, 0, 1), batch.targets.T, positions)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), lax.map(at_position, arrays))

    return choose


def _blocks(
    packing: Any, rows: Batch, chosen: tuple[np.ndarray, ...], *, first: int
) -> Iterator[Block]:
    """Yields a packed block for each row whose example index is at least `first`.

    Only tokens with a loss weight are packed.
    """
    for row, example in enumerate(np.asarray(rows.example_id).tolist()):
        if example < first:  # The example was written before, or the row is padding (-1).
            continue
        mask = np.asarray(rows.loss_weights)[row] > 0
        content, num_entries = packing.pack(*(array[row][mask] for array in chosen))
        yield Block(
            content,
            num_entries,
            inputs=np.asarray(rows.inputs)[row][np.asarray(rows.inputs_mask)[row]],
            targets=np.asarray(rows.targets)[row][mask],
        )


def _describe(
    experiment: Experiment, storing: Storing, dataset: Dataset, source: str, params: Params
) -> dict[str, Any]:
    """Returns everything that determines the content of the store or is needed to read it."""
    model = experiment.teacher_model
    assert model is not None
    return {
        "teacher": source,
        "teacher_model": str(model.config),
        "teacher_parameters": fingerprint_of_params(params),
        "vocabulary": vocabularies.describe_vocabulary(storing.data.vocabulary),
        "vocab_size": model.vocab_size,
        "temperature": float(experiment.objective.teacher_temperature),
        # The value is the sparsification. Its key is still 'support', as in older stores.
        "support": str(storing.sparsification),
        "packing": storing.sparsification.packing(model.vocab_size).describe(),
        "seed": experiment.seed,
        "data": dataset.content,
    }


def fingerprint_of_params(params: Params) -> str:
    """Returns a hex digest of the names and bits of parameters, independent of the mesh."""
    arrays = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_bit_sums([array for _, array in arrays]))
    named = [
        (jax.tree_util.keystr(path), array.shape, str(array.dtype), int(total))
        for (path, array), total in zip(arrays, sums, strict=True)
    ]
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


@jax.jit
def _bit_sums(arrays: list[Array]) -> list[Array]:
    """Sums the bits of each array as integers, weighted by position, modulo 2**32."""

    def total(array: Array) -> Array:
        bits = lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis in range(array.ndim):
            place = place * jnp.uint32(array.shape[axis]) + lax.broadcasted_iota(
                jnp.uint32, array.shape, axis
            )
        # Each position has an odd factor from the whole 32-bit range, so that exchanging two
        # numbers changes the sum.
        factor = (place * jnp.uint32(2654435761)) ^ (place >> 7)
        return jnp.sum(bits * (2 * factor + 1))

    return [total(array) for array in arrays]
