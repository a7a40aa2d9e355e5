"""What the command can do, a module a run mode: train, evaluate, generate, export and others.

Start with `train`, the loop.
"""
