"""Vocabularies: ids, text and what each id means."""

import pickle
import subprocess
import sys

import pytest

from gkd_jax.data.sources import InMemory
from gkd_jax.data.task import Task, TextExample
from gkd_jax.data.train_vocabulary import task_texts, train_sentencepiece
from gkd_jax.data.vocabularies import (
    ByteVocabulary,
    SentencePieceVocabulary,
    check_same_vocabulary,
    fingerprint_of_pieces,
)

_TEXTS = [f"Number {number} is {number * 7} over seven, isn't it?" for number in range(200)]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return train_sentencepiece(
        _TEXTS, tmp_path_factory.mktemp("vocabulary") / "small", vocab_size=60
    )


def test_bytes_follow_byt5():
    vocabulary = ByteVocabulary()
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_ids) == (259, 0, (1,))
    assert vocabulary.encode("aé") == [97 + 3, 0xC3 + 3, 0xA9 + 3]
    assert vocabulary.decode(vocabulary.encode("aé\n😀")) == "aé\n😀"
    # Half a character, padding, unknown, ids of a padded output layer, and what follows the end.
    assert vocabulary.decode([100, 0xC3 + 3, 0, 2, 259, 300, 101, 1, 102]) == "ab"


def test_trained_model_has_the_special_ids_of_t5(small_model):
    vocabulary = SentencePieceVocabulary(small_model)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_ids) == (60, 0, (1,))
    assert vocabulary._processor.unk_id() == 2
    assert vocabulary._processor.bos_id() == -1
    for text in _TEXTS[:20]:
        ids = vocabulary.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode([*ids, 0, 64, 10**6, 1, *ids]) == text


