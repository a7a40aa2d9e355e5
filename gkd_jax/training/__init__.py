"""A run in progress: parameters, jitted functions, random keys, metrics and supervision.

Start with `trainer`, which makes one step: coin, rollout, reward, update.
"""
