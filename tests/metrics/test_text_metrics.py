import logging
import sys

import numpy as np
import pytest
import sacrebleu.metrics
from rouge_score import rouge_scorer

from gkd_jax.data.metrics.text_metrics import bleu, exact_match, resampled_bleu, rouge

_REFERENCES = [
    ["the cat sat on a mat ."],
    ["A man in an orange hat starring at something ."],
    ["Two dogs play in the snow ."],
    ["Five people wearing winter jackets and helmets stand in the snow ."],
    ["People are fixing the roof of a house ."],
    ["A man in light colored clothing photographs a group of men ."],
]
_PREDICTIONS = [
    "the cat sat on the mat .",
    "A man in an orange hat looks at something .",
    "Two dogs are playing in the snow .",
    "Five people in winter jackets and helmets stand in the snow .",
    "People repair the roof of a house .",
    "A man in bright clothes photographs a group of men .",
]


def test_bleu_of_a_sentence_counted_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples; no brevity penalty.
    score = bleu([["the cat sat on a mat"]], ["the cat sat on the mat"])["bleu"]
    assert score.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert score.standard_error is None


def test_bleu_is_sacrebleus_corpus_bleu_with_its_signature():
    score = bleu(_REFERENCES, _PREDICTIONS)["bleu"]
    metric = sacrebleu.metrics.BLEU()
    expected = metric.corpus_score(_PREDICTIONS, [[texts[0] for texts in _REFERENCES]])
    assert score.value == expected.score
    assert score.detail.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_is_cased():
    score = bleu([["The House Is Small And Old"]], ["the house is small and old"])["bleu"]
    assert score.value == 0.0
    lowercased = bleu(
        [["The House Is Small And Old"]], ["the house is small and old"], lowercase=True
    )["bleu"]
    assert lowercased.value == pytest.approx(100.0)
    assert "case:lc" in lowercased.detail


def test_bleu_takes_several_references_also_where_their_number_differs():
    references = [["a b c d e", "v w x y z"], ["k l m n o"]]
    assert bleu(references, ["v w x y z", "k l m n o"])["bleu"].value == pytest.approx(100.0)
    assert bleu([["a b c d e"], ["k l m n o"]], ["v w x y z", "k l m n o"])["bleu"].value < 60


def test_bleu_standard_error_is_that_of_resampled_corpora():
    score = bleu(_REFERENCES, _PREDICTIONS, num_bootstrap=50, seed=3)["bleu"]
    count = len(_PREDICTIONS)
    draws = np.random.default_rng(3).multinomial(count, np.full(count, 1 / count), size=50)
    values = []
    for draw in draws:
        rows = np.repeat(np.arange(count), draw)
        predictions = [_PREDICTIONS[row] for row in rows]
        streams = [[_REFERENCES[row][0] for row in rows]]
        values.append(sacrebleu.metrics.BLEU().corpus_score(predictions, streams).score)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1), rel=1e-9)


def test_bleu_standard_error_is_the_same_each_time():
    first = bleu(_REFERENCES, _PREDICTIONS)["bleu"]
    assert first.standard_error is not None
    assert first.standard_error > 0
    assert bleu(_REFERENCES, _PREDICTIONS)["bleu"] == first
    assert bleu(_REFERENCES, _PREDICTIONS, num_bootstrap=0)["bleu"].standard_error is None


def test_bleu_logs_no_warning_for_each_sentence(caplog):
    with caplog.at_level(logging.WARNING):
        bleu(_REFERENCES, _PREDICTIONS, num_bootstrap=2)
    assert caplog.records == []


def test_rouge_counted_by_hand():
    scores = rouge([["the cat sat on the mat"]], ["the cat sat"])
    assert scores["rouge1"].value == pytest.approx(100 * 2 / 3)  # P = 1, R = 3/6
    assert scores["rouge2"].value == pytest.approx(100 * 4 / 7)  # P = 1, R = 2/5
    assert scores["rougeL"].value == pytest.approx(100 * 2 / 3)
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_rouge_stems():
    assert rouge([["dogs playing"]], ["dog plays"])["rouge1"].value == pytest.approx(100.0)
    plain = rouge([["dogs playing"]], ["dog plays"], use_stemmer=False)["rouge1"]
    assert plain.value == 0.0


def test_rouge_is_the_mean_of_rouge_scores():
    scores = rouge(_REFERENCES, _PREDICTIONS)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        values = [
            scorer.score(texts[0], prediction)[name].fmeasure
            for texts, prediction in zip(_REFERENCES, _PREDICTIONS, strict=True)
        ]
        assert scores[name].value == pytest.approx(100 * np.mean(values))
        error = 100 * np.std(values, ddof=1) / np.sqrt(len(values))
        assert scores[name].standard_error == pytest.approx(error)


def test_rouge_takes_the_best_reference():
    references = [["nothing alike", "the cat sat"]]
    assert rouge(references, ["the cat sat"])["rougeL"].value == pytest.approx(100.0)


def test_rouge_lsum_compares_sentence_by_sentence():
    scores = rouge([["a b c . d e f"]], ["d e f . a b c"])
    assert scores["rougeLsum"].value == pytest.approx(100.0)
    assert scores["rougeL"].value == pytest.approx(50.0)


def test_exact_match_ignores_white_space_and_takes_any_reference():
    references = [["yes"], ["no", " a  b "], ["Yes"], ["x"]]
    score = exact_match(references, [" yes\n", "a b", "yes", "y"])["exact_match"]
    assert score.value == 50.0
    assert score.standard_error == pytest.approx(25.0)
    folded = exact_match(references, [" yes\n", "a b", "yes", "y"], ignore_case=True)
    assert folded["exact_match"].value == 75.0


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [(bleu, "sacrebleu.metrics", "sacrebleu"), (rouge, "rouge_score.rouge_scorer", "rouge_score")],
)
def test_a_missing_package_is_named_with_its_remedy(metric, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*gkd_jax\[text\]"):
        metric([["a"]], ["a"])
    assert exact_match([["a"]], ["a"])["exact_match"].value == 100.0


def test_resampled_bleu_is_that_of_the_sentences_drawn():
    words = [
        "a",
        "man",
        "and",
        "the",
        "dog",
        "walk",
        "on",
        "some",
        "green",
        "grass",
        "near",
        "a",
        "red",
        "house",
    ]
    generator = np.random.default_rng(0)
    references = [[" ".join(generator.choice(words, 9))] for _ in range(12)]
    # Some words of each reference changed.
    predictions = [texts[0].replace("dog", "cat").replace("green", "blue") for texts in references]
    got = resampled_bleu(references, predictions, num_sets=3, seed=5)
    draws = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=3)
    for value, counts in zip(got, draws, strict=True):
        drawn = np.repeat(np.arange(12), counts)
        expected = sacrebleu.metrics.BLEU().corpus_score(
            [predictions[i] for i in drawn], [[references[i][0] for i in drawn]]
        )
        assert value == pytest.approx(expected.score, abs=1e-9)


def test_two_systems_are_resampled_alike():
    """A paired comparison: what is the same for both cancels."""
    references = [[f"this is sentence number {i} of the set"] for i in range(30)]
    predictions = [texts[0] if i % 2 else "this is one" for i, texts in enumerate(references)]
    first = resampled_bleu(references, predictions, num_sets=20)
    assert np.std(first) > 1
    np.testing.assert_array_equal(first, resampled_bleu(references, predictions, num_sets=20))
