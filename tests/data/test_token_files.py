import json

import pytest

from gkd_jax.data.task import TextExample
from gkd_jax.data.token_files import TokenFiles, TokensToText, write_token_files

_EXAMPLES = [
    TextExample("ab", "c", ("r1", "r2"), inputs_ids=(100, 101, 1), targets_ids=(102, 1)),
    TextExample("ü", "", inputs_ids=(7,), targets_ids=()),
    TextExample("x\ny", "z", inputs_ids=(2**31 - 1, 0), targets_ids=(5, 6, 7)),
]


def test_examples_are_read_back_as_written(tmp_path):
    write_token_files(tmp_path / "deep" / "set", iter(_EXAMPLES), description="three")
    source = TokenFiles(tmp_path / "deep" / "set")
    assert len(source) == 3
    assert [TokensToText()(source[index]) for index in (2, 0, 1)] == [
        _EXAMPLES[2],
        _EXAMPLES[0],
        _EXAMPLES[1],
    ]
    with pytest.raises(IndexError):
        source[3]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]


def test_fingerprint_follows_the_content(tmp_path):
    write_token_files(tmp_path / "a", _EXAMPLES, description="a")
    write_token_files(tmp_path / "b", _EXAMPLES, description="b")
    write_token_files(tmp_path / "c", _EXAMPLES[:2], description="a")
    first, same, other = (TokenFiles(tmp_path / name).fingerprint for name in "abc")
    assert first == same != other


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield _EXAMPLES[0]
        raise RuntimeError("the stream broke")

    with pytest.raises(RuntimeError, match="the stream broke"):
        write_token_files(tmp_path / "a", broken(), description="")
    with pytest.raises(ValueError, match="empty"):
        write_token_files(tmp_path / "a", [], description="")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path):
    write_token_files(tmp_path / "a", _EXAMPLES, description="first")
    write_token_files(tmp_path / "a", _EXAMPLES, description="second")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text("utf-8"))
    assert meta["description"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("file", ["tokens.bin", "texts.bin", "token_ends.npy"])
def test_cut_files_are_refused(tmp_path, file):
    write_token_files(tmp_path / "a", _EXAMPLES, description="")
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cannot be read.*Remove this folder"):
        TokenFiles(tmp_path / "a")
