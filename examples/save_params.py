"""Saves only the parameters of a run's newest checkpoint, in bfloat16, for use as a teacher.

python examples/save_params.py runs/teacher weights/teacher 'BLEU 33.1 on test_2016_flickr'
"""

import sys

import jax
import jax.numpy as jnp
from flax import traverse_util

from gkd_jax.checkpoints import load, save


def main(run_dir: str, output: str, note: str = "") -> None:
    info = load.describe_checkpoint(run_dir)
    abstract = traverse_util.unflatten_dict(
        {
            tuple(name.split("/")): jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            for name, (shape, _) in info.shapes.items()
        }
    )
    params = load.load_params(run_dir, abstract)
    metadata = {"step": info.step, "note": note}
    if "vocabulary" in info.host:  # A run with another vocabulary refuses it.
        metadata["vocabulary"] = info.host["vocabulary"]
    save.save_params(output, params, metadata)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{output}: step {info.step}, {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
