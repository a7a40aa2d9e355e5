"""The distillation method: teachers, rollouts, rewards, replay, optimizers, the training step.

Contains pure functions, which `training` jits, and frozen dataclasses, which gin binds. It reads no
files and has no loop. Start with `train_step`, then `rollout` and `teachers`.
"""