def test_training_is_deterministic_and_follows_the_text(small_model, tmp_path):
    again = train_sentencepiece(_TEXTS, tmp_path / "again.model", vocab_size=60)
    assert again == tmp_path / "again.model"
    assert again.read_bytes() == small_model.read_bytes()
    other = train_sentencepiece(_TEXTS[:50], tmp_path / "other", vocab_size=60)
    fingerprints = [SentencePieceVocabulary(p).fingerprint for p in (small_model, again, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_byte_fallback_keeps_unseen_characters(small_model, tmp_path):
    fallback = train_sentencepiece(_TEXTS, tmp_path / "b", vocab_size=320, byte_fallback=True)
    text = "Number ж"
    assert SentencePieceVocabulary(fallback).decode(
        SentencePieceVocabulary(fallback).encode(text)
    ) == text  # fmt: skip
    assert 2 in SentencePieceVocabulary(small_model).encode(text)


@pytest.mark.parametrize("vocab_size", [5, 10_000])
def test_impossible_size_is_a_clear_message(vocab_size, tmp_path):
    with pytest.raises(ValueError, match=rf"vocab_size={vocab_size} .*Set --vocab_size"):
        train_sentencepiece(_TEXTS, tmp_path / "x", vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


def test_training_without_text_is_a_clear_message(tmp_path):
    with pytest.raises(ValueError, match="got no text"):
        train_sentencepiece(["", "  "], tmp_path / "x", vocab_size=60)


def test_task_text_is_what_the_task_makes_of_it():
    task = Task(
        "t",
        {"train": InMemory([{"a": "1"}, {"a": "2"}])},
        lambda example: TextExample("go: " + example["a"], example["a"]),
    )
    assert list(task_texts(task)) == ["go: 1", "1", "go: 2", "2"]


def test_command_trains_from_files(tmp_path):
    for name, texts in (("a.txt", _TEXTS[:100]), ("b.txt", _TEXTS[100:])):
        (tmp_path / name).write_text("\n".join(texts) + "\n")
    command = [sys.executable, "-m", "gkd_jax.data.train_vocabulary", "--vocab_size=60"]
    command += [f"--inputs={tmp_path}/a.txt,{tmp_path}/b.txt", f"--output={tmp_path}/made"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    made = SentencePieceVocabulary(tmp_path / "made.model")
    expected = train_sentencepiece(_TEXTS, tmp_path / "expected", vocab_size=60)
    assert made.fingerprint == SentencePieceVocabulary(expected).fingerprint


@pytest.mark.pitfall(37)
def test_equal_sizes_with_other_meanings_are_refused(small_model, tmp_path):
    other = train_sentencepiece(_TEXTS[:50], tmp_path / "other", vocab_size=60)
    student, teacher = SentencePieceVocabulary(small_model), SentencePieceVocabulary(other)
    assert student.size == teacher.size
    check_same_vocabulary(student, SentencePieceVocabulary(str(small_model)))
    with pytest.raises(ValueError, match=rf"(?s){small_model}.*{other}"):
        check_same_vocabulary(student, teacher)
    with pytest.raises(ValueError, match=r"ByteVocabulary\(\)"):
        check_same_vocabulary(student, ByteVocabulary())


def test_fingerprint_separates_pieces():
    assert fingerprint_of_pieces([b"ab", b"c"]) != fingerprint_of_pieces([b"a", b"bc"])


@pytest.mark.parametrize("content", [b"", b"{}\n", b"plain text\n" * 100, bytes(1000)])
def test_file_that_is_no_vocabulary_is_refused(content, tmp_path):
    path = tmp_path / "not.model"
    path.write_bytes(content)
    for extra_ids in (0, 100):
        with pytest.raises(ValueError, match=r"path names '.*not\.model', which is not a Sentence"):
            assert SentencePieceVocabulary(path, extra_ids=extra_ids).size


def test_truncated_vocabulary_is_refused(small_model, tmp_path):
    content = small_model.read_bytes()
    (tmp_path / "cut.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.model', which is not a SentencePiece model"):
        assert SentencePieceVocabulary(tmp_path / "cut.model").size


def test_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SentencePieceVocabulary\.path .*none\.model"):
        assert SentencePieceVocabulary(tmp_path / "none.model").size
    with pytest.raises(ValueError, match="extra_ids must not be negative"):
        SentencePieceVocabulary(tmp_path / "none.model", extra_ids=-1)


def test_vocabulary_can_be_copied_to_another_process(small_model):
    vocabulary = SentencePieceVocabulary(small_model, extra_ids=3)
    ids = vocabulary.encode("Number 7")
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary
    assert copy.encode("Number 7") == ids


def test_t5_vocabulary_is_seqio_s(external_data):
    path = external_data / "t5_vocab" / "spiece.model"
    vocabulary = SentencePieceVocabulary(path, extra_ids=100)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_ids) == (32_100, 0, (1,))
    # Made with seqio.SentencePieceVocabulary(path, extra_ids=100).
    text = "I like peanut butter and <extra_id_0> sandwiches."
    assert vocabulary.encode(text) == [27, 114, 14998, 4194, 11, 32099, 20017, 5]
    assert vocabulary.encode("A <extra_id_0>ly") == [71, 32099, 120]
    assert vocabulary.decode([27, 114, 32099, 20017, 5, 32100, 32127, 1, 5]) == (
        "I like <extra_id_0> sandwiches."
    )
    assert vocabulary.encode("<extra_id_99>")[-1] == 32_000
    without = SentencePieceVocabulary(path)
    assert without.size == 32_000
    assert without.encode("I like peanut butter") == [27, 114, 14998, 4194]
    assert without.fingerprint != vocabulary.fingerprint


def test_llama_vocabulary_pads_with_its_end(external_data):
    vocabulary = SentencePieceVocabulary(external_data / "llama2_vocab" / "tokenizer.model")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_ids) == (32_000, 2, (2,))
    ids = vocabulary.encode("Hello you")
    assert ids == [15043, 366]
    assert vocabulary.decode([*ids, 2, 2, 366]) == "Hello you"
