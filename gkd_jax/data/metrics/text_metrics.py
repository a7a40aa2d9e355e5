"""BLEU, ROUGE and exact match of generated texts, in percent."""

import importlib
from types import ModuleType

import numpy as np

from gkd_jax.common.array_types import Float
from gkd_jax.data.metrics.score import Score, check_pairs, mean_score, share_score

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def bleu(
    references: list[list[str]],
    predictions: list[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Score]:
    """Computes corpus BLEU with sacrebleu, with a bootstrap standard error.

    Post, "A Call for Clarity in Reporting BLEU Scores" (arXiv 1804.08771). The standard error is
    the standard deviation of corpus BLEU over resampled test sets (Koehn, "Statistical Significance
    Tests for Machine Translation Evaluation", 2004). The test sets are resampled with a fixed seed,
    so that the same outputs always give the same numbers.

    Args:
      references: at least one reference for each example.
      predictions: detokenized outputs.
      tokenize: sacrebleu's tokenizer, e.g. '13a', 'intl', 'zh', 'char'.
      lowercase: whether to ignore case. All results in the papers of T5 and GKD are cased.
      num_bootstrap: number of resampled test sets; 0 omits the standard error.
      seed: seed of the resampling.

    Returns:
      `{'bleu': score}` on the scale 0 to 100, with sacrebleu's signature as its detail.

    Raises:
      ValueError: sacrebleu is not installed, or the lists differ in length.
    """
    check_pairs(references, predictions)
    sacrebleu = _require("sacrebleu.metrics", "BLEU", "sacrebleu")
    metric = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase)
    # sacrebleu takes a list of the first references of all examples, a list of the second, and so
    # on. None stands for a missing reference.
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    value = metric.corpus_score(predictions, streams).score
    error = None
    if num_bootstrap and len(predictions) > 1:
        resampled = resampled_bleu(
            references,
            predictions,
            tokenize=tokenize,
            lowercase=lowercase,
            num_sets=num_bootstrap,
            seed=seed,
        )
        error = float(np.std(resampled, ddof=min(1, num_bootstrap - 1)))
    return {"bleu": Score(value, error, str(metric.get_signature()))}


def resampled_bleu(
    references: list[list[str]],
    predictions: list[str],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    num_sets: int = 200,
    seed: int = 0,
) -> Float[np.ndarray, " num_sets"]:
    """Computes corpus BLEU of bootstrap samples of the test set.

    Koehn, "Statistical Significance Tests for Machine Translation Evaluation" (2004). The samples
    depend only on the seed and the number of sentences, so that all systems get the same samples of
    a test set. For two systems, the standard deviation of the differences between their results is
    the standard error of a paired comparison.

    Args:
      references, predictions, tokenize, lowercase: as in `bleu`.
      num_sets: number of samples.
      seed: seed of the resampling.

    Returns:
      Corpus BLEU of each sample, from 0 to 100.

    Raises:
      ValueError: as in `bleu`.
    """
    check_pairs(references, predictions)
    sacrebleu = _require("sacrebleu.metrics", "BLEU", "sacrebleu")
    # The effective order does not change the counts. It only avoids a warning for each sentence.
    metric = sacrebleu.BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    rows = []
    for texts, prediction in zip(references, predictions, strict=True):
        sentence = metric.sentence_score(prediction, texts)
        rows.append([sentence.sys_len, sentence.ref_len, *sentence.counts, *sentence.totals])
    statistics = np.asarray(rows, np.int64)
    count = len(rows)
    # `draws` holds how often each sample contains each sentence. The sums of the statistics over
    # the sentences of each sample are then one matrix product.
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1.0 / count), size=num_sets
    )
    scores = []
    for sums in (draws @ statistics).tolist():
        order = (len(sums) - 2) // 2
        score = metric.compute_bleu(
            correct=sums[2 : 2 + order],
            total=sums[2 + order :],
            sys_len=sums[0],
            ref_len=sums[1],
        )
        scores.append(score.score)
    return np.asarray(scores)


def rouge(
    references: list[list[str]], predictions: list[str], *, use_stemmer: bool = True
) -> dict[str, Score]:
    """Computes ROUGE-1, -2, -L and -Lsum: mean F-measures over the examples.

    Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), computed by the package
    rouge_score with its stemmer, as in T5 and GKD. ROUGE-Lsum treats each line as a sentence;
    as in T5, ' . ' ends a line. T5 reports the median of bootstrapped means, which differs from
    this mean only by noise.

    Args:
      references: at least one reference for each example. Each type of ROUGE uses the reference
        with the highest score.
      predictions: outputs.
      use_stemmer: whether Porter stems are compared instead of words.

    Returns:
      `{'rouge1': ..., 'rouge2': ..., 'rougeL': ..., 'rougeLsum': ...}` in percent, each with
      the standard error of its mean.

    Raises:
      ValueError: rouge_score is not installed, or the lists differ in length.
    """
    check_pairs(references, predictions)
    rouge_scorer = _require("rouge_score.rouge_scorer", "ROUGE", "rouge_score")
    scorer = rouge_scorer.RougeScorer(list(_ROUGE_TYPES), use_stemmer=use_stemmer)
    measures: dict[str, list[float]] = {name: [] for name in _ROUGE_TYPES}
    for texts, prediction in zip(references, predictions, strict=True):
        scores = scorer.score_multi(
            [_split_lines(text) for text in texts], _split_lines(prediction)
        )
        for name in _ROUGE_TYPES:
            measures[name].append(scores[name].fmeasure)
    detail = f"F-measure, {'stemmed' if use_stemmer else 'not stemmed'}"
    return {name: mean_score(values, detail=detail) for name, values in measures.items()}


def exact_match(
    references: list[list[str]], predictions: list[str], *, ignore_case: bool = False
) -> dict[str, Score]:
    """Computes the share of predictions that equal one of their references, apart from white space.

    Args:
      references: at least one reference for each example.
      predictions: outputs.
      ignore_case: whether case-folded texts are compared.

    Returns:
      `{'exact_match': score}` in percent with its binomial standard error.

    Raises:
      ValueError: the lists differ in length.
    """
    check_pairs(references, predictions)

    def normalise(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    num_right = sum(
        normalise(prediction) in {normalise(text) for text in texts}
        for texts, prediction in zip(references, predictions, strict=True)
    )
    return {"exact_match": share_score(num_right, len(predictions))}


def _split_lines(text: str) -> str:
    return text.replace(" . ", " .\n")


def _require(module: str, metric: str, package: str) -> ModuleType:
    """Imports an optional module; the error says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the metric {metric} needs the package {package}, which is not installed "
            f"({error}). Install it with: pip install 'gkd_jax[text]'"
        ) from error
