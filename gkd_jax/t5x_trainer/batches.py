"""Conversion between T5X's features and `Batch`."""

from collections.abc import Mapping

import jax.numpy as jnp

from gkd_jax.common.array_types import Array
from gkd_jax.common.batch import Batch

T5XBatch = Mapping[str, Array]
"""Maps the names of T5X's features to arrays, as `seqio.EncDecFeatureConverter` does."""


def to_batch(batch: T5XBatch) -> Batch:
    """Converts T5X's features to a `Batch`.

    T5X's features have no example ids. The index of a row in the global batch is used instead.

    Raises:
      ValueError: several examples are packed into a row.
    """
    packed = sorted(name for name in batch if name.endswith("_segment_ids"))
    if packed:
        raise ValueError(
            "a row of the batch must be one example, to which the student can write its own "
            f"output; got packed rows, with {', '.join(packed)}. Set utils.DatasetConfig.pack = "
            "False for train and train_eval."
        )
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    loss_weights = batch["decoder_loss_weights"].astype(jnp.float32)
    # An evaluation pads its last batch with rows of zeros.
    is_filler = ~jnp.any(loss_weights > 0, axis=1)
    return Batch(
        inputs=inputs,
        inputs_mask=inputs > 0,
        targets=targets,
        loss_weights=loss_weights,
        example_id=jnp.where(is_filler, -1, jnp.arange(targets.shape[0], dtype=jnp.int32)),
    )


def from_batch(batch: Batch) -> dict[str, Array]:
    """Converts a `Batch` to T5X's features; decoder inputs are the targets, shifted by one."""
    return {
        "encoder_input_tokens": batch.inputs,
        "decoder_input_tokens": jnp.pad(batch.targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": batch.targets,
        "decoder_loss_weights": batch.loss_weights,
    }
