r"""Trains a SentencePiece vocabulary by one command:

python -m gkd_jax.data.train_vocabulary --inputs=train.en.gz,train.de.gz --vocab_size=8000 \
    --output=vocabulary

writes `vocabulary.model`. With `--task=NAME` (and
`--task_module`) the text is the prompts and outputs of a registered task instead.
"""

import io
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

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
    """Trains a model with T5's special ids: pad 0, eos 1, unk 2, no beginning of sequence.

    The same texts give the same file: one thread, all texts, no sampling.

    Args:
      texts: one sentence or document each; blank ones are left out.
      output: path without the ending '.model', which is added.
      vocab_size: number of pieces, the three special ones included.
      model_type: 'unigram' or 'bpe'.
      byte_fallback: whether 256 pieces are kept for the bytes of characters never seen.
      normalization: SentencePiece's rule, 'nmt_nfkc', 'nfkc', 'nmt_nfkc_cf' or 'identity'.
      character_coverage: share of all characters in the text that the pieces must cover.
      user_defined_symbols: pieces that are never split, e.g. a line's end.

    Returns:
      Path of the model file.

    Raises:
      ValueError: there is no text, or too little for so many pieces, or no sentencepiece.
    """
    sentencepiece = import_sentencepiece()
    sentences = (text for text in texts if text.strip())
    first = next(sentences, None)
    if first is None:
        raise ValueError(
            "train_vocabulary got no text: every line of --inputs is blank. Give files of text."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            normalization_rule_name=normalization,
            character_coverage=character_coverage,
            user_defined_symbols=list(user_defined_symbols),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise ValueError(
            f"train_vocabulary cannot make vocab_size={vocab_size} pieces of model_type="
            f"{model_type!r} from this text: {error}. Set --vocab_size within the bounds that "
            "SentencePiece names, or give more text."
        ) from error
    return _write(model.getvalue(), output)


def _write(model: bytes, output: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(f"{os.fspath(output).removesuffix('.model')}.model")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that a run beside this one never reads half a model.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(model)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def task_texts(task: Task, *, split: str = "train") -> Iterator[str]:
    """The prompts and outputs of a task, in order."""
    source = task.source_config(split).open()
    for index in range(len(source)):
        text = task.to_text(source[index])
        yield text.inputs
        yield text.targets


def define_flags() -> None:
    """Defines the command's flags; not at import, since their names are common ones."""
    flags.DEFINE_list("inputs", None, "Text files, plain or .gz, separated by commas.")
    flags.DEFINE_string("task", None, "A registered task whose text is taken instead.")
    flags.DEFINE_string("task_module", None, "Module that registers the task.")
    flags.DEFINE_string("split", "train", "Split of the task.")
    flags.DEFINE_string("output", None, "Path of the model, without '.model'.", required=True)
    flags.DEFINE_integer("vocab_size", 8000, "Number of pieces.", lower_bound=4)
    flags.DEFINE_enum("model_type", "unigram", ["unigram", "bpe"], "Kind of model.")
    flags.DEFINE_bool("byte_fallback", False, "Keep 256 pieces for the bytes of unseen text.")
    flags.DEFINE_string("normalization", "nmt_nfkc", "SentencePiece's rule.")
    flags.DEFINE_float("character_coverage", 1.0, "Share of all characters that is covered.")


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
