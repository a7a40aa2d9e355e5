"""Tokenizers of Hugging Face checkpoints as vocabularies."""

import json
import pickle

import hf_tokenizers
import pytest

from gkd_jax.data.encoding import Encoder
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.task import TextExample
from gkd_jax.data.vocabularies import SentencePieceVocabulary, check_same_vocabulary

SIZE = len(hf_tokenizers.SPECIAL) + len(hf_tokenizers.LETTERS)


@pytest.fixture
def folder(tmp_path):
    return hf_tokenizers.save(tmp_path / "tokenizer")


def write(folder, name, **contents):
    (folder / name).write_text(json.dumps(contents))


def test_text_and_special_tokens(folder):
    vocabulary = HFTokenizer(folder)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.bos_id) == (SIZE, 0, 1)
    assert vocabulary.eos_ids == (2,)
    ids = vocabulary.encode("Ann has 3.")
    assert ids == [5 + hf_tokenizers.LETTERS.index(letter) for letter in "Ann has 3."]
    # Up to the end; what is beyond the vocabulary, or special, is left out.
    assert vocabulary.decode([1, *ids, 400, 2, 0, 7]) == "Ann has 3."
    # A special token that a template wrote is that token.
    assert vocabulary.encode("a<|end|>")[-1] == 4
    assert HFTokenizer(folder / "tokenizer.json").encode("Ann has 3.") == ids
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again == vocabulary
    assert again.encode("x") == vocabulary.encode("x")


def test_ends_of_sequence_come_from_the_generation_first(folder):
    write(folder, "config.json", eos_token_id=3, pad_token_id=4)
    assert HFTokenizer(folder).eos_ids == (3,)
    write(folder, "generation_config.json", eos_token_id=[4, 2])
    assert HFTokenizer(folder).eos_ids == (4, 2)
    assert HFTokenizer(folder, eos_id=2).eos_ids == (2,)


@pytest.mark.pitfall(15)
def test_padding_that_is_the_end_of_sequence_or_none_at_all(tmp_path):
    same = HFTokenizer(hf_tokenizers.save(tmp_path / "same", pad_token="</s>"))
    assert (same.pad_id, same.eos_ids) == (2, (2,))
    none = HFTokenizer(hf_tokenizers.save(tmp_path / "none", pad_token=None))
    assert (none.pad_id, none.eos_ids) == (2, (2,))
    nothing = hf_tokenizers.save(tmp_path / "nothing", pad_token=None, eos_token=None)
    assert (HFTokenizer(nothing).pad_id, HFTokenizer(nothing).eos_ids) == (0, ())


@pytest.mark.pitfall(18)
def test_prompts_begin_once_and_end_as_they_are_told(folder):
    vocabulary = HFTokenizer(folder)

    def encode(text, **settings):
        encoder = Encoder(vocabulary, inputs_length=6, targets_length=6, **settings)
        inputs, targets, *full = encoder.encode(TextExample(text, "b"))
        return inputs, targets, full

    a, b = vocabulary.encode("ab")
    assert encode("a", inputs_eos=False, inputs_bos=True) == ([1, a], [b, 2], [2, 2])
    assert encode("a", inputs_eos=True, inputs_bos=True) == ([1, a, 2], [b, 2], [3, 2])
    # A template that writes it itself.
    assert encode("<s>a", inputs_eos=False, inputs_bos=True)[0] == [1, a]
    # Cut, it still begins so.
    assert encode("a" * 9, inputs_eos=False, inputs_bos=True) == ([1, *[a] * 5], [b, 2], [10, 2])


@pytest.mark.pitfall(19)
def test_a_prompt_may_be_cut_on_the_left(folder):
    """It keeps its beginning of sequence and its end, and tells its whole length."""
    vocabulary = HFTokenizer(folder)
    ids = vocabulary.encode("abcdefgh")

    def encode(**settings):
        encoder = Encoder(
            vocabulary, inputs_length=5, targets_length=4, cut_inputs="left", **settings
        )
        inputs, _, full, _ = encoder.encode(TextExample("abcdefgh", "b"))
        return inputs, full

    assert encode(inputs_eos=False) == (ids[-5:], 8)
    assert encode(inputs_eos=False, inputs_bos=True) == ([1, *ids[-4:]], 9)
    assert encode(inputs_eos=True, inputs_bos=True) == ([1, *ids[-3:], 2], 10)
    short = Encoder(vocabulary, inputs_length=9, targets_length=4, cut_inputs="left")
    assert short.encode(TextExample("abcdefgh", "b"))[0] == [*ids, 2]


@pytest.mark.pitfall(37)
def test_equal_sizes_of_other_pieces_are_refused(tmp_path):
    letters = hf_tokenizers.LETTERS
    one = HFTokenizer(hf_tokenizers.save(tmp_path / "one"))
    other = HFTokenizer(hf_tokenizers.save(tmp_path / "other", letters=letters[::-1]))
    same = HFTokenizer(hf_tokenizers.save(tmp_path / "same"))
    check_same_vocabulary(one, same)
    with pytest.raises(ValueError, match=r"must share one vocabulary.*one'\).*other'\)"):
        check_same_vocabulary(one, other)
    ends = HFTokenizer(hf_tokenizers.save(tmp_path / "ends", eos_token="<|end|>"))
    with pytest.raises(ValueError, match="must pad and end outputs alike"):
        check_same_vocabulary(one, ends)


def test_t5s_tokenizer_is_its_sentencepiece_model(external_data):
    """The same pieces, so that a T5X student may have a Hugging Face teacher."""
    folder = external_data / "t5_vocab"
    ours = HFTokenizer(folder)
    pieces = SentencePieceVocabulary(folder / "spiece.model", extra_ids=100)
    assert (ours.size, ours.pad_id, ours.eos_ids) == (pieces.size, pieces.pad_id, pieces.eos_ids)
    assert ours.fingerprint == pieces.fingerprint
    text = "Studies have shown that owning a dog is good for you."
    assert ours.encode(text) == pieces.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_broken_files_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"HFTokenizer\.path .* no tokenizer\.json"):
        HFTokenizer(tmp_path).encode("a")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json' .* is not JSON"):
        _ = HFTokenizer(folder).eos_ids
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"which is no tokenizer: .* Copy it again"):
        HFTokenizer(folder).encode("a")
