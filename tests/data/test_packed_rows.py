"""Packed batches: which examples they hold and where, in what order, and how they go on."""

import contextlib
import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gkd_jax.data import packed_rows
from gkd_jax.data.chat import ChatTemplate
from gkd_jax.data.mixtures import Mixture
from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.sources import InMemory
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.vocabularies import ByteVocabulary

EOS, OFFSET = 1, 3  # Of bytes.
WIDTHS = (24, 16)


def examples_of(size=30, seed=0):
    """Of different lengths, each with its number at the beginning of both texts."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, (13, 9), (size, 2)).tolist()
    return [
        {"q": f"{number:02d}" + "q" * one, "a": f"{number:02d}" + "a" * other}
        for number, (one, other) in enumerate(lengths)
    ]


def config_of(examples=None, **changes):
    task = Task(
        "packed", {"train": InMemory(examples or examples_of())},
        lambda example: TextExample(example["q"], example["a"]),
    )  # fmt: skip
    settings = dict(
        task=task, split="train", batch_size=4, vocabulary=ByteVocabulary(), pack=True,
        feature_lengths=dict(zip(("inputs", "targets"), WIDTHS, strict=True)),
    )  # fmt: skip
    return DatasetConfig(**settings | changes)


def take(dataset, count, position=0, **kwargs):
    with contextlib.closing(dataset.train_iterator(position, **kwargs)) as batches:
        return list(itertools.islice(batches, count))


def texts_of(tokens, segments, row):
    """The texts of a row's segments, in order; each ends with one end of sequence."""
    texts = []
    for segment in range(1, segments[row].max() + 1):
        (places,) = np.nonzero(segments[row] == segment)
        assert places.tolist() == list(range(places[0], places[0] + len(places)))
        ids = tokens[row][places].tolist()
        assert ids[-1] == EOS
        texts.append(bytes(token - OFFSET for token in ids[:-1]).decode())
    return texts


def pairs_of(batch):
    """Prompt and output of every example, row by row."""
    return [
        list(
            zip(
                texts_of(batch.inputs, batch.inputs_segments, row),
                texts_of(batch.targets, batch.targets_segments, row),
                strict=True,
            )
        )
        for row in range(len(batch.inputs))
    ]


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_rows_by_hand():
    """The first row with room for both parts; the first example without any ends the batch."""
    lengths = [(3, 2), (4, 1), (1, 6), (1, 3), (5, 1), (3, 3)]
    examples = [
        packed_rows.TokenizedExample(number, 10 + number, tuple(np.full(n, number) for n in both))
        for number, both in enumerate(lengths)
    ]
    batches = packed_rows.assign_rows(itertools.cycle(examples), num_rows=2, widths=(8, 7))
    first, second = itertools.islice(batches, 2)
    assert [(one.example.number, one.row, one.segment, one.starts) for one in first] == [
        (0, 0, 1, (0, 0)), (1, 0, 2, (3, 2)), (2, 1, 1, (0, 0)), (3, 0, 3, (7, 3)),
        (4, 1, 2, (1, 6)),
    ]  # fmt: skip
    assert (second[0].example.number, second[0].row, second[0].segment) == (5, 0, 1)
    tokens, segments = packed_rows.rows_of_feature(first, 1, num_rows=2, width=7, pad_id=9)
    np.testing.assert_array_equal(tokens, [[0, 0, 1, 3, 3, 3, 9], [2, 2, 2, 2, 2, 2, 4]])
    np.testing.assert_array_equal(segments, [[1, 1, 2, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1, 2]])


def test_no_example_is_lost_or_doubled():
    """Batches are runs of the global order, in which each epoch has every example once."""
    dataset = config_of().build()
    examples, position = examples_of(), 0
    with contextlib.closing(dataset.train_iterator()) as batches:
        while position < 95:
            batch = next(batches)
            number = batches.position - position
            wanted = [dataset.source_index(position + i) for i in range(number)]
            got = [pair for row in pairs_of(batch) for pair in row]
            assert sorted(got) == sorted((examples[i]["q"], examples[i]["a"]) for i in wanted)
            np.testing.assert_array_equal(batch.inputs_mask, batch.inputs_segments > 0)
            np.testing.assert_array_equal(batch.loss_weights, batch.targets_segments > 0)
            assert batch.example_id.min() == position
            assert batch.example_id.max() < batches.position
            position = batches.position
            assert batch.inputs_segments.max(axis=1).min() >= 1  # No row is empty.
    assert sorted(dataset.source_index(i) for i in range(30)) == list(range(30))


