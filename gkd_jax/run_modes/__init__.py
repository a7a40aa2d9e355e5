"""Run modes of the command, one module each: train, evaluate, generate, export and others.

Start with `train`, the training loop. A run mode may use every other room.
"""
