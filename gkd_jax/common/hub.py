"""Finds checkpoints by their path or by their name on the Hugging Face hub."""

import os
import re

from etils import epath

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")


def find(path: epath.PathLike) -> epath.Path:
    """Returns the path of a checkpoint.

    If a name on the hub is given, the checkpoint is downloaded (and cached) first.

    Args:
      path: an existing path, or a name on the hub. `name@revision` selects a revision other than
        the newest.

    Raises:
      FileNotFoundError: the path does not exist, and no checkpoint of this name can be downloaded.
    """
    folder = epath.Path(path)
    name = os.fspath(path)
    # If the folder runs/ exists, 'runs/x' is treated as a local path, not as a name on the hub.
    if folder.exists() or folder.parent.exists() or not _NAME.fullmatch(name):
        return folder if "://" in name else folder.absolute()
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: the path does not exist. If it is a name on the "
            "Hugging Face hub, install the package that downloads it: pip install 'gkd_jax[hf]'"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        return epath.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
            )
        )  # fmt: skip
    # Errors of a download (no network, unknown name, no access) have no common class.
    except Exception as error:
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: the path does not exist, and as a name on the "
            f"Hugging Face hub it cannot be downloaded: {error}"
        ) from error
