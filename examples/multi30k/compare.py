"""Compares the runs of a study: paired differences in BLEU, and divergences from the teacher.

    python examples/multi30k/compare.py --gin_file=examples/multi30k/study.gin

The study must be finished. For every run the script prints

- the difference in BLEU on the test set from SFT continued with the same seed, its standard error
  (paired bootstrap: Statistical Significance Tests for Machine Translation Evaluation, Koehn 2004),
  and the mean over seeds;
- JSD(0.1) between teacher and student, per sequence, on the validation set's outputs and on the
  student's own samples: the objective of on-policy GKD, for every run.
"""

import argparse
import dataclasses
import json

import numpy as np
from etils import epath

from gkd_jax import experiment
from gkd_jax.data.metrics import text_metrics
from gkd_jax.distillation import teachers
from gkd_jax.experiment import prepare
from gkd_jax.experiment.gin_files import configuration
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.objective import Objective
from gkd_jax.run_modes import study
from gkd_jax.run_modes.evaluate import Evaluator
from gkd_jax.training import parameters

NUM_RESAMPLED = 1000


def bleu_and_resampled(folder: epath.Path) -> np.ndarray:
    """Computes BLEU of a test's outputs, then of resampled sets, the same for every run."""
    (path,) = folder.glob("predictions_*.jsonl")
    examples = [json.loads(line) for line in path.read_text().splitlines()]
    texts = (
        [example["references"] for example in examples],
        [example["prediction"] for example in examples],
    )
    score = text_metrics.bleu(*texts, num_bootstrap=0)["bleu"].value
    return np.append(score, text_metrics.resampled_bleu(*texts, num_sets=NUM_RESAMPLED))


def print_differences(plan: study.Study, baseline: str) -> None:
    """Prints the difference in BLEU from the cell `baseline`, per seed and averaged."""
    print(f"| run | seed | BLEU | minus {baseline} | standard error |")
    print("|---|---|---|---|---|")
    scores = {
        cell.name: [
            bleu_and_resampled(epath.Path(plan.cell_dir(cell.name, seed)) / "test")
            for seed in plan.seeds
        ]
        for cell in plan.cells
    }
    for of_seeds in scores.values():
        of_seeds.append(np.mean(of_seeds, axis=0))
    for name, of_seeds in scores.items():
        rows = zip([*plan.seeds, "mean"], of_seeds, scores[baseline], strict=True)
        for seed, own, base in rows:
            difference = own - base
            error = np.std(difference[1:], ddof=1)
            print(f"| {name} | {seed} | {own[0]:.2f} | {difference[0]:+.2f} | {error:.2f} |")


def jsd_evaluation(cell: experiment.Experiment, teacher: teachers.Teacher):
    """Returns an evaluation of JSD(0.1) to the teacher on all validation examples of a cell."""
    return dataclasses.replace(
        cell,
        teacher=teacher,
        objective=Objective(GeneralizedJSD(beta=0.1)),
        evaluation=dataclasses.replace(cell.evaluation, num_divergence_examples=1 << 30),
    )


def print_divergences(plan: study.Study) -> None:
    """Prints JSD(0.1) between the teacher and the last checkpoint of every run."""
    (teacher,) = {cell.experiment.teacher for cell in plan.cells} - {None}
    print("| run | seed | JSD(0.1) on data | on own samples |")
    print("|---|---|---|---|")
    for cell in plan.cells:
        for seed in plan.seeds:
            run = jsd_evaluation(plan.experiment_of(cell, seed=seed), teacher)
            data = prepare.prepare(run, run_mode="eval").eval_data
            student = parameters.student_to_use(run)
            evaluator = Evaluator(run, data, folder="compare")
            values = evaluator(
                student.params, parameters.load_teacher(run), step=student.step
            ).values()
            print(
                f"| {cell.name} | {seed} | {values['on_data/loss']:.4f} "
                f"| {values['on_samples/loss']:.4f} |"
            )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gin_file", action="append", required=True, help="the study's gin files")
    parser.add_argument(
        "--gin_bindings", action="append", default=[], help="bindings that the study was run with"
    )
    parser.add_argument(
        "--baseline", default="sft_continued", help="the run that others are compared with"
    )
    flags = parser.parse_args()
    plan = configuration.parse(
        roots=(study.Study,), gin_files=flags.gin_file, bindings=flags.gin_bindings
    ).build()
    print_differences(plan, flags.baseline)
    print()
    print_divergences(plan)


if __name__ == "__main__":
    main()
