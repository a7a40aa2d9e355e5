"""The method: teachers, rollouts, rewards, replay, the optimizer, the training step.

Pure functions that the training room jits, and the frozen dataclasses that gin binds; no files, no
loop. Start with `train_step`, then `rollout` and `teachers`.
"""
