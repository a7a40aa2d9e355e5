"""Tasks and mixtures of seqio's registry, from a user's module."""

import logging
import sys
import textwrap

import numpy as np
import pytest

from gkd_jax.data import seqio_adapter
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.registry import get_task
from gkd_jax.data.seqio_metrics import decode_reference, encode_reference
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary

_MODULE = "gkd_seqio_test_tasks"
_SOURCE = """
    import seqio
    import tensorflow as tf

    FEATURES = {
        "inputs": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
        "targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
    }
    READS = []


    def numbers(split, shuffle_files=False):
        READS.append(split)
        first = 0 if split == "train" else 1000
        return tf.data.Dataset.range(first, first + 40)


    def sums(dataset):
        def add(number):
            text = tf.strings.as_string(number)
            return {
                "inputs": tf.strings.join([text, "+1=\u00fc"]),
                "targets": tf.strings.as_string(number + 1),
            }

        return dataset.map(add)


    @seqio.map_over_dataset(num_seeds=1)
    def add_noise(example, seed):
        noise = tf.random.stateless_uniform([], seed, 0, 1 << 30, tf.int32)
        inputs = tf.strings.join([example["inputs"], tf.strings.as_string(noise)])
        return {**example, "inputs": inputs}


    def to_int(text, example=None, is_target=False):
        return int(text) if text.isdigit() else None


    def accuracy(targets, predictions):
        right = sum(t == p for t, p in zip(targets, predictions))
        return {"right": right / len(targets), "count": seqio.metrics.Scalar(len(targets))}


    def from_scores(targets, scores):
        return {"loss": 0.0}


    END = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]


    def add(name, preprocessors, **settings):
        source = seqio.FunctionDataSource(numbers, splits=["train", "validation"])
        settings = {"output_features": FEATURES, **settings}
        seqio.TaskRegistry.add(name, source=source, preprocessors=preprocessors, **settings)


    add(
        "gkd_sums", [sums, *END], postprocess_fn=to_int, metric_fns=[accuracy, from_scores]
    )
    add("gkd_plain", [sums, *END])
    add("gkd_noise", [sums, add_noise, *END])
    add("gkd_broken", [lambda dataset: dataset.map(lambda x: {"inputs": x}), *END])
    add("gkd_targets_only", [sums, *END], output_features={"targets": FEATURES["targets"]})
    seqio.MixtureRegistry.add("gkd_mixture", [("gkd_sums", 1), ("gkd_plain", 3)])
"""

