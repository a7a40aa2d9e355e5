"""Prompts alone, as a task: from a file, from standard input, or at hand."""

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
    r"""A task whose one split 'prompts' has these prompts, each the whole of what a model reads.

    Args:
      prompts: texts; or where they are: JSON lines with the field 'inputs' ('.jsonl', '.json',
        plain or '.gz'), else a text of one prompt a line, '-' for standard input. In a text a
        backslash and n stand for a line's end, and blank lines are prompts too.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or nothing in it.
    """
    return Task("prompts", {SPLIT: _source(prompts)}, _to_text)


def with_prompts(config: DatasetConfig, prompts: str | Sequence[str]) -> DatasetConfig:
    """The same lengths, vocabulary and ends of a prompt, on other prompts than the data's.

    Raises:
      FileNotFoundError, ValueError: as `prompts_task`; or the data's task is unknown.
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
