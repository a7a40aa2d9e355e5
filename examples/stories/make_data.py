"""Makes empty prompts for the teacher, and training data from the stories that it writes.

    python examples/stories/make_data.py empty --number=6000 --output=empty.jsonl
    python examples/stories/make_data.py split --stories=written.jsonl --output=data

The first 12 words of a story are the prompt, the rest is the output. The last 256 stories are the
validation set.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable

NUM_OPENING_WORDS = 12
NUM_VALIDATION = 256


def write(path: pathlib.Path, examples: Iterable[dict[str, str]]) -> None:
    """Writes examples as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(example)}\n" for example in examples))


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["empty", "split"])
    parser.add_argument("--number", type=int, default=6000, help="how many empty prompts")
    parser.add_argument("--stories", type=pathlib.Path, help="output of --run_mode=generate")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a file, or a folder")
    flags = parser.parse_args()
    if flags.what == "empty":
        write(flags.output, [{"inputs": "", "targets": ""}] * flags.number)
        return
    stories = [json.loads(line)["targets"] for line in flags.stories.read_text().splitlines()]
    examples = []
    for story in dict.fromkeys(stories):
        words = story.split(" ")
        if len(words) > 2 * NUM_OPENING_WORDS:
            opening, rest = words[:NUM_OPENING_WORDS], words[NUM_OPENING_WORDS:]
            examples.append({"inputs": " ".join(opening), "targets": " ".join(rest)})
    write(flags.output / "train.jsonl", examples[:-NUM_VALIDATION])
    write(flags.output / "validation.jsonl", examples[-NUM_VALIDATION:])
    print(f"{len(examples) - NUM_VALIDATION} stories to train on, {NUM_VALIDATION} for validation")


if __name__ == "__main__":
    main()
