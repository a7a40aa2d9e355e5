"""Generalized knowledge distillation (arXiv 2306.13649) of language models in JAX, for TPUs.

Its packages, from the bottom up; each imports only packages above it in this list:

    common         Batch, array types, growing files
    data           text to batches; metrics of texts
    models         networks as pure functions of their parameters
    objectives     divergences and other terms of the loss
    sampling       decoding of outputs
    devices        the mesh of devices, shardings, costs
    distillation   teachers, rollouts, rewards, the training step
    checkpoints    saving and loading of parameters and training states
    experiment     the configuration of a run and its checks
    training       the state and the loop of a run in progress
    run_modes      train, eval, generate, export and the others

`gkd_jax.main` is the command; `gkd_jax.t5x_trainer` is for T5X's own trainer.
"""

from gkd_jax.common import moved

moved.install()
