"""Saving parameters on their own, without a training state."""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from gkd_jax.checkpoints import layout
from gkd_jax.common.array_types import Params
from gkd_jax.devices.processes import process_zero_decides


def save_params(
    path: epath.PathLike, params: Params, metadata: Mapping[str, Any] | None = None
) -> None:
    """Saves parameters, with a manifest of digests, to a folder that `load.load_params` reads.

    Args:
      path: a new folder.
      params: parameters to save, sharded or not.
      metadata: JSON values to store beside the parameters.

    Raises:
      ValueError: `path` is not empty or not writable, or `metadata` is not JSON.
    """
    folder = layout.absolute(path)
    tree = {"params": params}
    header = layout.Header(
        kind="params",
        step=None,
        shapes=layout.shapes_of(tree),
        metric=None,
        host=dict(metadata or {}),
    ).dump()

    def make_folder() -> bool:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"the path to save to must be new; got {folder}. Choose another.")
        layout.check_writable(folder)
        layout.begin(folder)
        return True

    # Only process 0 checks that the folder is new, because other processes might check it after
    # process 0 has already written to it.
    process_zero_decides(make_folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeSave(layout.to_nested(tree))
        checkpointer.save(folder / layout.ARRAYS, args=args)
    if jax.process_index() == 0:
        layout.finish(folder, header)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_params {folder}")
