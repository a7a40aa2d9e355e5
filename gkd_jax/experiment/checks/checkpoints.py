"""Checks that a checkpoint matches the model and the vocabulary with which it is used."""

import dataclasses
from collections.abc import Mapping

import jax
from etils import epath

from gkd_jax.checkpoints import hf, load
from gkd_jax.checkpoints.layout import OtherShapesError
from gkd_jax.common.array_types import Params
from gkd_jax.data.hf_tokenizer import TOKENIZER, HFTokenizer
from gkd_jax.data.vocabularies import Vocabulary, check_same_vocabulary
from gkd_jax.devices.stacked_layers import layer_shape
from gkd_jax.experiment.checks import adapters
from gkd_jax.models import lora, stacking
from gkd_jax.models.base import LanguageModel


def check_checkpoint(
    setting: str,
    path: str,
    model: LanguageModel,
    vocabulary: Vocabulary,
    *,
    made_before: Mapping[str, LanguageModel],
) -> bool:
    """Checks the shapes and the vocabulary of a checkpoint without reading its parameters.

    If the model has adapters, only their shapes are checked, since its checkpoint has no others.

    Args:
      setting: the setting that gives the path, for messages.
      path: the checkpoint.
      model: the model that is to use the checkpoint's parameters.
      vocabulary: the vocabulary of the data.
      made_before: model of each checkpoint that another run of a study will write, by the
        checkpoint's path.

    Returns:
      Whether the checkpoint records the vocabulary that it was trained with. Always True
      for a checkpoint in `made_before`, since a run records its vocabulary.

    Raises:
      ValueError: the checkpoint is missing, or belongs to another model or vocabulary.
    """
    if setting != "Experiment.model_dir":
        adapters.check_whole(setting, path, model, made_before.get(path))
    if path in made_before:
        _check_same_shapes(setting, path, model, made_before[path])
        return True
    try:
        trained, _ = lora.split(model, model.abstract_params())
        info = load.check_compatible(path, trained)
    except (ValueError, OSError) as error:
        if isinstance(error, OtherShapesError):
            adapters.check_whole(setting, path)
        raise ValueError(f"{setting}: {error}") from error
    if info.kind == "hf":
        _check_same_config(setting, path, model)
        return _check_same_tokenizer(info.folder, vocabulary, setting=setting)
    trained_with = info.host.get("vocabulary")
    if trained_with is not None and trained_with["fingerprint"] != vocabulary.fingerprint:
        raise ValueError(
            f"{setting} {path} was trained with another vocabulary, so that its token ids "
            f"mean other pieces; got {trained_with['name']} ({trained_with['size']} ids, "
            f"{trained_with['fingerprint'][:12]}) there and {vocabulary.name} "
            f"({vocabulary.size} ids, {vocabulary.fingerprint[:12]}) here. Set "
            "DatasetConfig.vocabulary (VOCABULARY_PATH) to that one, or take another "
            "checkpoint."
        )
    return trained_with is not None


def _check_same_shapes(
    setting: str, path: str, model: LanguageModel, trained: LanguageModel
) -> None:
    shapes, trained_shapes = (
        {
            jax.tree_util.keystr(name, simple=True, separator="/"): array.shape
            for name, array in jax.tree_util.tree_leaves_with_path(_unstacked_params(each))
        }
        for each in (model, trained)
    )
    if shapes != trained_shapes:
        raise ValueError(
            f"{setting} {path} will hold a model of another shape; got {trained.config} there and "
            f"{model.config} here. Give both runs a model of the same sizes."
        )


def _unstacked_params(model: LanguageModel) -> Params:
    """Returns a model's shapes with one entry per layer, whether or not its layers are scanned.

    A checkpoint with scanned layers can be restored into a model whose layers are not
    scanned, and vice versa.
    """
    return stacking.unstack(model.abstract_params(), lambda array, _: layer_shape(array))


def _check_same_config(setting: str, path: str, model: LanguageModel) -> None:
    """Checks a model against config.json of a Hugging Face checkpoint.

    Two models may have the same shapes and differ otherwise, for example in their rotary base.

    Raises:
      ValueError: settings differ; the message names them.
    """
    config = model.config
    # These settings are not part of the architecture in config.json, and are not compared.
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


def _check_same_tokenizer(path: str, vocabulary: Vocabulary, *, setting: str) -> bool:
    """Checks that a Hugging Face checkpoint's tokenizer has the pieces of the data's vocabulary.

    The ids for padding and end of sequence are not compared. The run uses those of the data's
    vocabulary, and the tokenizer of a chat model may have different ones.

    Returns:
      Whether the checkpoint has a tokenizer.

    Raises:
      ValueError: an id stands for different pieces in the two vocabularies.
    """
    if not (epath.Path(path) / TOKENIZER).exists():
        return False
    tokenizer = HFTokenizer(path)
    if tokenizer.fingerprint != vocabulary.fingerprint:
        check_same_vocabulary(vocabulary, tokenizer, whose=setting)
    return True
