"""Kinds of training steps, by the origin of the outputs that they train on."""

import enum


class StepKind(enum.StrEnum):
    """Origin of a step's outputs. The value is the name of the step's group of metrics."""

    DATA = "data"
    """The targets of the data."""
    ON_POLICY = "on_policy"
    """Outputs sampled at this step."""
    MIXED = "mixed"
    """Both: for each example, a coin decides between its target and a sampled output."""
    REPLAY = "replay"
    """Outputs sampled at earlier steps."""
