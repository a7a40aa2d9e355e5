"""Weights that come with the package: a teacher for the quickstart."""

import pathlib


def arithmetic_teacher() -> str:
    """The folder of the teacher of two-step arithmetic word problems.

    Trained by gin_configs/arithmetic_teacher.gin, stored in bfloat16 by
    examples/save_params.py; its accuracy is in the metadata beside the weights.
    """
    return str(pathlib.Path(__file__).parent / "arithmetic_teacher")
