"""How most tasks make text: a prefix, a field for the prompt and a field for the output."""

import dataclasses
from collections.abc import Callable

from gkd_jax.data.task import RawExample, TextExample, as_it_is


@dataclasses.dataclass(frozen=True)
class FieldsToText:
    """A prompt and an output that are fields of the raw example.

    Examples whose fields are called 'inputs' and 'targets', as parallel text and templated
    sources have them, are understood as well, so that files at hand need no renaming.

    Attributes:
      inputs_field: the field with the prompt's text.
      targets_field: the field with the output.
      prefix: put before the prompt's text.
      output_parser: makes the reference of metrics from the output, e.g. its final answer.
    """

    inputs_field: str = "inputs"
    targets_field: str = "targets"
    prefix: str = ""
    output_parser: Callable[[str], str] = as_it_is

    def __call__(self, example: RawExample) -> TextExample:
        """Makes the text; a KeyError names a missing field."""
        names = (self.inputs_field, self.targets_field)
        if not all(name in example for name in names) and "inputs" in example:
            names = ("inputs", "targets")
        inputs, targets = (example[name] for name in names)
        return TextExample(
            inputs=self.prefix + inputs, targets=targets, references=(self.output_parser(targets),)
        )
