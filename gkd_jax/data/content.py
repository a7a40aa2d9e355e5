"""The content of a data set: everything that determines the token ids of its examples."""

import dataclasses
import hashlib
import json
from typing import Any

from gkd_jax.data.chat import ChatTemplate
from gkd_jax.data.encoding import Encoder
from gkd_jax.data.examples import Examples
from gkd_jax.data.teacher_store import differences

_HASHED_EXAMPLES = 8


def content_of(
    examples: Examples,
    encoder: Encoder,
    *,
    chat: ChatTemplate | None,
    teacher_chat: ChatTemplate | None,
) -> dict[str, Any]:
    """Describes everything that determines the rows of the examples, except their order.

    A digest of the text of a few examples is included, so that changes of the task's code are
    noticed.

    Args:
      examples: texts of the examples.
      encoder: converts the texts to token ids.
      chat: template of the student's prompts, if any.
      teacher_chat: template of the teacher's prompts, if it differs.

    Returns:
      A description that JSON can represent.
    """
    sample = examples.sample(_HASHED_EXAMPLES)
    texts = [dataclasses.astuple(examples[int(number)]) for number in sample]
    # Settings that were added later are included only if they differ from their defaults, so that
    # positions saved by earlier versions remain valid.
    newer: dict[str, Any] = {"inputs_bos": True} if encoder.inputs_bos else {}
    newer |= {"cut_inputs": "left"} if encoder.cut_inputs == "left" else {}
    for name, template in (("chat", chat), ("teacher_chat", teacher_chat)):
        if template is not None:
            newer[name] = template.render([{"role": "user", "content": "?"}])
    return newer | {
        "source": examples.source_fingerprint,
        "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "num_examples": len(examples),
        "feature_lengths": {"inputs": encoder.inputs_length, "targets": encoder.targets_length},
        "inputs_eos": encoder.inputs_eos,
        "eos_after_cut_targets": encoder.eos_after_cut_targets,
        "vocabulary": encoder.vocabulary.fingerprint,
        "eos_ids": list(encoder.vocabulary.eos_ids),
    }


def check_unchanged(saved: str, fingerprint: str) -> None:
    """Refuses to resume from a position that was saved for other data.

    Args:
      saved: the fingerprint that was saved with the position.
      fingerprint: the fingerprint of the present data.

    Raises:
      ValueError: the fingerprints differ; the message names the differences.
    """
    if saved == fingerprint:
        return
    try:
        before = dict(json.loads(saved))
    except (ValueError, TypeError):
        before = {}
    raise ValueError(
        "The position in the training data cannot be restored, since the data are not those "
        f"it was saved for ({differences(before, json.loads(fingerprint))}). Restore the "
        "data and DatasetConfig of that run, or start in a new MODEL_DIR."
    )
