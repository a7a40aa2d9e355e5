"""Collects all problems of an experiment, so that they are reported together."""

import contextlib
from collections.abc import Iterator


class ConfigurationError(ValueError):
    """Error of a wrong experiment. The message lists every problem that was found.

    Attributes:
      problems: one text for each problem.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        if len(problems) == 1:
            super().__init__(problems[0])
        else:
            lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(problems, start=1))
            super().__init__(f"{len(problems)} things are wrong:\n{lines}")


class Problems:
    """Problems that were found so far.

    Attributes:
      texts: one text for each problem.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    @contextlib.contextmanager
    def collecting(self, where: str = "") -> Iterator[None]:
        """Catches and records the errors in a `with` block that a user can cause.

        These errors are `ValueError` and `OSError`. The program continues after the block, so that
        later checks still run.

        Args:
          where: prefix of the recorded texts.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            texts = error.problems if isinstance(error, ConfigurationError) else [str(error)]
            self.texts += [where + text for text in texts if where + text not in self.texts]

    def raise_if_any(self) -> None:
        """Raises a `ConfigurationError` with all problems, if there are any."""
        if self.texts:
            raise ConfigurationError(self.texts)
