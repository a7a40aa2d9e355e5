"""The device mesh, the sharding of arrays, and the cost of compiled programs.

Start with `partitioning`, which builds the shardings of parameters, states and batches. `chips`,
`flops` and `hlo` estimate the cost of a program, including programs compiled for a TPU that is not
attached.
"""
