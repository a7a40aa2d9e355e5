"""Paths, and names on the hub, which is never reached here."""

import sys
import types

import pytest

from gkd_jax.common import hub


def fake(monkeypatch, download):
    module = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_name_is_downloaded_without_pickles(tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert not any(pattern.endswith(("bin", "*", "py")) for pattern in allow_patterns)
        return str(tmp_path)

    fake(monkeypatch, download)
    assert str(hub.find("org/model")) == str(hub.find("org/model@v1.0")) == str(tmp_path)
    assert asked == [("org/model", None), ("org/model", "v1.0")]


def test_paths_are_never_looked_up(tmp_path, monkeypatch):
    fake(monkeypatch, lambda *args, **kwargs: pytest.fail("looked up"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/missing", "runs", str(tmp_path / "a" / "b")):
        hub.find(path)


def test_what_cannot_be_downloaded_is_a_missing_checkpoint(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no network")

    fake(monkeypatch, download)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at org/model: .* no network"):
        hub.find("org/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'gkd_jax\[hf\]'"):
        hub.find("org/model")
