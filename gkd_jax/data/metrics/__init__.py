"""Metrics of generated texts: functions that take references and predictions and return scores."""

from gkd_jax.data.metrics.gsm8k import apply_calculator, gsm8k_accuracy, parse_answer
from gkd_jax.data.metrics.score import MetricFn, Score
from gkd_jax.data.metrics.text_metrics import bleu, exact_match, rouge

__all__ = [
    "MetricFn",
    "Score",
    "apply_calculator",
    "bleu",
    "exact_match",
    "gsm8k_accuracy",
    "parse_answer",
    "rouge",
]
