"""Run modes of the command, one module each: train, evaluate, generate, export and others.

Start with `train`, the training loop. Run modes may import every other package of gkd_jax
except `t5x_trainer`.
"""
