"""Checks of an export, and the tokenizer files that it copies."""

import os

from etils import epath

from gkd_jax.checkpoints import hf, peft
from gkd_jax.common import hub
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.vocabularies import SentencePieceVocabulary
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.models import families, lora

_T5 = "t5"


def check_export(experiment: Experiment) -> epath.Path:
    """Checks the settings of an export against the student.

    Returns:
      The folder in which the export's directory is to be created.

    Raises:
      ValueError: `Experiment.export` is None, the directory exists already or is not local, or the
        format cannot represent the student.
    """
    export = experiment.export
    if export is None:
        raise ValueError(
            "--run_mode=export writes what Experiment.export says; got None. Set it "
            "(gin_configs/export.gin)."
        )
    if "://" in export.output:
        raise ValueError(
            f"Export.output must be a local directory; got {export.output!r}. Export to one, and "
            "copy it."
        )
    if epath.Path(export.output).exists():
        raise ValueError(
            f"Export.output {export.output} exists already, and nothing is written over. Set it to "
            "a new directory, or remove that one."
        )
    model = experiment.student.model
    kind = families.model_to_hf(lora.base_of(model))["model_type"]
    if export.format == "t5x" and kind != _T5:
        raise ValueError(
            "Export.format = 't5x' writes the parameters of T5X's T5; got Student.model = "
            f"{type(lora.base_of(model)).__name__} ({kind}), which has no tree there. Set it "
            "(EXPORT_FORMAT) to 'hf'."
        )
    if export.adapters:
        if not lora.has_adapters(model):
            raise ValueError(
                "Export.adapters writes the adapters of a LoRA student alone; got Student.model = "
                f"{type(model).__name__}, which has none. Set it (EXPORT_ADAPTERS) to False."
            )
        peft.check_base_architecture(experiment.student.initial_checkpoint)
    tokenizer_files(experiment)
    return epath.Path(export.output).absolute().parent


def tokenizer_files(experiment: Experiment) -> dict[str, epath.Path]:
    """Returns the paths of the tokenizer files to copy, by their names in the export.

    Raises:
      FileNotFoundError: the tokenizer's directory has no tokenizer files.
    """
    assert experiment.export is not None
    vocabulary = experiment.train_data.vocabulary
    path = experiment.export.tokenizer
    if path is None and isinstance(vocabulary, HFTokenizer):
        path = os.fspath(vocabulary.folder)
    if path is not None:
        folder = hub.find(path)
        found = {name: folder / name for name in hf.TOKENIZER_FILES if (folder / name).is_file()}
        if not found:
            raise FileNotFoundError(
                f"Export.tokenizer names {path}, which holds no tokenizer ("
                f"{', '.join(hf.TOKENIZER_FILES[:3])} ...). Give the directory of a checkpoint "
                "that has one."
            )
        return found
    if isinstance(vocabulary, SentencePieceVocabulary):
        base = lora.base_of(experiment.student.model)
        is_t5 = families.model_to_hf(base)["model_type"] == _T5
        return {"spiece.model" if is_t5 else "tokenizer.model": epath.Path(vocabulary.path)}
    return {}
