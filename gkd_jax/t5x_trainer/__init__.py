"""GKD in T5X's own trainer: a model class and a trainer class for `t5x.train.train()`.

T5X reads the data, restores and saves the student, applies the updates and evaluates. This package
adds the objective, the rollout, the choice of outputs for each step, and a teacher whose parameters
are an argument of T5X's partitioned step. `gin_configs/t5x/gkd.gin` sets both classes; docs/t5x.md
has the commands. Start with `trainer`.

T5X is not on PyPI. No other package of gkd_jax imports T5X or this package.
"""

from gkd_jax.t5x_trainer.model import GkdModel
from gkd_jax.t5x_trainer.trainer import GkdTrainer

__all__ = ["GkdModel", "GkdTrainer"]
