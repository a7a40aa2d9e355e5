import collections

import pytest

from gkd_jax.data.mixtures import Mixture, Templated
from gkd_jax.data.sources import InMemory


def _numbered(name, count):
    return InMemory([{"id": f"{name}{number}"} for number in range(count)])


def _ids(source):
    return [source[index]["id"] for index in range(len(source))]


def test_without_weights_each_example_occurs_once():
    mixture = Mixture((_numbered("a", 3), _numbered("b", 2))).open()
    assert _ids(mixture) == ["a0", "a1", "a2", "b0", "b1"]
    with pytest.raises(IndexError):
        mixture[5]


def test_weights_divide_the_examples():
    sources = (_numbered("a", 3), _numbered("b", 8), _numbered("c", 100))
    mixture = Mixture(sources, weights=(5, 3, 1), num_examples=10).open()
    ids = _ids(mixture)
    assert collections.Counter(name[0] for name in ids) == {"a": 6, "b": 3, "c": 1}
    assert ids[:6] == ["a0", "a1", "a2", "a0", "a1", "a2"]  # Too short a source starts again.


def test_rate_maximum_is_examples_proportional_mixing():
    sources = (_numbered("a", 10), _numbered("b", 20), _numbered("c", 400))
    mixture = Mixture(sources, rate_maximum=20, max_examples=50).open()
    # Rates 10 : 20 : 20 of the 10 + 20 + 50 examples.
    counts = collections.Counter(name[0] for name in _ids(mixture))
    assert counts == {"a": 16, "b": 32, "c": 32}


def test_max_examples_limits_each_source():
    mixture = Mixture((_numbered("a", 3), _numbered("b", 9)), max_examples=4).open()
    assert _ids(mixture) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]


def test_fingerprints_follow_sources_and_proportions():
    sources = (_numbered("a", 3), _numbered("b", 9))
    fingerprints = {
        mixture.open().fingerprint
        for mixture in (
            Mixture(sources),
            Mixture(sources, max_examples=4),
            Mixture(sources, weights=(1, 2)),
            Mixture((_numbered("a", 3), _numbered("c", 9))),
        )
    }
    assert len(fingerprints) == 4
    assert Mixture(sources).open().fingerprint in fingerprints


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"weights": (1.0,)}, "weights must hold one positive number for each of the 2"),
        ({"weights": (1.0, 0.0)}, "weights must hold one positive number"),
        ({"weights": (1, 1), "rate_maximum": 5}, "exclude each other"),
        ({"num_examples": 5}, "num_examples wants weights or a rate_maximum"),
        ({"max_examples": 0}, "max_examples must be at least 1 or None; got 0"),
    ],
)
def test_mixture_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"sources": (_numbered("a", 3), _numbered("b", 9)), **settings})


def test_templates_word_examples():
    data = InMemory(
        [
            {"premise": "It {rains}.", "choice1": "wet", "choice2": "dry", "label": 0},
            {"premise": "It\\nshines.", "choice1": "wet", "choice2": "dry", "label": 1},
        ]
    )
    source = Templated(
        data,
        inputs="{premise} So?",
        targets="{label}",
        labels={"label": ("{choice1}", "{choice2}")},
        unescape_newlines=True,
    ).open()
    assert source[0] == {"inputs": "It {rains}. So?", "targets": "wet"}
    assert source[1] == {"inputs": "It\nshines. So?", "targets": "dry"}
    assert len(source) == 2
    plain = Templated(data, "{premise}", "{label}").open()
    assert plain[1] == {"inputs": "It\\nshines.", "targets": "1"}
    assert plain.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ("{question}", {}, "names the field 'question', which example 0 lacks.*'text', 'label'"),
        ("{text}", {"label": ("no", "yes")}, r"labels\['label'\] must name every class; got 2.*-1"),
        ("{text}", {"class": ("no", "yes")}, "names the field 'class'"),
    ],
)
def test_a_wrong_template_is_found_at_once(inputs, labels, message):
    source = Templated(InMemory([{"text": "x", "label": -1}]), inputs, "{label}", labels)
    with pytest.raises(ValueError, match=message):
        source.open()
