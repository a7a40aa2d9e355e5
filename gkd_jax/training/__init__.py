"""A run in progress: parameters, jitted functions, random keys, metrics and supervision.

Start with `trainer`, whose `Trainer.step` makes one step of training.
"""
