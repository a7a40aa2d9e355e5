"""The pipeline: rows, order, resumption and what it refuses."""

import collections
import contextlib
import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest

from gkd_jax.data.encoding import Encoder
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.sources import InMemory, ParallelText
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary, fingerprint_of_pieces


@dataclasses.dataclass(frozen=True)
class DigitVocabulary:
    """Digits are their own ids, so that expected rows can be written by hand."""

    pad_id: int = 0
    eos_ids: tuple[int, ...] = (10,)
    size: int = 11
    calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    name = "digits"

    @property
    def fingerprint(self):
        return fingerprint_of_pieces(str(token).encode() for token in range(self.size))

    def encode(self, text):
        self.calls[text] += 1
        return [int(letter) for letter in text]

    def decode(self, ids):
        return "".join(str(token) for token in ids)


def _to_text(example):
    return TextExample(example["q"], example["a"])


def _task(examples, **kwargs):
    return Task("digits", {"train": InMemory(examples)}, _to_text, **kwargs)


def _numbered(size):
    return [{"q": str(1000 + number), "a": str(number)} for number in range(size)]


def _config(task=None, *, inputs=8, targets=6, batch_size=4, vocabulary=None, **kwargs):
    return DatasetConfig(
        task=task or _task(_numbered(10)),
        split="train",
        feature_lengths={"inputs": inputs, "targets": targets},
        batch_size=batch_size,
        vocabulary=vocabulary or DigitVocabulary(),
        **kwargs,
    )


def _one_row(example, **kwargs):
    dataset = _config(_task([example]), batch_size=1, **kwargs).build()
    with contextlib.closing(dataset.train_iterator()) as batches:
        return next(batches)


def _take(dataset, count, position=0, **kwargs):
    with contextlib.closing(dataset.train_iterator(position, **kwargs)) as batches:
        return list(itertools.islice(batches, count))


def _fields(batch):
    return {
        field.name: getattr(batch, field.name)
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name) is not None
    }


def _assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert _fields(one).keys() == _fields(other).keys()
        for name, value in _fields(one).items():
            np.testing.assert_array_equal(value, _fields(other)[name], err_msg=name)
            assert value.dtype == _fields(other)[name].dtype


def test_row_is_the_hand_written_one():
    batch = _one_row({"q": "123", "a": "45"}, inputs=6, targets=5)
    expected = {
        "inputs": np.array([[1, 2, 3, 10, 0, 0]], np.int32),
        "inputs_mask": np.array([[True] * 4 + [False] * 2]),
        "targets": np.array([[4, 5, 10, 0, 0]], np.int32),
        "loss_weights": np.array([[1, 1, 1, 0, 0]], np.float32),
        "example_id": np.array([0], np.int32),
    }
    actual = _fields(batch)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)
        assert isinstance(actual[name], np.ndarray)
        assert actual[name].dtype == value.dtype


def test_text_too_long_is_cut_as_seqio_does():
    batch = _one_row({"q": "123456", "a": "98765"}, inputs=4, targets=3)
    np.testing.assert_array_equal(batch.inputs, [[1, 2, 3, 10]])
    np.testing.assert_array_equal(batch.targets, [[9, 8, 10]])
    np.testing.assert_array_equal(batch.loss_weights, [[1, 1, 1]])
    # What just fits keeps all, and the setting leaves the end out of cut outputs only.
    for example, expected in (("98765", [9, 8, 7]), ("98", [9, 8, 10])):
        batch = _one_row({"q": "1", "a": example}, targets=3, eos_after_cut_targets=False)
        np.testing.assert_array_equal(batch.targets, [expected])
        np.testing.assert_array_equal(batch.loss_weights, [[1, 1, 1]])


def test_prompts_without_end_of_sequence():
    dataset = _config(_task([{"q": "12", "a": "3"}], inputs_eos=False), batch_size=1).build()
    np.testing.assert_array_equal(_take(dataset, 1)[0].inputs[0], [1, 2, 0, 0, 0, 0, 0, 0])


