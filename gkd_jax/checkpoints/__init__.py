"""Parameters and training states, in and out: of runs, of T5X, of Hugging Face.

The only room that uses Orbax. Start with `store`, a run's own checkpoints, and `load`, which reads
any kind. `last_step` needs Python alone, `pretrained` holds the quickstart's teacher.
"""
