"""Scores the stories of each student by the teacher: prints a table and five stories of each.

    python examples/stories/compare.py --runs=runs/stories --teacher=runs/stories/teacher

The teacher and every student continue the openings of the validation set at temperature 1, with the
same random numbers. The perplexity of the sampled tokens is computed by the teacher. Divergences
between student and teacher at these tokens are in nats per token. Standard errors are over stories.
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np

from gkd_jax.checkpoints import hf, load
from gkd_jax.common.batch import Batch
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.data.pipeline import Dataset, DatasetConfig
from gkd_jax.data.recipes import instruction
from gkd_jax.data.sources import JsonLines
from gkd_jax.distillation.loss import make_loss_fn
from gkd_jax.distillation.rollout import Rollout, sample_outputs
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.objectives.divergences import ForwardKL, NegativeLogLikelihood, ReverseKL
from gkd_jax.objectives.objective import Objective

RUNS = ("sft", "sft_continued", "supervised_kd", "on_policy_gkd")
NUM_PRINTED = 5
# Must match examples/stories/task.gin.
STUDENT = DecoderOnly(
    DecoderConfig(
        vocab_size=32000, emb_dim=96, num_heads=6, num_kv_heads=6, head_dim=16, mlp_dim=256,
        layer_kinds=("full",) * 3, tie_embeddings=True, norm_epsilon=1e-5, dtype="float32",
    )
)  # fmt: skip


def batches(flags: argparse.Namespace) -> list[Batch]:
    """Returns batches of the openings of the validation set."""
    lines = JsonLines(str(flags.runs / "data" / "validation.jsonl"))
    config = DatasetConfig(
        task=instruction(train=lines, validation=lines), split="validation",
        feature_lengths={"inputs": 24, "targets": 96}, batch_size=64,
        vocabulary=HFTokenizer(flags.teacher), inputs_eos=False, inputs_bos=True, shuffle=False,
    )  # fmt: skip
    return [batch for batch, _ in Dataset(config).eval_batches()]


def mean(values: list[np.ndarray], weights: list[np.ndarray]) -> tuple[float, float]:
    """Returns the mean over all tokens and its standard error over stories (ratio of two means)."""
    sums = np.concatenate([(v * w).sum(1) for v, w in zip(values, weights, strict=True)])
    counts = np.concatenate([w.sum(1) for w in weights])
    ratio = sums.sum() / counts.sum()
    error = np.sqrt(np.sum((sums - ratio * counts) ** 2)) / counts.sum()
    return float(ratio), float(error)


def measure(model, params, teacher, teacher_params, prompts, vocabulary):
    """Samples and scores stories; returns a row of the table and the first stories."""

    @jax.jit
    def write(params, batch, key):
        return sample_outputs(
            model, params, batch, key=key, rollout=Rollout(), eos_ids=vocabulary.eos_ids,
            pad_id=vocabulary.pad_id,
        )  # fmt: skip

    def per_token(student, divergence, judge):
        loss_fn = make_loss_fn(student, judge, Objective(divergence))
        return jax.jit(lambda p, t, b: loss_fn(p, t, b, b.loss_weights, None)[1])

    likelihood = per_token(teacher, NegativeLogLikelihood(), None)
    divergences = [per_token(model, one, teacher) for one in (ForwardKL(), ReverseKL())]
    columns, weights, stories = ([], [], []), [], []
    for batch in prompts:
        written = write(params, batch, jax.random.key(0))
        written = dataclasses.replace(written, sample_log_probs=None)
        weights.append(np.asarray(written.loss_weights))
        columns[0].append(np.asarray(likelihood(teacher_params, None, written)))
        for column, function in zip(columns[1:], divergences, strict=True):
            column.append(np.asarray(function(params, teacher_params, written)))
        for row in range(len(written.targets)):
            opening, rest = (
                vocabulary.decode(np.asarray(ids)[mask > 0][start:].tolist())
                for ids, mask, start in (
                    (written.inputs[row], np.asarray(written.inputs_mask[row]), 1),
                    (written.targets[row], weights[-1][row], 0),
                )
            )
            stories.append(f"**{opening}** {rest}")
    nll, error = mean(columns[0], weights)
    cells = [f"{np.exp(nll):.2f} ({np.exp(nll) * error:.2f})"]
    cells += [
        f"{value:.3f} ({error:.3f})" for value, error in (mean(c, weights) for c in columns[1:])
    ]
    lengths = np.concatenate([w.sum(1) for w in weights])
    return [*cells, f"{lengths.mean():.1f}"], stories[:NUM_PRINTED]


def main() -> None:
    """Prints the table and the stories."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=pathlib.Path, required=True, help="parent folder of the runs"
    )
    parser.add_argument("--teacher", required=True, help="converted checkpoint of the teacher")
    flags = parser.parse_args()
    teacher = hf.hf_model(flags.teacher, dtype="float32")
    teacher_params = load.load_params(flags.teacher, teacher.abstract_params())
    vocabulary, prompts = HFTokenizer(flags.teacher), batches(flags)
    rows, told = [], []
    for name in ("teacher", *(run for run in RUNS if (flags.runs / run).exists())):
        if name == "teacher":
            model, params = teacher, teacher_params
        else:
            model = STUDENT
            params = load.load_params(flags.runs / name, model.abstract_params())
        cells, stories = measure(model, params, teacher, teacher_params, prompts, vocabulary)
        rows.append(f"| {name} | {' | '.join(cells)} |")
        told.append(f"### {name}\n\n" + "\n\n".join(" ".join(story.split()) for story in stories))
    print("| model | teacher's perplexity | forward KL | reverse KL | tokens |")
    print("|---|---|---|---|---|")
    print("\n".join(rows) + "\n")
    print("\n\n".join(told))


if __name__ == "__main__":
    main()
