"""Tasks that consist of prompts only: from a file, from standard input, or given in Python."""

import dataclasses
import sys
from collections.abc import Sequence

from gkd_jax.data.pipeline import DatasetConfig
from gkd_jax.data.registry import get_task
from gkd_jax.data.sources import InMemory, JsonLines
from gkd_jax.data.task import RawExample, SourceConfig, Task, TextExample
from gkd_jax.data.text_files import TextLines, as_paths

SPLIT = "prompts"
STANDARD_INPUT = "-"


def prompts_task(prompts: str | Sequence[str]) -> Task:
    r"""Returns a task whose only split, 'prompts', consists of complete prompts.

    Args:
      prompts: a sequence of texts, or the name of a file: JSON lines with the field 'inputs'
        ('.jsonl', '.json', plain or '.gz'), or text with one prompt per line. The name '-' is
        standard input, which is read as text. In prompts that are not from JSON, a backslash
        followed by n stands for a newline. A blank line of text is a prompt too.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is empty.
    """
    return Task("prompts", {SPLIT: _source(prompts)}, _to_text)


def with_prompts(config: DatasetConfig, prompts: str | Sequence[str]) -> DatasetConfig:
    """Returns a configuration with other prompts but the same lengths, vocabulary and end tokens.

    Args:
      config: configuration of the data.
      prompts: as for `prompts_task`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is empty, or the task of `config` is unknown.
    """
    task = config.task
    if not isinstance(task, Task):
        task = get_task(task, module=config.task_module)
    inputs_eos = task.inputs_eos if config.inputs_eos is None else config.inputs_eos
    return dataclasses.replace(
        config, task=prompts_task(prompts), split=SPLIT, num_examples=None, inputs_eos=inputs_eos
    )


def _source(prompts: str | Sequence[str]) -> SourceConfig:
    if not isinstance(prompts, str):
        lines: Sequence[str] = prompts
    elif prompts == STANDARD_INPUT:
        lines = sys.stdin.read().splitlines()
    elif prompts.removesuffix(".gz").endswith((".jsonl", ".json")):
        return JsonLines(prompts, fields=("inputs",))
    else:
        text = TextLines(as_paths(prompts), setting="Generation.prompts")
        lines = [text[index] for index in range(len(text))]
    if not lines:
        raise ValueError(
            f"Generation.prompts names {prompts!r}, where there is no prompt. Give one a line."
        )
    return InMemory([{"inputs": line.replace("\\n", "\n")} for line in lines])


def _to_text(example: RawExample) -> TextExample:
    return TextExample(example["inputs"], "")
