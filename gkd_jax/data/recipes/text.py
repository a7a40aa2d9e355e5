"""Text of an example, read from two of its fields: prompt (with a prefix) and output."""

import dataclasses
from collections.abc import Callable

from gkd_jax.data.task import RawExample, TextExample, unchanged


@dataclasses.dataclass(frozen=True)
class FieldsToText:
    """Reads prompt and output from two fields of the raw example.

    Examples with the fields 'inputs' and 'targets', such as those of `ParallelText` and
    `Templated`, are accepted with any settings, so that fields of local files need not be
    renamed.

    Attributes:
      inputs_field: field with the prompt's text.
      targets_field: field with the output.
      prefix: prepended to the prompt's text.
      output_parser: function of the output that returns the reference for metrics, e.g. the final
        answer.
    """

    inputs_field: str = "inputs"
    targets_field: str = "targets"
    prefix: str = ""
    output_parser: Callable[[str], str] = unchanged

    def __call__(self, example: RawExample) -> TextExample:
        """Returns the text.

        Raises:
          KeyError: the example lacks a field.
        """
        names = (self.inputs_field, self.targets_field)
        if not all(name in example for name in names) and "inputs" in example:
            names = ("inputs", "targets")
        inputs, targets = (example[name] for name in names)
        return TextExample(
            inputs=self.prefix + inputs, targets=targets, references=(self.output_parser(targets),)
        )
