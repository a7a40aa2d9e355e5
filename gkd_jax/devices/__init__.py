"""The mesh of devices, how arrays are sharded over it, and what a compiled program costs there.

Start with `partitioning`, the one place where shardings are made. `chips`, `flops` and `hlo` count
what a program needs, also for a TPU that is not there.
"""