@pytest.mark.pitfall(15)
def test_pad_equals_eos_keeps_final_eos():
    batch = _one_row({"q": "12", "a": "34"}, vocabulary=DigitVocabulary(pad_id=10))
    np.testing.assert_array_equal(batch.targets, [[3, 4, 10, 10, 10, 10]])
    np.testing.assert_array_equal(batch.loss_weights, [[1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.inputs_mask, [[True] * 3 + [False] * 5])


@pytest.mark.pitfall(15)
def test_several_eos_ids_and_none():
    several = _one_row({"q": "12", "a": "34"}, vocabulary=DigitVocabulary(eos_ids=(9, 10)))
    np.testing.assert_array_equal(several.targets, [[3, 4, 9, 0, 0, 0]])
    none = _one_row({"q": "12", "a": "345678"}, vocabulary=DigitVocabulary(eos_ids=()), targets=4)
    np.testing.assert_array_equal(none.targets, [[3, 4, 5, 6]])
    np.testing.assert_array_equal(none.inputs, [[1, 2, 0, 0, 0, 0, 0, 0]])
    assert none.inputs_mask.sum() == 2


@pytest.mark.pitfall(18)
def test_exactly_one_eos_and_no_bos():
    ready = TextExample("12", "34", inputs_ids=(1, 2, 10), targets_ids=(3, 4))
    task = Task("ready", {"train": InMemory([{}])}, lambda _: ready)
    text = _one_row({"q": "12", "a": "34"})
    for batch in (text, *_take(_config(task, batch_size=1).build(), 1)):
        np.testing.assert_array_equal(batch.inputs[0], [1, 2, 10, 0, 0, 0, 0, 0])
        np.testing.assert_array_equal(batch.targets[0], [3, 4, 10, 0, 0, 0])


@pytest.mark.pitfall(18)
@pytest.mark.parametrize("folder", ["t5_vocab/spiece.model", "llama2_vocab/tokenizer.model"])
def test_exactly_one_eos_and_no_bos_of_real_vocabularies(external_data, folder):
    vocabulary = SentencePieceVocabulary(external_data / folder)
    batch = _one_row({"q": "A dog.", "a": "Ein Hund </s>."}, inputs=16, targets=16,
                     vocabulary=vocabulary)  # fmt: skip
    (eos,) = vocabulary.eos_ids
    assert vocabulary._processor.bos_id() not in (*batch.inputs[0], *batch.targets[0])
    for row, mask in ((batch.inputs, batch.inputs_mask), (batch.targets, batch.loss_weights)):
        real = row[0][mask[0] > 0]
        assert real[-1] == eos
        assert (real == eos).sum() == 1


@pytest.mark.pitfall(19)
def test_truncation_never_leaves_an_empty_prompt():
    batch = _one_row({"q": "123456", "a": "1"}, inputs=2)
    np.testing.assert_array_equal(batch.inputs, [[1, 10]])
    for inputs_eos, vocabulary, token in (
        (True, DigitVocabulary(), 10),
        (False, DigitVocabulary(), 10),
        (False, DigitVocabulary(eos_ids=()), 0),
    ):
        task = _task([{"q": "", "a": "1"}], inputs_eos=inputs_eos)
        (batch,) = _take(_config(task, batch_size=1, vocabulary=vocabulary).build(), 1)
        assert batch.inputs_mask.sum() == 1
        assert batch.inputs[0, 0] == token


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("feature", ["inputs", "targets"])
@pytest.mark.parametrize("length", [-1, 0, 1])
def test_lengths_that_leave_nothing_are_refused(feature, length):
    with pytest.raises(ValueError, match=rf"feature_lengths\['{feature}'\] must be at least 2"):
        _config(**{feature: length})


@pytest.mark.pitfall(19)
def test_lengths_that_leave_only_the_common_prefix_are_refused():
    examples = [{"q": f"77777{number}", "a": "1"} for number in range(10)]
    with pytest.raises(ValueError, match=r"cuts every prompt .* to the same text, '777710'"):
        _config(_task(examples), inputs=5).build()
    _config(_task(examples), inputs=7).build()
    _config(_task([{"q": "77777", "a": "1"}] * 3), inputs=5).build()  # They are the same.


@pytest.mark.pitfall(24)
def test_target_equal_to_pad_id_keeps_its_weight():
    batch = _one_row({"q": "0", "a": "300"})
    np.testing.assert_array_equal(batch.targets, [[3, 0, 0, 10, 0, 0]])
    np.testing.assert_array_equal(batch.loss_weights, [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.inputs_mask[0, :3], [True, True, False])


@pytest.mark.pitfall(54)
@pytest.mark.parametrize("read_threads", [0, 2])
def test_prompts_are_tokenised_once(read_threads):
    vocabulary = DigitVocabulary()
    dataset = _config(vocabulary=vocabulary, batch_size=5, read_threads=read_threads).build()
    rows = collections.defaultdict(set)
    for batch in _take(dataset, 6):
        for row, identity in enumerate(batch.example_id):
            content = (batch.inputs[row].tobytes(), batch.targets[row].tobytes())
            rows[dataset.source_index(int(identity))].add(content)
    assert len(rows) == 10
    assert all(len(contents) == 1 for contents in rows.values())
    assert len(vocabulary.calls) == 20
    if not read_threads:  # Two threads may meet at one example, and make the same row of it.
        assert set(vocabulary.calls.values()) == {1}


def test_cache_changes_nothing():
    cached, plain = (_config(cache_bytes=size).build() for size in (1 << 20, 0))
    assert (cached._rows.caches, plain._rows.caches) == (True, False)
    for _ in range(2):
        _assert_same(_take(cached, 6), _take(plain, 6))


def test_changing_a_batch_does_not_change_the_next_epoch():
    dataset = _config(batch_size=10, shuffle=False).build()
    first, second = _take(dataset, 2)
    expected = second.inputs.copy()
    first.inputs[:] = 7
    np.testing.assert_array_equal(_take(dataset, 1)[0].inputs, expected)


@pytest.mark.parametrize("read_threads", [0, 2])
def test_resumption_at_any_position_equals_the_uninterrupted_stream(read_threads):
    dataset = _config(read_threads=read_threads).build()
    whole = _take(dataset, 12)
    for stopped_after in range(8):
        with contextlib.closing(dataset.train_iterator()) as batches:
            for _ in range(stopped_after):
                next(batches)
            time.sleep(0.01)  # Threads read ahead, which must not count.
            position = batches.position
        assert position == 4 * stopped_after
        again = _config(read_threads=read_threads).build()
        again.check_fingerprint(dataset.fingerprint)
        _assert_same(_take(again, 4, position), whole[stopped_after : stopped_after + 4])


def test_position_need_not_be_a_multiple_of_the_batch():
    rows = np.concatenate([batch.inputs for batch in _take(_config().build(), 8)])
    for position in range(9):
        for batch_size in (1, 3, 4):
            batches = _take(_config(batch_size=batch_size).build(), 2, position)
            actual = np.concatenate([batch.inputs for batch in batches])
            np.testing.assert_array_equal(actual, rows[position : position + 2 * batch_size])
            ids = np.concatenate([batch.example_id for batch in batches])
            np.testing.assert_array_equal(ids, position + np.arange(2 * batch_size))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_take_the_rows_of_the_global_batch(process_count):
    dataset = _config(batch_size=8).build()
    whole = _take(dataset, 4)
    parts = [
        _take(dataset, 4, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for name, value in _fields(batch).items():
            joined = np.concatenate([_fields(part[step])[name] for part in parts])
            np.testing.assert_array_equal(joined, value)
    with contextlib.closing(dataset.train_iterator(process_count=process_count)) as batches:
        next(batches)
        assert batches.position == 8


def test_each_epoch_is_another_permutation():
    dataset = _config(_task(_numbered(101))).build()
    epochs = [[dataset.source_index(101 * epoch + i) for i in range(101)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(101))
    assert len({tuple(order) for order in epochs}) == 3
    other_seed = _config(_task(_numbered(101)), seed=1).build()
    assert [other_seed.source_index(i) for i in range(101)] != epochs[0]


def test_batches_follow_the_order():
    dataset = _config(batch_size=3).build()
    for batch in _take(dataset, 8):
        for row, position in enumerate(batch.example_id):
            text = dataset.raw(dataset.source_index(int(position)))
            assert [int(letter) for letter in text.inputs] == batch.inputs[row, :4].tolist()


def test_without_shuffle_the_order_is_the_source_s():
    dataset = _config(shuffle=False).build()
    assert [dataset.source_index(position) for position in range(20)] == [*range(10)] * 2


def test_example_id_stays_within_int32():
    dataset = _config(batch_size=4).build()
    (batch,) = _take(dataset, 1, 2**31 - 3)
    np.testing.assert_array_equal(batch.example_id, [2**31 - 3, 2**31 - 2, 0, 1])


def test_batch_larger_than_the_data():
    (batch,) = _take(_config(_task(_numbered(3)), batch_size=8).build(), 1)
    assert sorted(np.unique(batch.targets[:, 0], return_counts=True)[1]) == [2, 3, 3]


def test_num_examples_takes_the_first():
    dataset = _config(num_examples=4).build()
    assert dataset.num_examples == 4
    assert sorted(dataset.source_index(position) for position in range(4)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"num_examples is 11, but .* has 10 examples"):
        _config(num_examples=11).build()


@pytest.mark.pitfall(41)
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_sees_each_example_once(process_count):
    """In as many batches on each process: another number would have one wait for ever."""
    dataset = _config(batch_size=4).build()
    seen, num_batches = [], set()
    for index in range(process_count):
        batches = list(dataset.eval_batches(process_index=index, process_count=process_count))
        num_batches.add(len(batches))
        for batch, indices in batches:
            np.testing.assert_array_equal(batch.example_id, indices)
            assert batch.inputs_mask.any(axis=1).all()
            filler = indices < 0
            assert (batch.loss_weights[filler] == 0).all()
            assert (batch.inputs_mask[filler].sum(axis=1) == 1).all()
            for row in np.flatnonzero(~filler):
                assert dataset.raw(int(indices[row])).targets == "".join(
                    str(token) for token in batch.targets[row][batch.loss_weights[row] > 0][:-1]
                )
            seen.extend(indices[~filler].tolist())
    assert num_batches == {3}
    assert sorted(seen) == list(range(10))
    if process_count == 1:
        assert seen == list(range(10))


def test_evaluation_stopped_early_leaves_no_thread():
    before = set(threading.enumerate())  # Threads of other tests may still be ending.
    dataset = _config(batch_size=1).build()
    for _, indices in dataset.eval_batches():
        if indices[0] == 2:
            break
    with contextlib.closing(dataset.train_iterator()) as batches:
        next(batches)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.pitfall(44)
def test_position_of_other_data_is_refused():
    dataset = _config().build()
    saved = dataset.fingerprint
    _config(batch_size=2, read_threads=0, cache_bytes=0).build().check_fingerprint(saved)
    changed = {
        "source": _config(_task([*_numbered(9), {"q": "5", "a": "5"}])),
        "num_examples": _config(num_examples=9),
        "seed": _config(seed=1),
        "shuffle": _config(shuffle=False),
        "feature_lengths": _config(inputs=9),
        "vocabulary": _config(vocabulary=DigitVocabulary(size=12)),
        "eos_ids": _config(vocabulary=DigitVocabulary(eos_ids=(9,))),
        "inputs_eos": _config(_task(_numbered(10), inputs_eos=False)),
        "eos_after_cut_targets": _config(eos_after_cut_targets=False),
        "text": _config(
            Task("t", {"train": InMemory(_numbered(10))}, lambda e: TextExample(e["a"], e["q"]))
        ),
    }
    for part, config in changed.items():
        with pytest.raises(ValueError, match=rf"cannot be restored.*\W{part}: "):
            config.build().check_fingerprint(saved)
    for nonsense in ("", "abc", "[]", "7"):
        with pytest.raises(ValueError, match="cannot be restored"):
            dataset.check_fingerprint(nonsense)
    with pytest.raises(ValueError, match="position must not be negative; got -4"):
        dataset.train_iterator(-4)


def test_fingerprint_names_the_order_itself(monkeypatch):
    """The order is Grain's: if a new version shuffles otherwise, no run resumes in silence."""
    dataset = _config(_task(_numbered(100))).build()
    saved = dataset.fingerprint
    assert json.loads(saved)["order"] == [49, 83, 10, 87, 39, 69, 95, 9]
    changed = _config(_task(_numbered(100))).build()
    monkeypatch.setattr(changed._iterators, "_order", range(100))
    with pytest.raises(ValueError, match=r"cannot be restored.*\Worder: "):
        changed.check_fingerprint(saved)


def test_a_broken_example_stops_the_iterator():
    task = _task([*_numbered(40), {"q": "7"}, *_numbered(40)])
    dataset = _config(task, shuffle=False, batch_size=2).build()
    message = r"'digits' wants the field 'a', which example 40 of split 'train' lacks: it has 'q'"
    with contextlib.closing(dataset.train_iterator()) as batches:
        for _ in range(20):
            next(batches)
        with pytest.raises(ValueError, match=message):
            next(batches)
        assert batches.position == 40
        with pytest.raises(ValueError, match="closed"):
            next(batches)
    with pytest.raises(ValueError, match=message):
        list(dataset.eval_batches())


def test_any_error_of_a_task_says_where():
    dataset = _config(Task("t", {"train": InMemory([{}] * 3)}, lambda _: TextExample("1", "x")))
    with pytest.raises(ValueError, match="invalid literal"):
        dataset.build()
    broken = Task("t", {"train": InMemory([{}] * 3)}, lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError) as error:
        _config(broken).build()
    assert error.value.__notes__ == ["In task 't', split 'train', example 0."]


def test_token_ids_of_another_vocabulary_are_refused():
    text = TextExample("1", "2", targets_ids=(3, 11))
    with pytest.raises(ValueError, match=r"targets_ids holds token 11, which digits with 11 ids"):
        Encoder(DigitVocabulary(), 4, 4).encode(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tests"}, r"split 'tests' is not known to task 'digits', which has 'train'"),
        ({"batch_size": 0}, r"batch_size must be at least 1; got 0"),
        ({"seed": -1}, r"seed must be from 0"),
        ({"num_examples": 0}, r"num_examples must be at least 1; got 0"),
        ({"read_threads": -1}, r"read_threads must not be negative; got -1"),
        ({"feature_lengths": {"inputs": 8}}, r"feature_lengths lacks 'targets'"),
        ({"feature_lengths": {"inputs": 8, "targets": 8, "x": 8}}, r"unknown features \['x'\]"),
    ],
)
def test_bad_setting_is_one_clear_message(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(_config(), **settings).build()


def test_batch_must_divide_by_the_processes():
    dataset = _config(batch_size=6).build()
    with pytest.raises(ValueError, match=r"divisible by the number of processes; got 6 and 4"):
        dataset.train_iterator(process_count=4)
    with pytest.raises(ValueError, match=r"divisible by the number of processes; got 6 and 4"):
        dataset.eval_batches(process_count=4)
    with pytest.raises(ValueError, match=r"process_index must be from 0 to 1; got 2"):
        dataset.train_iterator(process_index=2, process_count=2)


def test_empty_source_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Empty:
        fingerprint = ""

        def open(self):
            return self

        def __len__(self):
            return 0

    with pytest.raises(ValueError, match=r"'train' of task 'none' is an empty data set"):
        _config(Task("none", {"train": Empty()}, _to_text)).build()


def test_report_counts_what_is_cut():
    examples = [{"q": "1" * (1 + number), "a": "2"} for number in range(10)]
    report = _config(_task(examples), inputs=8).build().describe()
    assert "10 examples" in report
    assert "inputs: 6 tokens (median), 10 (95%), 11 (longest of 10); 30.0% are cut to 8" in report
    assert "targets: 2 tokens (median), 2 (95%), 2 (longest of 10); 0.0% are cut to 6" in report
    assert "inputs[0]: '110000000'" in report


def test_references_are_the_targets_unless_given():
    assert TextExample("a", "b").references == ("b",)
    assert TextExample("a", "b", references=("c", "d")).references == ("c", "d")


def test_real_translation_rows(external_data):
    folder = external_data / "multi30k"
    source = ParallelText(folder / "val.en.gz", folder / "val.de.gz")
    task = Task("m", {"train": source}, lambda e: TextExample("en: " + e["inputs"], e["targets"]))
    for vocabulary in (
        ByteVocabulary(),
        SentencePieceVocabulary(external_data / "t5_vocab" / "spiece.model", extra_ids=100),
    ):
        dataset = _config(
            task, inputs=256, targets=320, batch_size=64, vocabulary=vocabulary
        ).build()
        seen = 0
        for batch, indices in dataset.eval_batches():
            for row in np.flatnonzero(indices >= 0)[::8]:
                text = dataset.raw(int(indices[row]))
                assert batch.targets[row][batch.loss_weights[row] > 0][-1] == 1
                if isinstance(vocabulary, ByteVocabulary):
                    assert vocabulary.decode(batch.inputs[row]) == text.inputs
                    assert vocabulary.decode(batch.targets[row]) == text.targets
                seen += 1
        assert seen == pytest.approx(1014 / 8, abs=8)
