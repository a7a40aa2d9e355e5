"""Kinds of training steps, by the origin of the outputs that they train on."""

import enum


class StepKind(enum.StrEnum):
    """Origin of a step's outputs. The value is the name of the step's group of metrics."""

    DATA = "data"
    """The targets of the data."""
    ON_POLICY = "on_policy"
    """Outputs sampled at this step."""
    MIXED = "mixed"
    """Targets of the data for some examples, and sampled outputs for the others, at random."""
    REPLAY = "replay"
    """Outputs sampled at earlier steps."""
