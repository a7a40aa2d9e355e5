"""Run mode `interactive`: answers prompts from standard input, one at a time."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from gkd_jax.common.batch import Batch
from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.prompts import with_prompts
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.run_modes import generate
from gkd_jax.training import jitted_functions
from gkd_jax.training.keys import Purpose, make_key

_HELP = "One prompt a line (\\n within it is a line's end); an end of input ends."


def interactive(experiment: Experiment) -> None:
    """Answers each line of standard input with the settings of `Experiment.generation`.

    Prints each output and its log-probability. The n-th prompt gets the same samples in every run
    with the same seed.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
    """
    prepare.prepare(experiment, run_mode="interactive")
    generation = experiment.generation
    assert generation is not None
    model, params, source = generate.model_to_use(experiment, generation)
    vocabulary = generation.data.vocabulary
    decode = jitted_functions.jit_rollout(
        Rollout(method=generation.method, num_samples=generation.num_samples),
        model,
        experiment.partitioner,
        eos_ids=vocabulary.eos_ids,
        pad_id=vocabulary.pad_id,
    )
    key = make_key(experiment.seed, Purpose.GENERATION)
    print(f"{generation.model} from {source}. {_HELP}", file=sys.stderr)
    for number, prompt in enumerate(_prompts()):
        batch = _one_prompt(experiment, prompt, number)
        rows = experiment.partitioner.fetch_to_host(decode(params, batch, key))
        for text, log_prob in _outputs(rows, number, experiment):
            print(f"{text}\n  [log-probability {log_prob:.2f}]", flush=True)


def _prompts() -> Iterator[str]:
    """Yields the lines of standard input. On a terminal, prints "> " before reading each line."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _one_prompt(experiment: Experiment, prompt: str, number: int) -> Batch:
    """Returns a batch with the prompt, padded to the smallest batch size of the mesh."""
    generation, layout = experiment.generation, experiment.partitioner.data_layout
    assert generation is not None
    config = dataclasses.replace(
        with_prompts(generation.data, [prompt]),
        batch_size=experiment.partitioner.smallest_batch,
        read_threads=0,
    )
    batches = Dataset(config).eval_batches(
        process_index=layout.shard_id, process_count=layout.num_shards
    )
    batch, examples = next(batches)
    if generation.model == "teacher":
        batch = batch.as_teacher_reads()
    # The keys of the samples depend on the example id, which is the number of the prompt here.
    example_id: Any = np.where(examples >= 0, number, -1).astype(np.int32)
    return experiment.partitioner.shard_batch(dataclasses.replace(batch, example_id=example_id))


def _outputs(rows: Batch, number: int, experiment: Experiment) -> Iterator[tuple[str, float]]:
    assert experiment.generation is not None
    weights, log_probs = np.asarray(rows.loss_weights), np.asarray(rows.sample_log_probs)
    for row in np.flatnonzero(np.asarray(rows.example_id) == number):
        tokens = np.asarray(rows.targets)[row][weights[row] > 0].tolist()
        text = experiment.generation.data.vocabulary.decode(tokens)
        yield text, float(np.sum(log_probs[row] * weights[row]))
