"""Sources made from other sources: examples formatted by templates, and mixtures of sources."""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from gkd_jax.data.task import RawExample, Source, SourceConfig


@dataclasses.dataclass(frozen=True)
class Templated:
    r"""Examples of another source, formatted by templates.

    Templates are Python format strings over the fields of an example, e.g.
    `inputs='{premise} Does this mean that {hypothesis}?'`. Braces in the data are plain text.

    Attributes:
      source: source of the examples.
      inputs: template of the prompt.
      targets: template of the output.
      labels: maps each field that holds a class number to the texts of the classes, in order. The
        texts are templates too (`{'label': ('{choice1}', '{choice2}')}`).
      unescape_newlines: whether to replace a backslash followed by n in the data by a newline, as
        FLAN's TSV files require.
    """

    source: SourceConfig
    inputs: str
    targets: str
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unescape_newlines: bool = False

    def open(self) -> Source:
        """Opens the source and formats its first example, to check the names of fields.

        Raises:
          FileNotFoundError, ValueError: the source cannot be opened, or a template names a field
            that the examples do not have.
        """
        opened = _TemplatedSource(self, self.source.open())
        opened[0]
        return opened


class _TemplatedSource:
    """Examples with the fields 'inputs' and 'targets'."""

    def __init__(self, config: Templated, source: Source):
        self._config = config
        self._source = source
        words = [config.inputs, config.targets, dict(config.labels), config.unescape_newlines]
        self.fingerprint = _digest("templated", words, source.fingerprint)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> RawExample:
        config = self._config
        fields = dict(self._source[index])
        if config.unescape_newlines:
            fields = {
                name: value.replace("\\n", "\n") if isinstance(value, str) else value
                for name, value in fields.items()
            }
        try:
            names = {
                field: _class_name(names, field, fields[field]).format_map(fields)
                for field, names in config.labels.items()
            }
            fields |= names
            return {
                "inputs": config.inputs.format_map(fields),
                "targets": config.targets.format_map(fields),
            }
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"Templated names the field {error}, which example {index} lacks: it has "
                f"{', '.join(map(repr, fields))}. Correct Templated.inputs, targets or labels, or "
                "the source's columns."
            ) from error


def _class_name(names: tuple[str, ...], field: str, number: Any) -> str:
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise ValueError(
            f"Templated.labels[{field!r}] must name every class; got {len(names)} names and an "
            f"example of class {number!r}. Add names, or leave such examples out of the source."
        )
    return names[number]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of several sources in fixed proportions, with random access.

    Without weights each example of each source occurs once. With weights (or `rate_maximum`) each
    source gets a share of the examples in proportion to its weight, exact to within one example. A
    source that is shorter than its share is repeated. The shares are concatenated; the pipeline
    shuffles the result.

    Attributes:
      sources: sources of the mixture, at least one.
      weights: one positive number per source; None concatenates the sources.
      max_examples: maximum number of examples of each source, taken from its start.
      rate_maximum: if set, the weight of a source is its number of examples, but at most this
        number (T5's examples-proportional mixing). FLAN 2021 uses 3,000, with `max_examples`
        30,000.
      num_examples: length of a weighted mixture; None uses the sum over the sources.
    """

    sources: tuple[SourceConfig, ...]
    weights: tuple[float, ...] | None = None
    max_examples: int | None = None
    rate_maximum: int | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Mixture.sources is empty. Give at least one source.")
        if self.weights is not None:
            if len(self.weights) != len(self.sources) or min(self.weights) <= 0:
                raise ValueError(
                    "Mixture.weights must hold one positive number for each of the "
                    f"{len(self.sources)} sources; got {self.weights}."
                )
            if self.rate_maximum is not None:
                raise ValueError(
                    "Mixture.weights and Mixture.rate_maximum exclude each other: both set the "
                    "proportions. Set one of them to None."
                )
        elif self.rate_maximum is None and self.num_examples is not None:
            raise ValueError(
                "Mixture.num_examples wants weights or a rate_maximum; without them each example "
                "occurs once. Set one of them, or use max_examples or DatasetConfig.num_examples."
            )
        for name in ("max_examples", "rate_maximum", "num_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Mixture.{name} must be at least 1 or None; got {value}.")

    def open(self) -> Source:
        """Opens all sources.

        Raises:
          FileNotFoundError, ValueError: a source cannot be opened.
        """
        opened = [source.open() for source in self.sources]
        cap = self.max_examples
        sizes = [len(source) if cap is None else min(len(source), cap) for source in opened]
        weights: list[float] | None = None if self.weights is None else list(self.weights)
        if self.rate_maximum is not None:
            weights = [min(size, self.rate_maximum) for size in sizes]
        shares = sizes
        if weights is not None:
            shares = _divide(self.num_examples or sum(sizes), weights)
        return MixedSource(opened, sizes, shares)


class MixedSource:
    """A concatenation of sources, with `shares[k]` examples of source k.

    Args:
      sources: the sources.
      sizes: number of examples to use of each source.
      shares: number of examples of each source in the mixture; a source is repeated if its share is
        larger than its size.
    """

    def __init__(self, sources: list[Source], sizes: list[int], shares: list[int]):
        self._sources = sources
        self._sizes = sizes
        self._stops = list(itertools.accumulate(shares))
        fingerprints = [source.fingerprint for source in sources]
        self.fingerprint = _digest("mixture", fingerprints, sizes, shares)

    def __len__(self) -> int:
        return self._stops[-1]

    @property
    def num_sources(self) -> int:
        """Number of sources."""
        return len(self._sources)

    def source_id(self, index: int) -> int:
        """Returns the number of the source that an example comes from."""
        return bisect.bisect_right(self._stops, index)

    def __getitem__(self, index: int) -> RawExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        number = self.source_id(index)
        offset = index - (self._stops[number - 1] if number else 0)
        return self._sources[number][offset % self._sizes[number]]


def _divide(total: int, weights: list[float]) -> list[int]:
    """Divides a total in proportion to weights, by the method of largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
