"""Checks of prepare on Hugging Face checkpoints: they are the model and vocabulary wanted."""

import dataclasses

from etils import epath

from gkd_jax.checkpoints import hf
from gkd_jax.data.hf_tokenizer import TOKENIZER, HFTokenizer
from gkd_jax.data.vocabularies import Vocabulary, check_same_vocabulary
from gkd_jax.models.base import LanguageModel


def check_same_config(setting: str, path: str, model: LanguageModel) -> None:
    """Refuses a model whose shapes fit, but that is not what config.json says (a rotary base).

    Raises:
      ValueError: naming the settings that differ.
    """
    config = model.config
    # What does not change the numbers that are computed, config.json does not say.
    there = hf.hf_model(
        path, dtype=config.dtype, dropout_rate=config.dropout_rate,
        scan_layers=config.scan_layers, remat_policy=config.remat_policy,
    ).config  # fmt: skip
    if there == config:
        return
    if type(there) is not type(config):
        differing = [f"a {type(there).__name__} there and a {type(config).__name__} here"]
    else:
        names = [field.name for field in dataclasses.fields(there)]
        differing = [
            f"{name} = {getattr(there, name)} there and {getattr(config, name)} here"
            for name in names
            if getattr(there, name) != getattr(config, name)
        ]
    raise ValueError(
        f"{setting} {path} is of another model than its weights are to be used for; got "
        f"{'; '.join(differing)}. Set the model to @hf.hf_model() with this path, which takes all "
        "from its config.json."
    )


def check_same_tokenizer(path: str, vocabulary: Vocabulary, *, setting: str) -> bool:
    """Compares the checkpoint's own tokenizer with the data's vocabulary, piece by piece.

    Which ids pad and end is the data's to say: a chat model's tokenizer has other ends.

    Returns:
      Whether there was one to compare.

    Raises:
      ValueError: their ids mean other pieces.
    """
    if not (epath.Path(path) / TOKENIZER).exists():
        return False
    tokenizer = HFTokenizer(path)
    if tokenizer.fingerprint != vocabulary.fingerprint:
        check_same_vocabulary(vocabulary, tokenizer, whose=setting)
    return True
