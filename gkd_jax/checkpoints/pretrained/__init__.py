"""Pretrained weights included in the package: the teacher of the quickstart."""

import pathlib


def arithmetic_teacher() -> str:
    """Returns the checkpoint folder of the teacher for two-step arithmetic word problems.

    It was trained with gin_configs/arithmetic_teacher.gin and saved in bfloat16 with
    examples/save_params.py. The metadata beside the weights state its accuracy.
    """
    return str(pathlib.Path(__file__).parent / "arithmetic_teacher")
