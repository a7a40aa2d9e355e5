"""Compares the runs of a study pair by pair: on the same sentences, and by the teacher.

    python examples/multi30k/compare.py --gin_file=examples/multi30k/study.gin

Needs the finished study. Prints for every run

- its BLEU on the test set minus that of SFT continued with the same seed, with the standard error
  of the difference (sentences resampled in pairs: Koehn, 2004), and the mean over seeds;
- JSD(0.1) between teacher and student, a sequence, on the validation set's outputs and on the
  student's own samples: what on-policy GKD trains, for every run alike.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import sacrebleu.metrics
from absl import app, flags
from etils import epath

from gkd_jax import experiment, gin_utils, prepare, runtime, study, teachers
from gkd_jax.evaluate import Evaluator
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.objective import Objective

_GIN_FILE = flags.DEFINE_multi_string("gin_file", None, "The study's gin files.", required=True)
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "As given to the study.")
_BASELINE = flags.DEFINE_string("baseline", "sft_continued", "The cell that others are held to.")

NUM_RESAMPLED = 1000


def sentence_statistics(folder: epath.Path) -> np.ndarray:
    """Lengths and n-gram counts of each sentence of a test: sums of them give corpus BLEU."""
    (path,) = folder.glob("predictions_*.jsonl")
    metric = sacrebleu.metrics.BLEU(effective_order=True)
    rows = []
    for line in path.read_text().splitlines():
        example = json.loads(line)
        score = metric.sentence_score(example["prediction"], example["references"])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows)


def corpus_bleu(sums: Sequence[int]) -> float:
    """BLEU of the sums of such rows."""
    order = (len(sums) - 2) // 2
    return sacrebleu.metrics.BLEU.compute_bleu(
        correct=sums[2 : 2 + order], total=sums[2 + order :], sys_len=sums[0], ref_len=sums[1]
    ).score


def resampled_bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU of the set itself, then of sets resampled alike for every run."""
    count = len(statistics)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), NUM_RESAMPLED)
    draws = np.concatenate([np.ones((1, count), draws.dtype), draws])
    return np.array([corpus_bleu(sums) for sums in (draws @ statistics).tolist()])


def print_differences(plan: study.Study) -> None:
    """BLEU minus the baseline's, by seed and in the mean."""
    scores = {
        (cell.name, seed): resampled_bleu(
            sentence_statistics(epath.Path(plan.cell_dir(cell.name, seed)) / "test")
        )
        for cell in plan.cells
        for seed in plan.seeds
    }
    print(f"| run | seed | BLEU | minus {_BASELINE.value} | standard error |")
    print("|---|---|---|---|---|")
    for cell in plan.cells:
        of_seeds = [(scores[cell.name, seed], scores[_BASELINE.value, seed]) for seed in plan.seeds]
        mean = tuple(np.mean(side, axis=0) for side in zip(*of_seeds, strict=True))
        for seed, (own, base) in zip([*plan.seeds, "mean"], [*of_seeds, mean], strict=True):
            difference = own - base
            error = np.std(difference[1:], ddof=1)
            print(f"| {cell.name} | {seed} | {own[0]:.2f} | {difference[0]:+.2f} | {error:.2f} |")


def jsd_evaluation(cell: experiment.Experiment, teacher: teachers.Teacher):
    """The cell's validation with JSD(0.1) to the teacher as the objective, on all examples."""
    return dataclasses.replace(
        cell,
        teacher=teacher,
        objective=Objective(GeneralizedJSD(beta=0.1)),
        evaluation=dataclasses.replace(cell.evaluation, num_divergence_examples=1 << 30),
    )


def print_divergences(plan: study.Study) -> None:
    """JSD(0.1) to the teacher of every run's last checkpoint."""
    (teacher,) = {cell.experiment.teacher for cell in plan.cells} - {None}
    print("| run | seed | JSD(0.1) on data | on own samples |")
    print("|---|---|---|---|")
    for cell in plan.cells:
        for seed in plan.seeds:
            run = jsd_evaluation(plan.experiment_of(cell, seed=seed), teacher)
            data = prepare.prepare(run, run_mode="eval").eval_data
            student = runtime.student_to_use(run)
            evaluator = Evaluator(run, data, folder="compare")
            values = evaluator(
                student.params, runtime.load_teacher(run), step=student.step
            ).values()
            print(
                f"| {cell.name} | {seed} | {values['on_data/loss']:.4f} "
                f"| {values['on_samples/loss']:.4f} |"
            )


def main(argv: Sequence[str]) -> None:
    """Prints both tables."""
    del argv
    config = gin_utils.parse(
        roots=(study.Study,), gin_files=_GIN_FILE.value, bindings=_BINDINGS.value
    )
    plan = config.build()
    print_differences(plan)
    print()
    print_divergences(plan)


if __name__ == "__main__":
    app.run(main)
