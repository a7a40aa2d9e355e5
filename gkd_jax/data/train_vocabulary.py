r"""A command that trains a SentencePiece vocabulary.

    python -m gkd_jax.data.train_vocabulary --inputs=train.en.gz,train.de.gz --vocab_size=8000 \
        --output=vocabulary

writes `vocabulary.model`. With `--task=NAME` (and `--task_module`) the text consists of the prompts
and outputs of a registered task instead.
"""

import io
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from absl import app, flags

from gkd_jax.data.registry import get_task
from gkd_jax.data.task import Task
from gkd_jax.data.text_files import TextLines
from gkd_jax.data.vocabularies import import_sentencepiece

_MAX_SENTENCE_BYTES = 1 << 16


def train_sentencepiece(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    model_type: str = "unigram",
    byte_fallback: bool = False,
    normalization: str = "nmt_nfkc",
    character_coverage: float = 1.0,
    user_defined_symbols: tuple[str, ...] = (),
) -> pathlib.Path:
    """Trains a model with the special ids of T5: padding 0, end of sequence 1, unknown 2.

    The model has no beginning of sequence. Training is deterministic: one thread, all texts, no
    sampling.

    Args:
      texts: sentences or documents; blank ones are skipped.
      output: path of the model, with or without the ending '.model'.
      vocab_size: number of pieces, including the three special ones.
      model_type: 'unigram' or 'bpe'.
      byte_fallback: whether 256 pieces are reserved for the bytes of unseen characters.
      normalization: rule of SentencePiece: 'nmt_nfkc', 'nfkc', 'nmt_nfkc_cf' or 'identity'.
      character_coverage: fraction of the characters in the text that the pieces must cover.
      user_defined_symbols: pieces that are never split, e.g. a newline.

    Returns:
      Path of the model file.

    Raises:
      ValueError: there is no text, the text is too short for `vocab_size` pieces, or sentencepiece
        is not installed.
    """
    sentences = (text for text in texts if text.strip())
    first = next(sentences, None)
    if first is None:
        raise ValueError(
            "train_vocabulary got no text: every line of --inputs is blank. Give files of text."
        )
    model = _train(
        itertools.chain([first], sentences),
        vocab_size=vocab_size,
        model_type=model_type,
        byte_fallback=byte_fallback,
        normalization_rule_name=normalization,
        character_coverage=character_coverage,
        user_defined_symbols=list(user_defined_symbols),
    )
    return _write(model, output)


def _train(sentences: Iterator[str], *, vocab_size: int, model_type: str, **options: Any) -> bytes:
    """Returns a serialized model; `options` are passed to SentencePiece's trainer."""
    model = io.BytesIO()
    try:
        import_sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            minloglevel=1,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(
            f"train_vocabulary cannot make vocab_size={vocab_size} pieces of model_type="
            f"{model_type!r} from this text: {error}. Set --vocab_size within the bounds that "
            "SentencePiece names, or give more text."
        ) from error
    return model.getvalue()


def _write(model: bytes, output: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(f"{os.fspath(output).removesuffix('.model')}.model")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is renamed when it is complete, so that a concurrent run never reads half a model.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(model)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def task_texts(task: Task, *, split: str = "train") -> Iterator[str]:
    """Yields the prompts and outputs of a task, in order."""
    source = task.source_config(split).open()
    for index in range(len(source)):
        text = task.to_text(source[index])
        yield text.inputs
        yield text.targets


def define_flags() -> None:
    """Defines the flags of the command.

    Not called on import, since flags of other programs may have these common names.
    """
    flags.DEFINE_list("inputs", None, "Text files, plain or .gz, separated by commas.")
    flags.DEFINE_string("task", None, "A registered task whose text is used instead.")
    flags.DEFINE_string("task_module", None, "Module that registers the task.")
    flags.DEFINE_string("split", "train", "Split of the task.")
    flags.DEFINE_string("output", None, "Path of the model, without '.model'.", required=True)
    flags.DEFINE_integer("vocab_size", 8000, "Number of pieces.", lower_bound=4)
    flags.DEFINE_enum("model_type", "unigram", ["unigram", "bpe"], "Kind of model.")
    flags.DEFINE_bool("byte_fallback", False, "Reserve 256 pieces for the bytes of unseen text.")
    flags.DEFINE_string("normalization", "nmt_nfkc", "SentencePiece's rule.")
    flags.DEFINE_float("character_coverage", 1.0, "Fraction of all characters that is covered.")


def main(argv: list[str]) -> None:
    chosen = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"Arguments not understood: {argv[1:]}.")
    if (chosen.inputs is None) == (chosen.task is None):
        raise app.UsageError("Give either --inputs=FILE,FILE or --task=NAME.")
    texts: Iterable[str]
    if chosen.task is not None:
        texts = task_texts(get_task(chosen.task, module=chosen.task_module), split=chosen.split)
    else:
        lines = TextLines(tuple(chosen.inputs), setting="--inputs")
        texts = (lines[index] for index in range(len(lines)))
    path = train_sentencepiece(
        texts,
        chosen.output,
        vocab_size=chosen.vocab_size,
        model_type=chosen.model_type,
        byte_fallback=chosen.byte_fallback,
        normalization=chosen.normalization,
        character_coverage=chosen.character_coverage,
    )
    print(f"Wrote {path}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