def test_the_example_that_ends_a_batch_has_no_room_in_it():
    dataset = config_of(shuffle=False).build()
    first, second = take(dataset, 2)
    prompt, output = pairs_of(second)[0][0]
    room = [WIDTHS[0] - first.inputs_mask.sum(1), WIDTHS[1] - first.loss_weights.sum(1)]
    assert not np.any((room[0] >= len(prompt) + 1) & (room[1] >= len(output) + 1))


@pytest.mark.parametrize("read_threads", [0, 2])
def test_resumption_after_any_batch_equals_the_uninterrupted_stream(read_threads):
    dataset = config_of(read_threads=read_threads).build()
    whole = take(dataset, 10)
    for stopped_after in range(7):
        with contextlib.closing(dataset.train_iterator()) as batches:
            for _ in range(stopped_after):
                next(batches)
            position = batches.position
        again = config_of(read_threads=read_threads).build()
        again.check_fingerprint(dataset.fingerprint)
        assert_same(take(again, 3, position), whole[stopped_after : stopped_after + 3])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_take_the_rows_of_the_global_batch(process_count):
    dataset = config_of().build()
    whole = take(dataset, 6)
    parts = [
        take(dataset, 6, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    for step, batch in enumerate(whole):
        joined = jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts)
        )
        assert_same(joined, batch)
    positions = set()
    for index in range(process_count):
        iterator = dataset.train_iterator(process_index=index, process_count=process_count)
        with contextlib.closing(iterator) as batches:
            next(batches)
            positions.add(batches.position)
    assert len(positions) == 1


def test_texts_too_long_are_cut_as_in_rows_of_their_own():
    examples = [{"q": "1" * 40, "a": "2" * 40}, {"q": "3", "a": "4"}]
    packed, alone = (
        config_of(examples, batch_size=1, shuffle=False, pack=pack).build()
        for pack in (True, False)
    )
    (one,), (other,) = take(packed, 1), take(alone, 1)
    np.testing.assert_array_equal(one.inputs, other.inputs)
    np.testing.assert_array_equal(one.targets, other.targets)
    assert one.inputs_segments.min() == one.targets_segments.min() == 1  # The row is full.


def test_the_teachers_prompt_needs_room_too(tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    changes = dict(teacher_chat=ChatTemplate(str(tmp_path)))
    lengths = dict(inputs=24, targets=16, teacher_inputs=20)
    dataset = config_of(feature_lengths=lengths, **changes).build()
    for batch in take(dataset, 4):
        read = batch.as_teacher_reads()
        assert read.teacher_inputs_segments is None
        np.testing.assert_array_equal(read.inputs_mask, read.inputs_segments > 0)
        assert read.inputs.shape == (4, 20)
        for row, pairs in enumerate(pairs_of(batch)):
            prompts = texts_of(read.inputs, read.inputs_segments, row)
            assert prompts == [f"[{prompt}]" for prompt, _ in pairs]


def test_source_ids_are_those_of_each_output():
    sources = tuple(InMemory(examples_of()[start : start + 15]) for start in (0, 15))
    task = dataclasses.replace(config_of().task, sources={"train": Mixture(sources)})
    dataset = config_of(task=task).build()
    dataset.use_source_ids(2)
    found = set()
    for batch in take(dataset, 3):
        for row, pairs in enumerate(pairs_of(batch)):
            for segment, (_, output) in enumerate(pairs, start=1):
                (part,) = {*batch.source_id[row][batch.targets_segments[row] == segment].tolist()}
                assert part == int(output[:2]) // 15
                found.add(part)
    assert found == {0, 1}


def test_a_plan_tells_how_full_rows_are():
    dataset = config_of().build()
    batches = take(dataset, 40)
    per_row = np.mean([batch.inputs_segments.max(1) for batch in batches])
    filled = np.mean([[b.inputs_mask.sum(), b.loss_weights.sum()] for b in batches], axis=0).sum()
    share = filled / (4 * sum(WIDTHS))
    packing = dataset.packing
    assert packing.examples_per_row == pytest.approx(per_row, rel=0.05)
    assert packing.token_share == pytest.approx(share, rel=0.05)
    assert dataset.examples_per_batch == 4 * packing.examples_per_row
    text = dataset.describe()
    assert "batches of 4 packed rows" in text
    assert f"packed: about {packing.examples_per_row:.1f} examples a row" in text
    assert config_of(pack=False).build().examples_per_batch == 4


def test_other_passes_take_one_example_a_row():
    dataset = config_of().build()
    batches = [batch for batch, _ in dataset.eval_batches()]
    assert sum(int((batch.example_id >= 0).sum()) for batch in batches) == 30
    assert all(batch.inputs_segments is None for batch in batches)
