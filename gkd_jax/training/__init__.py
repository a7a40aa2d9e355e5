"""A run while it runs: its parameters, jitted functions, keys, metrics, and what watches over it.

Start with `trainer`, which makes one step: coin, rollout, reward, update.
"""
