"""Prints the last saved step of a run and its total number of steps.

    python -m gkd_jax.checkpoints.last_step runs/wmt

prints {"last_step": 4000, "train_steps": 20000, "done": false}. The scripts in launch/ run this
module on machines without any packages installed. For a local folder, this module therefore needs
only Python's standard library; it parses the run's files without the rest of gkd_jax.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

# These constants are copied, because the modules that define them import JAX. A test checks that
# the copies are equal to the originals.
_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
_MANIFEST = "MANIFEST.json"
_HOST = "host.json"

_NUM_STEPS = re.compile(r"(?:[\w/]+/)?(?:\w+\.)?Experiment\.num_steps = (?:%(\S+)|(\d+))")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run or of a study.

    Attributes:
      last_step: step of the last complete checkpoint, 0 if there is none. For a study, this is the
        sum of the last steps of its runs.
      train_steps: total number of steps of the run. None if it is unknown; always None for a study.
      done: whether the run's final step is saved and the evaluation of that step, if due, is
        complete. Always False for a study.
    """

    last_step: int
    train_steps: int | None
    done: bool


def read_progress(model_dir: pathlib.Path, *, train_steps: int | None = None) -> Progress:
    """Reads the progress of a run or of a study. A missing folder counts as a new run.

    Args:
      model_dir: folder of a run or of a study.
      train_steps: total number of steps; None reads it from the saved configuration.
    """
    config = model_dir / "config.gin"
    text = config.read_text() if config.exists() else ""
    if re.search(r"^(?:\w+\.)?Study\.cells = ", text, re.MULTILINE):
        runs = [folder for folder in model_dir.iterdir() if folder.is_dir()]
        return Progress(sum(_last_step(folder) for folder in runs), None, done=False)
    wanted = _num_steps(text) if train_steps is None else train_steps
    last = _last_step(model_dir)
    done = wanted is not None and last >= max(wanted, 1)
    return Progress(last, wanted, done and not _owes_evaluation(model_dir, last))


def _last_step(folder: pathlib.Path) -> int:
    """Returns the last step with a complete checkpoint (one with a manifest); 0 if none."""
    try:
        names = [child.name for child in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    matches = map(_STEP_FOLDER.fullmatch, names)
    steps = (int(match[1]) for match in matches if match)
    return max((s for s in steps if (folder / f"checkpoint_{s}" / _MANIFEST).exists()), default=0)


def _owes_evaluation(folder: pathlib.Path, step: int) -> bool:
    host = json.loads((folder / f"checkpoint_{step}" / _HOST).read_text())["host"]
    was_made = (folder / f"evaluated_{step}.json").exists()
    return bool(host.get("owes_evaluation", False)) and not was_made


def _num_steps(text: str) -> int | None:
    """Returns the number of steps in a saved configuration; None if it is missing or ambiguous."""
    found: set[int | None] = set()
    for match in filter(None, map(_NUM_STEPS.fullmatch, text.splitlines())):
        macro, number = match.groups()
        if macro is not None:
            value = re.search(rf"^{re.escape(macro)} = (\d+)$", text, re.MULTILINE)
            number = value[1] if value else None
        found.add(None if number is None else int(number))
    return found.pop() if len(found) == 1 else None


def main() -> None:
    """Prints the progress as JSON; exits with status 2 if the folder cannot be read."""
    parser = argparse.ArgumentParser(description="The last step saved in a run's folder, as JSON.")
    parser.add_argument(
        "model_dir", help="the run's MODEL_DIR, a bucket's or as this machine sees it"
    )
    parser.add_argument(
        "--train_steps", type=int, help="instead of the number in the saved configuration"
    )
    arguments = parser.parse_args()
    folder: Any = pathlib.Path(arguments.model_dir)
    if "://" in arguments.model_dir:
        try:
            from etils import epath

            from gkd_jax.common.growing_files import prefer_gcsfs
        except ImportError:
            parser.error(
                f"a bucket such as {arguments.model_dir} is read by etils: install gkd_jax's "
                "requirements, or give the path that the bucket is mounted at."
            )
        prefer_gcsfs()
        folder = epath.Path(arguments.model_dir)
    try:
        progress = read_progress(folder, train_steps=arguments.train_steps)
    except Exception as error:  # Each library for buckets has its own types of errors.
        print(f"error: {arguments.model_dir} cannot be read: {error!r}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(dataclasses.asdict(progress)))


if __name__ == "__main__":
    main()
