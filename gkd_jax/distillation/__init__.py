"""The distillation method: teachers, rollouts, rewards, replay, optimizers, the training step.

Contains pure functions, which `training` jits, and frozen dataclasses, which gin binds. The package
reads no files and contains no training loop. Start with `train_step`, then `rollout` and
`teachers`.
"""
