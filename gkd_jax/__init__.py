"""Generalized knowledge distillation (arXiv 2306.13649) of language models in JAX, for TPUs.

The rooms, from the bottom up; each knows only those below it:

    common         Batch, array types, growing files
    data           text to batches; metrics of texts
    models         networks as pure functions of their parameters
    objectives     what the student minimises
    sampling       how outputs are decoded
    devices        the mesh of devices, shardings, costs
    distillation   teachers, rollouts, rewards, the training step
    checkpoints    parameters and training states, in and out
    experiment     one run as data, checked before it starts
    training       a run while it runs
    run_modes      train, eval, generate, export and the others

`gkd_jax.main` is the command; `gkd_jax.t5x_trainer` is for T5X's own trainer.
"""

from gkd_jax.common import moved

moved.install()