_LINES = """
    from {module} import *


    def read_lines(path):
        source = seqio.TextLineDataSource({{"train": path}})
        copy = lambda dataset: dataset.map(lambda line: {{"inputs": line, "targets": line}})
        seqio.TaskRegistry.add(
            "gkd_lines", source=source, preprocessors=[copy, *END], output_features=FEATURES
        )
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The imported module of a user's tasks."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / f"{_MODULE}.py").write_text(textwrap.dedent(_SOURCE), "utf-8")
    lines = _LINES.format(module=_MODULE)
    (folder / f"{_MODULE}_lines.py").write_text(textwrap.dedent(lines), "utf-8")
    sys.path.insert(0, str(folder))
    yield __import__(_MODULE)
    sys.path.remove(str(folder))


def _examples(source, task):
    return [task.to_text(source[index]) for index in range(len(source))]


@pytest.mark.slow
def test_a_task_is_written_once_and_read_back_with_the_same_ids(tasks, tmp_path):
    import seqio

    task = seqio_adapter.seqio_task("gkd_sums", module=_MODULE, cache_dir=str(tmp_path))
    assert set(task.sources) == {"train", "validation"}
    assert task.inputs_eos
    tasks.READS.clear()
    source = task.sources["train"].open()
    assert tasks.READS == ["train"]
    examples = _examples(source, task)
    assert len(examples) == 40
    stream = seqio.get_mixture_or_task("gkd_sums").get_dataset(split="train", shuffle=False)
    for example, expected in zip(examples, stream.as_numpy_iterator(), strict=True):
        assert list(example.inputs_ids) == expected["inputs"].tolist()
        assert list(example.targets_ids) == expected["targets"].tolist()
        assert example.inputs.encode() == expected["inputs_pretokenized"]
    assert examples[7].inputs == "7+1=ü"
    assert examples[7].targets == "8"
    assert decode_reference(examples[7].references[0]) == 8

    tasks.READS.clear()
    again = seqio_adapter.seqio_task("gkd_sums", cache_dir=str(tmp_path)).sources["train"].open()
    assert tasks.READS == [], "the files are used again"
    assert again.fingerprint == source.fingerprint
    other = task.sources["validation"].open()
    assert other.fingerprint != source.fingerprint
    assert task.to_text(other[0]).inputs.startswith("1000+1")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_batches_hold_the_tasks_tokens(tasks, tmp_path):
    vocabulary = seqio_adapter.seqio_vocabulary("gkd_sums", module=_MODULE)
    assert vocabulary == ByteVocabulary()
    config = DatasetConfig(
        task=seqio_adapter.seqio_task("gkd_sums", cache_dir=str(tmp_path)),
        split="train",
        feature_lengths={"inputs": 12, "targets": 6},
        batch_size=8,
        vocabulary=vocabulary,
        shuffle=False,
    )
    batch = next(config.build().train_iterator())
    assert vocabulary.decode(batch.inputs[3].tolist()) == "3+1=ü"
    ids = [*vocabulary.encode("4"), 1]
    np.testing.assert_array_equal(batch.targets[3], [*ids, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.loss_weights[3], [1, 1, 0, 0, 0, 0])


@pytest.mark.slow
def test_metrics_are_the_seqio_tasks_own(tasks, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = seqio_adapter.seqio_task("gkd_sums", module=_MODULE, cache_dir=str(tmp_path))
    assert "need scores are not computed: from_scores" in caplog.text
    examples = _examples(task.sources["train"].open(), task)[:4]
    references = [list(example.references) for example in examples]
    (metric,) = task.metrics
    scores = metric(references, ["1", "2", "x", "4"])
    assert {name: score.value for name, score in scores.items()} == {"right": 0.75, "count": 4.0}
    assert scores["right"].standard_error is None


@pytest.mark.slow
def test_what_changes_the_content_changes_the_files(tasks, tmp_path):
    folder = tmp_path / "cache"

    def fingerprint(name, **settings):
        task = seqio_adapter.seqio_task(name, module=_MODULE, cache_dir=str(folder), **settings)
        return task.sources["train"].open().fingerprint

    plain = fingerprint("gkd_plain")
    assert fingerprint("gkd_plain", num_examples=100) != plain
    cut = fingerprint("gkd_plain", feature_lengths={"inputs": 4, "targets": 4})
    assert cut != plain

    noise = fingerprint("gkd_noise")
    assert fingerprint("gkd_noise", seed=1) != noise
    # The same in a second place: random preprocessors follow the seed.
    other = seqio_adapter.seqio_task("gkd_noise", cache_dir=str(tmp_path / "second"))
    assert other.sources["train"].open().fingerprint == noise

    lines = __import__(f"{_MODULE}_lines")
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n")
    lines.read_lines(str(path))
    before = fingerprint("gkd_lines")
    path.write_text("one\nthree\n")
    assert fingerprint("gkd_lines") != before


@pytest.mark.slow
def test_num_examples_repeats_a_short_task(tasks, tmp_path):
    task = seqio_adapter.seqio_task("gkd_plain", num_examples=100, cache_dir=str(tmp_path))
    examples = _examples(task.sources["train"].open(), task)
    assert len(examples) == 100
    assert examples[43] == examples[3]


@pytest.mark.slow
def test_a_mixture_keeps_its_rates(tasks, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = seqio_adapter.seqio_task("gkd_mixture", num_examples=80, cache_dir=str(tmp_path))
    assert "different metrics" in caplog.text
    assert task.metrics == ()
    examples = _examples(task.sources["train"].open(), task)
    assert len(examples) == 80
    # One task in four draws: the second pass of the one with rate 3 begins before that of the
    # other, so that some prompts occur more often.
    counts = [sum(e.inputs == f"{n}+1=ü" for e in examples) for n in range(40)]
    assert sum(counts) == 80
    assert counts[0] >= 2
    assert counts[0] > counts[39]


@pytest.mark.slow
def test_get_task_finds_seqio_tasks_and_says_what_is_near(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    task = get_task("gkd_plain", module=_MODULE)
    assert len(task.sources["validation"].open()) == 40
    assert (tmp_path / "gkd_jax" / "seqio").is_dir()
    with pytest.raises(ValueError, match=r"'gkd_plane'.*'gkd_plain'"):
        get_task("gkd_plane", module=_MODULE)
    with pytest.raises(ValueError, match=r"no task or mixture 'gkd_sum'\. Nearest: 'gkd_sums'"):
        seqio_adapter.seqio_task("gkd_sum")


@pytest.mark.slow
def test_errors_name_the_setting_and_the_remedy(tasks, tmp_path):
    with pytest.raises(ValueError, match="MIXTURE_OR_TASK_MODULE 'gkd_no_such' cannot be imported"):
        seqio_adapter.seqio_task("gkd_sums", module="gkd_no_such")
    with pytest.raises(ValueError, match="'gkd_targets_only' lacks the output feature 'inputs'"):
        seqio_adapter.seqio_task("gkd_targets_only")
    with pytest.raises(ValueError, match=r"cache_dir must be a local folder.*'gs://bucket'"):
        seqio_adapter.seqio_task("gkd_sums", cache_dir="gs://bucket")
    broken = seqio_adapter.seqio_task("gkd_broken", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="'gkd_broken', split 'train', cannot be written"):
        broken.sources["train"].open()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_vocabularies_are_wrapped_to_equal_ones(tasks, external_data):
    import seqio

    from gkd_jax.data.seqio_vocabulary import wrap_vocabulary

    path = str(external_data / "t5_vocab" / "spiece.model")
    theirs = seqio.SentencePieceVocabulary(path, extra_ids=100)
    ours = wrap_vocabulary(theirs)
    assert ours == SentencePieceVocabulary(path, extra_ids=100)
    assert ours.size == theirs.vocab_size
    for text in ("A house, two dogs.", "naïve"):
        assert ours.encode(text) == list(theirs.encode(text))

    bytes_and_more = wrap_vocabulary(seqio.ByteVocabulary(extra_ids=10))
    assert bytes_and_more.size == 269
    assert bytes_and_more.eos_ids == (1,)
    assert bytes_and_more.encode("ab") == [100, 101]
    assert bytes_and_more.decode([100, 101, 1, 102]) == "ab"
    assert bytes_and_more.fingerprint != ByteVocabulary().fingerprint


def test_missing_seqio_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    with pytest.raises(ValueError, match=r"needs the package seqio.*gkd_jax\[data\]"):
        seqio_adapter.seqio_task("anything")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("text", "text"),
        ("json:text", "json:text"),
        (7, 7),
        (None, None),
        (np.float32(0.5), 0.5),
        ({"a": [np.int64(3), b"x"]}, {"a": [3, "x"]}),
        (np.arange(3), [0, 1, 2]),
    ],
)
def test_targets_of_any_type_travel_as_text(target, expected):
    reference = encode_reference(target)
    assert isinstance(reference, str)
    assert decode_reference(reference) == expected


def test_a_target_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="makes a object of a target"):
        encode_reference(object())
