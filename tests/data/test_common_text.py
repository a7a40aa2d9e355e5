"""Spans of equal text and classes of tokens, of vocabularies of every kind."""

import itertools

import numpy as np
import pytest
from toy_vocabularies import STUDENT, TEACHER, Pieces

from gkd_jax.data.common_text import CommonText, hidden_spaces
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.train_vocabulary import train_sentencepiece
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary

TEXTS = (
    "Tom has 12 apples. He buys 3 more.",
    "naïve café, 日本語 и 🤗🤗",
    "  two  spaces,\n\ttabs   and \n\n lines ",
    "x",
    " ",
    "",
    "The the THE  the.",
    "👩‍👩‍👧 a family of one character",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """SentencePiece's, with and without pieces for every byte, and a byte-level BPE."""
    folder = tmp_path_factory.mktemp("vocabularies")
    lines = [*TEXTS[:1], "She has 3 cats and 12 dogs.", "The answer is 15.", "one the other"] * 20
    kinds = {"small": dict(vocab_size=60), "bytes": dict(vocab_size=330, byte_fallback=True)}
    found = [
        SentencePieceVocabulary(
            train_sentencepiece(lines, folder / name, model_type="bpe", **settings), extra_ids=2
        )
        for name, settings in kinds.items()
    ]
    found.append(ByteVocabulary())
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(lines, trainer)
    (folder / "bpe").mkdir()
    bpe.save(str(folder / "bpe" / "tokenizer.json"))
    return [*found, HFTokenizer(folder / "bpe", eos_id=0)]


def real(external_data):
    return [
        SentencePieceVocabulary(external_data / "t5_vocab" / "spiece.model", extra_ids=100),
        SentencePieceVocabulary(external_data / "llama2_vocab" / "tokenizer.model"),
        HFTokenizer(external_data / "t5_vocab"),
    ]


def text_of(vocabulary, tokens):
    return b"".join(
        piece
        for piece in (vocabulary.pieces[token] for token in tokens)
        if isinstance(piece, bytes)
    )


def check_pieces(vocabulary):
    """One after another they are the text that the tokens decode to."""
    rng = np.random.default_rng(0)
    plain = [token for token, piece in enumerate(vocabulary.pieces) if isinstance(piece, bytes)]
    cases = [vocabulary.encode(text) for text in TEXTS]
    cases += [rng.choice(plain, 12).tolist() for _ in range(50)]
    hidden = hidden_spaces(vocabulary)
    for ids in cases:
        ids = [token for token in ids if isinstance(vocabulary.pieces[token], bytes)]
        written = text_of(vocabulary, ids)
        if hidden:
            written = written[1:] if hidden == 1 and written[:1] == b" " else written.lstrip(b" ")
        # How bytes that are no text are shown differs: left out, or as a mark.
        try:
            wanted = written.decode()
        except UnicodeDecodeError:
            continue
        assert vocabulary.decode(ids) in (wanted, wanted[1:] if hidden else wanted), ids


def check_pair(student, teacher):
    common = CommonText(student, teacher, (student.size + 3, teacher.size))
    for text, ends in itertools.product(TEXTS, (True, False)):
        ids = student.encode(text) + [*student.eos_ids[:1]] * ends
        found = common.align(ids)
        assert len(found.spans) == len(ids)
        assert len(found.teacher_spans) == len(found.teacher_ids)
        sides = ((student, ids, found.spans), (teacher, found.teacher_ids, found.teacher_spans))
        for number, span in enumerate(found.texts, start=1):
            for vocabulary, tokens, spans in sides:
                own = [t for t, one in zip(tokens, spans, strict=True) if one == number]
                assert own
                if span is None:
                    assert own[0] in vocabulary.eos_ids
                    continue
                # But for the space that is not shown at the beginning.
                written = text_of(vocabulary, own)
                assert written == span or (
                    number == 1 and written.lstrip(b" ") == span.lstrip(b" ")
                )
        for _, tokens, spans in sides:
            numbers = [one for one in spans if one]
            assert numbers == sorted(numbers)
            assert sorted(set(numbers)) == list(range(1, len(found.texts) + 1))
            assert len(tokens) == len(spans)
        check_shortest(found, student, teacher, ids)
    check_classes(common)


def check_shortest(found, student, teacher, ids):
    """No span could be cut in two."""
    for number, span in enumerate(found.texts, start=1):
        if span is None:
            continue
        inner = []
        for vocabulary, tokens, spans in (
            (student, ids, found.spans), (teacher, found.teacher_ids, found.teacher_spans),
        ):  # fmt: skip
            own = [t for t, one in zip(tokens, spans, strict=True) if one == number]
            lengths = [len(text_of(vocabulary, own[i:])) for i in range(1, len(own))]
            inner.append({length for length in lengths if 0 < length < len(span)})
        assert not (inner[0] & inner[1])


def check_classes(common):
    for table in (common.table, common.first):
        student, teacher = set(table.student.tolist()), set(table.teacher.tolist())
        # What only one could say would make a divergence infinite.
        assert student == teacher
        assert student >= set(range(len(table.numbers)))
        assert len(table.student) == common.student.size + 3


def test_pieces_are_the_text_that_tokens_write(trained):
    for vocabulary in trained:
        check_pieces(vocabulary)


def test_spans_of_all_pairs(trained):
    for student, teacher in itertools.product(trained, trained):
        check_pair(student, teacher)


def test_real_vocabularies(trained, external_data):
    vocabularies = real(external_data)
    for vocabulary in vocabularies:
        check_pieces(vocabulary)
    for student, teacher in itertools.permutations([*vocabularies, trained[1], trained[2]], 2):
        check_pair(student, teacher)


def test_a_whole_text_is_in_spans(external_data):
    llama = real(external_data)[1]
    for student, teacher in ((ByteVocabulary(), llama), (llama, ByteVocabulary())):
        common = CommonText(student, teacher, (student.size, teacher.size))
        for text in TEXTS:
            found = common.align([*student.encode(text), student.eos_ids[0]])
            assert all(found.spans), text
            assert all(found.teacher_spans), text


def test_known_spans():
    common = CommonText(STUDENT, TEACHER, (STUDENT.size, TEACHER.size))
    found = common.align([*STUDENT.encode("abc ca"), 1])
    assert found.teacher_ids == [*TEACHER.encode("abc ca"), 1]
    assert found.texts == [b"abc", b" ca", None]
    assert found.spans == [1, 1, 2, 2, 3]
    assert found.teacher_spans == [1, 2, 3]
    # Without an end; with padding and a token without text in the middle.
    assert common.align([2, 0, 10, 3]).spans == [1, 0, 0, 2]
    # Classes by the longest text that both have: "ab" and "abc" begin with "a".
    numbers, table = common.table.numbers, common.table
    classes = {piece: table.student[token] for token, piece in enumerate(STUDENT.pieces)}
    assert classes[b"ab"] == classes[b"a"] == numbers[b"a"] == table.teacher[5]
    assert classes[b" c"] == numbers[b" "]
    assert classes[b"x"] == classes["<extra>"] == len(numbers) == table.rest


def test_bytes_that_are_no_text_are_in_no_span():
    common = CommonText(ByteVocabulary(), ByteVocabulary(), (259, 259))
    half = "é".encode()[0] + 3
    found = common.align([100, half, 101, half])
    assert found.spans == [1, 0, 2, 0]
    assert found.teacher_ids == [100, 101]


def test_the_hidden_space_at_the_beginning(trained):
    """The first token of SentencePiece's is compared by what it shows."""
    pieces = trained[0]
    common = CommonText(pieces, ByteVocabulary(), (pieces.size, 259))
    ids = pieces.encode("Tom has the")
    found = common.align(ids)
    assert b"".join(found.texts) == b"Tom has the"
    assert hidden_spaces(pieces) != 0
    assert hidden_spaces(ByteVocabulary()) == 0
    token = next(t for t, one in enumerate(pieces.pieces) if one[:2] == b" h")
    numbers = (common.first.numbers[b"h"], common.table.numbers[b" "])
    assert (common.first.student[token], common.table.student[token]) == numbers


def test_vocabularies_without_pieces_or_without_anything_in_common():
    class Closed:
        name = "closed"
        size = 4
        eos_ids = (1,)

    with pytest.raises(ValueError, match=r"the text of each token; got closed.*HFTokenizer"):
        CommonText(Closed(), ByteVocabulary(), (4, 259))
    one, other = Pieces((b"a",), eos_ids=()), Pieces((b"b",), eos_ids=())
    other = type("Other", (Pieces,), {"pieces": property(lambda self: ("<p>", "<s>", b"b"))})(
        (b"b",), eos_ids=()
    )
    with pytest.raises(ValueError, match="no token in common"):
        CommonText(one, other, (3, 3))


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"byte-level and SentencePiece.*WordPiece"):
        _ = HFTokenizer(tmp_path).pieces
