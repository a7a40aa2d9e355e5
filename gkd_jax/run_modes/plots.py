"""Plots of learning curves, from the metrics files of runs."""

import json
from collections.abc import Mapping

from absl import logging
from etils import epath


def read_curve(model_dir: str, metric: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric in metrics.jsonl; empty lists if there are none."""
    path = epath.Path(model_dir) / "metrics.jsonl"
    if not path.exists():
        return [], []
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(runs: Mapping[str, str], *, metric: str, path: str) -> None:
    """Plots a metric and the training loss of several runs.

    If Matplotlib is missing, logs how to install it and writes no file.

    Args:
      runs: `model_dir` of each run, by the run's name in the legend.
      metric: name of the metric in metrics.jsonl.
      path: PNG file to write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no picture: Matplotlib is missing. pip install 'gkd_jax[plot]'")
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    score_axes, loss_axes = figure.subplots(1, 2)
    for name, model_dir in runs.items():
        steps, values = read_curve(model_dir, metric)
        if steps:
            score_axes.plot(steps, values, marker="o", markersize=3, label=name)
        for group, style in (("data", "-"), ("on_policy", "--"), ("mixed", ":")):
            steps, values = read_curve(model_dir, f"train/{group}/loss")
            if steps:
                loss_axes.plot(steps, values, style, label=f"{name} ({group})")
    score_axes.set(xlabel="step", ylabel=metric)
    loss_axes.set(xlabel="step", ylabel="training loss", yscale="log")
    for axes in (score_axes, loss_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
