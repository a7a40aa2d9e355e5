"""Conversion of registered seqio tasks and mixtures into tasks of gkd_jax.

A seqio dataset is a stream. It is read once and written to indexed files, so that order, batches
and exact resumption are the same as for other sources. The files are identified by a fingerprint of
everything that determines their content, and reading them does not need TensorFlow.
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gkd_jax.data.seqio_description import describe
from gkd_jax.data.seqio_metrics import SeqioMetric, encode_reference
from gkd_jax.data.seqio_vocabulary import wrap_vocabulary
from gkd_jax.data.task import Source, Task, TextExample, import_task_module
from gkd_jax.data.token_files import TokenFiles, TokensToText, write_token_files
from gkd_jax.data.vocabularies import Vocabulary

_logger = logging.getLogger(__name__)


def _seqio() -> Any:
    try:
        return importlib.import_module("seqio")
    except ImportError as error:
        raise ValueError(
            f"A seqio task needs the package seqio, which cannot be imported ({error}). Install "
            "it with: pip install 'gkd_jax[data]'"
        ) from error


def seqio_names() -> list[str]:
    """Lists the names of all registered seqio tasks and mixtures."""
    seqio = _seqio()
    return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def _find(name: str, module: str | None = None) -> Any:
    """Returns a registered seqio task or mixture, after importing the module that registers it."""
    if module is not None:
        import_task_module(module)
    names = seqio_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
        hint = f"Nearest: {', '.join(map(repr, near))}." if near else f"Registered: {names}."
        raise ValueError(
            f"seqio knows no task or mixture {name!r}. {hint} Name the module that registers it "
            "in MIXTURE_OR_TASK_MODULE."
        )
    return _seqio().get_mixture_or_task(name)


def seqio_task(
    name: str,
    *,
    module: str | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    seed: int = 0,
    num_examples: int | None = None,
    cache_dir: str | None = None,
) -> Task:
    """Converts a seqio task or mixture into a task, with its splits, tokens and metrics.

    Of the seqio task's metrics, those with the signature (targets, predictions) are kept. The
    task's postprocessing is applied before them. A mixture has metrics only if all of its tasks
    have the same metrics and postprocessing.

    Args:
      name: name in seqio's registry.
      module: module to import first, which registers the task.
      feature_lengths: seqio's sequence lengths, for tasks whose preprocessors need them (span
        corruption, packing). None leaves truncation to the pipeline, which truncates as seqio does.
      seed: seed of random preprocessors and of the choices of a mixture.
      num_examples: number of examples to read of each split; a shorter split is repeated. None
        reads a task once, and a mixture until its first task is exhausted.
      cache_dir: folder of the token files; None uses `~/.cache/gkd_jax/seqio`.

    Returns:
      The task, to be used in a `DatasetConfig` with `seqio_vocabulary(name)`.

    Raises:
      ValueError: seqio is not installed; no task or module has this name (the message has the
        nearest names); or the task has no 'inputs' or 'targets'.
    """
    provider = _find(name, module)
    _check_features(provider)
    _check_local(cache_dir)
    try:
        splits = list(provider.splits)
    except Exception as error:  # Errors of files or of the network, of any type.
        raise ValueError(
            f"The splits of seqio task {name!r} cannot be read: {type(error).__name__}: {error}. "
            "Check that its data are in place."
        ) from error
    lengths = None if feature_lengths is None else tuple(sorted(feature_lengths.items()))
    return Task(
        name=name,
        sources={
            split: SeqioSource(name, split, module, lengths, seed, num_examples, cache_dir)
            for split in splits
        },
        to_text=TokensToText(),
        metrics=tuple(_metrics(provider)),
        inputs_eos=bool(provider.output_features["inputs"].add_eos),
        vocabulary_fingerprint=seqio_vocabulary(name, module=module).fingerprint,
    )


def seqio_vocabulary(
    name: str, *, module: str | None = None, feature: str = "targets"
) -> Vocabulary:
    """Returns the vocabulary of a feature of a seqio task.

    Args:
      name: name of a seqio task or mixture.
      module: module to import first, which registers the task.
      feature: feature whose vocabulary is returned, 'targets' or 'inputs'. The choice matters
        only if their vocabularies differ.

    Returns:
      A vocabulary with the same ids. SentencePiece and byte vocabularies do not need TensorFlow.

    Raises:
      ValueError: see `seqio_task`.
    """
    provider = _find(name, module)
    _check_features(provider)
    return wrap_vocabulary(provider.output_features[feature].vocabulary)


def _check_features(provider: Any) -> None:
    missing = [key for key in ("inputs", "targets") if key not in provider.output_features]
    if missing:
        raise ValueError(
            f"seqio task {provider.name!r} lacks the output feature {missing[0]!r}; it has "
            f"{', '.join(map(repr, provider.output_features))}. Use a task with 'inputs' and "
            "'targets'."
        )


def _check_local(cache_dir: str | None) -> None:
    if cache_dir is not None and "://" in cache_dir:
        raise ValueError(
            f"SeqioSource.cache_dir must be a local folder, which is read in random access; got "
            f"{cache_dir!r}. Leave it None, or name a folder on a disk."
        )


def _subtasks(provider: Any) -> list[Any]:
    return list(_seqio().get_subtasks(provider))


def _metrics(provider: Any) -> list[SeqioMetric]:
    first, *others = _subtasks(provider)
    for task in others:
        same = task.postprocessor == first.postprocessor and task.metric_fns == first.metric_fns
        if not same:
            _logger.warning(
                "The tasks of seqio mixture %r have different metrics: none is computed. Evaluate "
                "one of its tasks.",
                provider.name,
            )
            return []
    unused = [fn for fn in first.metric_fns if fn not in first.predict_metric_fns]
    if unused:
        _logger.warning(
            "Metrics of seqio task %r that need scores are not computed: %s",
            first.name,
            ", ".join(getattr(fn, "__name__", repr(fn)) for fn in unused),
        )
    return [SeqioMetric(first.name, number) for number in range(len(first.predict_metric_fns))]


@dataclasses.dataclass(frozen=True)
class SeqioSource:
    """One split of a seqio task or mixture; see `seqio_task` for the settings.

    `feature_lengths` are (name, length) pairs, so that sources are hashable.
    """

    name: str
    split: str
    module: str | None = None
    feature_lengths: tuple[tuple[str, int], ...] | None = None
    seed: int = 0
    num_examples: int | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _check_local(self.cache_dir)
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(
                f"SeqioSource.num_examples must be at least 1 or None; got {self.num_examples}."
            )

    def open(self) -> Source:
        """Opens the token files. If there are none with this fingerprint, they are written first.

        Raises:
          ValueError: see `seqio_task`; or the task's pipeline fails or gives no example.
        """
        provider = _find(self.name, self.module)
        _check_features(provider)
        description = json.dumps(
            {
                "name": self.name,
                "split": self.split,
                "feature_lengths": self.feature_lengths,
                "seed": self.seed,
                "num_examples": self.num_examples,
                "provider": describe(provider, self.split),
            },
            sort_keys=True,
        )
        digest = hashlib.sha256(description.encode()).hexdigest()
        label = re.sub(r"[^\w.-]+", "_", f"{self.name}-{self.split}")
        folder = self._root() / f"{label}-{digest[:16]}"
        if not (folder / "meta.json").is_file():
            _logger.info("Writing the tokens of %s, split %s, to %s", self.name, self.split, folder)
            try:
                write_token_files(folder, self._examples(provider), description=description)
            except Exception as error:  # Preprocessors may raise any exception.
                raise ValueError(
                    f"seqio task {self.name!r}, split {self.split!r}, cannot be written as tokens "
                    f"to {str(folder)!r}: {type(error).__name__}: {error}. Check that its data "
                    "are in place; a task whose preprocessors want sequence lengths needs "
                    "seqio_task(feature_lengths=...)."
                ) from error
        return TokenFiles(folder)

    def _root(self) -> pathlib.Path:
        if self.cache_dir is not None:
            return pathlib.Path(self.cache_dir).expanduser()
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return pathlib.Path(root).expanduser() / "gkd_jax" / "seqio"

    def _examples(self, provider: Any) -> Iterator[TextExample]:
        features = provider.output_features
        task = _subtasks(provider)[0]
        parses = bool(_metrics(provider)) and task.postprocessor is not None
        for example in self._dataset(provider).as_numpy_iterator():
            texts = {key: _text(example, key, features[key].vocabulary) for key in features}
            references = (texts["targets"],)
            if parses:
                target = task.postprocess_fn(texts["targets"], example=example, is_target=True)
                references = (encode_reference(target),)
            yield TextExample(
                inputs=texts["inputs"],
                targets=texts["targets"],
                references=references,
                inputs_ids=tuple(example["inputs"].tolist()),
                targets_ids=tuple(example["targets"].tolist()),
            )

    def _dataset(self, provider: Any) -> Any:
        import tensorflow as tf

        # Sets TensorFlow's global seed for operations without a seed of their own. The function
        # of a `FunctionDataSource` often takes no seed and contains such operations.
        tf.random.set_seed(self.seed)
        arguments: dict[str, Any] = {
            "sequence_length": None if self.feature_lengths is None else dict(self.feature_lengths),
            "split": self.split,
            "shuffle": False,
            "seed": self.seed if _takes_seed(provider) else None,
            "num_epochs": 1 if self.num_examples is None else None,
        }
        if isinstance(provider, _seqio().Mixture):
            try:
                dataset = provider.get_dataset(**arguments, copy_pretokenized=True)
            except (TypeError, ValueError):  # Some tasks do not keep the text before tokenization.
                dataset = provider.get_dataset(**arguments)
        else:
            dataset = provider.get_dataset(**arguments)
        return dataset if self.num_examples is None else dataset.take(self.num_examples)


def _takes_seed(provider: Any) -> bool:
    """Returns whether all sources accept a seed.

    seqio raises an error if it gets a seed for a function without such a parameter.
    """
    function_source = _seqio().FunctionDataSource
    return all(
        "seed" in inspect.signature(task.source._dataset_fn).parameters
        for task in _subtasks(provider)
        if isinstance(task.source, function_source)
    )


def _text(example: Mapping[str, Any], feature: str, vocabulary: Any) -> str:
    """Returns the text before tokenization if the example has it, else the decoded tokens."""
    text = example.get(f"{feature}_pretokenized")
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if isinstance(text, str):
        return text
    decoded = vocabulary.decode(example[feature].tolist())
    return decoded if isinstance(decoded, str) else ""
