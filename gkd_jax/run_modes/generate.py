"""Run mode `generate`: writes a model's outputs for a set of prompts. A stopped run resumes.

The file has one output per line as JSON, so that a `JsonLines` source can read it as training data.
Training on the teacher's outputs is sequence-level distillation (SeqKD).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from etils import epath

from gkd_jax.common.array_types import Params
from gkd_jax.common.batch import Batch
from gkd_jax.common.growing_files import GrowingFile
from gkd_jax.data.pipeline import Dataset
from gkd_jax.devices.processes import process_zero_decides
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.experiment import prepare
from gkd_jax.experiment.experiment import Experiment
from gkd_jax.experiment.settings import Generation
from gkd_jax.models.base import LanguageModel
from gkd_jax.training import jitted_functions, parameters
from gkd_jax.training.keys import Purpose, make_key


def generate(experiment: Experiment) -> str:
    """Writes the model's outputs for every prompt of `Experiment.generation`.

    Outputs that an earlier run with the same settings wrote are kept.

    Returns:
      The path of the file.

    Raises:
      ConfigurationError: lists everything that is wrong with the experiment.
      ValueError: the file was written with another model, data, method, number of samples or seed.
    """
    prepared = prepare.prepare(experiment, run_mode="generate")
    generation, dataset = experiment.generation, prepared.generation_data
    assert generation is not None
    assert dataset is not None
    model, params, source = model_to_use(experiment, generation)
    output = _OutputFile(generation, _identity(generation, dataset, source, experiment.seed))
    num_done = process_zero_decides(output.num_done)
    logging.info("generate: %d of %d prompts are done", num_done, dataset.num_examples)

    vocabulary = dataset.config.vocabulary
    decode = jitted_functions.jit_rollout(
        Rollout(method=generation.method, num_samples=generation.num_samples),
        model,
        experiment.partitioner,
        eos_ids=vocabulary.eos_ids,
        pad_id=vocabulary.pad_id,
    )
    key = make_key(experiment.seed, Purpose.GENERATION)
    layout = experiment.partitioner.data_layout
    with contextlib.closing(output):
        for number, (batch, _) in enumerate(
            dataset.eval_batches(process_index=layout.shard_id, process_count=layout.num_shards)
        ):
            end = min((number + 1) * generation.data.batch_size, dataset.num_examples)
            if end <= num_done:
                continue
            read = batch.as_teacher_reads() if generation.model == "teacher" else batch
            decoded = decode(params, experiment.partitioner.shard_batch(read), key)
            rows = experiment.partitioner.fetch_to_host(decoded)
            if jax.process_index() == 0:
                output.append(_lines(rows, dataset, first=num_done))
            logging.log_every_n_seconds(
                logging.INFO, "generate: %d of %d prompts are done", 10, end, dataset.num_examples
            )
    return generation.output


def model_to_use(
    experiment: Experiment, generation: Generation
) -> tuple[LanguageModel, Params, str]:
    """Returns the model that generates, its parameters, and a description of their source."""
    if generation.model == "student":
        student = parameters.student_to_use(experiment)
        return experiment.student.model, student.params, student.source
    model = experiment.teacher_model
    assert model is not None
    teacher = parameters.teacher_to_use(experiment)
    return model, teacher.params, teacher.source


def _identity(generation: Generation, dataset: Dataset, source: str, seed: int) -> str:
    """Returns a digest of everything that determines the file's content."""
    parts = (dataset.fingerprint, source, generation.method, generation.num_samples, seed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _lines(rows: Batch, dataset: Dataset, *, first: int) -> Iterator[str]:
    """Yields a JSON line for each row of a batch whose example index is at least `first`."""
    weights = np.asarray(rows.loss_weights)
    assert rows.sample_log_probs is not None
    log_probs = np.sum(np.asarray(rows.sample_log_probs) * weights, axis=1)
    for row, index in enumerate(np.asarray(rows.example_id).tolist()):
        if index < first:  # The example was written before, or the row is padding (-1).
            continue
        example = dataset.raw(index)
        tokens = np.asarray(rows.targets)[row][weights[row] > 0].tolist()
        yield json.dumps(
            {
                "index": index,
                "inputs": example.inputs,
                "targets": dataset.config.vocabulary.decode(tokens),
                "references": list(example.references),
                "log_prob": float(log_probs[row]),
            },
            ensure_ascii=False,
        )


class _OutputFile:
    """A JSON lines file to which whole batches are appended.

    A second file holds the identity of the first: a digest of everything that determines its
    content.
    """

    def __init__(self, generation: Generation, identity: str):
        self._path = epath.Path(generation.output)
        self._num_samples = generation.num_samples
        self._file: GrowingFile | None = None
        marker = epath.Path(f"{generation.output}.identity")
        if self._path.exists():
            if not marker.exists() or marker.read_text() != identity:
                raise ValueError(
                    f"Generation.output {generation.output} was written by another generation "
                    "(model, data, method or seed differ). Set Generation.output to a new file, "
                    "or remove the old one."
                )
        elif jax.process_index() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(identity)
            self._path.write_text("")

    def num_done(self) -> int:
        """Counts prompts whose outputs are all written; removes incomplete outputs of a crash."""
        if not self._path.exists():
            return 0
        # Read as bytes: a crash may have cut the last line within a character.
        content = self._path.read_bytes()
        complete = content.split(b"\n")[:-1]
        num_done = len(complete) // self._num_samples
        whole = b"".join(line + b"\n" for line in complete[: num_done * self._num_samples])
        if whole != content and jax.process_index() == 0:
            self._path.write_bytes(whole)
        return num_done

    def append(self, lines: Iterator[str]) -> None:
        if self._file is None:
            self._file = GrowingFile(self._path)
        self._file.append("".join(f"{line}\n" for line in lines).encode("utf-8"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
