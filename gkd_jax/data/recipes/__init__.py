"""Recipes: functions that return the tasks of the GKD paper and the arithmetic of the quickstart.

By default the sources of the paper's tasks are TFDS data sets. Other sources, such as local files,
are passed as arguments in Python or bound in gin:
`recipes.wmt14_en_de.train = @train/sources.ParallelText()`.
"""

from gkd_jax.data.recipes.instructions import final_answer, flan2021, flan_cot_tsv, instruction
from gkd_jax.data.recipes.reasoning import CHAIN_OF_THOUGHT_EXEMPLARS, arithmetic, gsm8k
from gkd_jax.data.recipes.summarization import xsum
from gkd_jax.data.recipes.translation import wmt14_en_de

__all__ = [
    "CHAIN_OF_THOUGHT_EXEMPLARS",
    "NAMED",
    "arithmetic",
    "final_answer",
    "flan2021",
    "flan_cot_tsv",
    "gsm8k",
    "instruction",
    "wmt14_en_de",
    "xsum",
]

# Tasks that MIXTURE_OR_TASK_NAME may name, with their default sources.
NAMED = (arithmetic, flan2021, gsm8k, wmt14_en_de, xsum)
