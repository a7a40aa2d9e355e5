"""Checkpoints: saving and loading parameters and training states.

Reads and writes the checkpoints of runs, of T5X, and of Hugging Face. Only this package uses Orbax.
Start with `manager`, which saves and restores the checkpoints of a run, and `load`, which loads
parameters from a checkpoint of any kind. The module `last_step` needs only Python's standard
library. The folder `pretrained` contains the teacher of the quickstart.
"""
