"""Stores of a teacher's distributions: written once, resumed, read back, trained from."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small_runs

from gkd_jax.data.pipeline import Dataset
from gkd_jax.data.teacher_store import StoreReader, StoreWriter
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.stored_distributions import Draws, Full, TopK
from gkd_jax.distillation.teachers import StoredTeacher
from gkd_jax.experiment import Evaluation, Generation, Storing, Student, prepare
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.objectives import (
    ForwardKL,
    GeneralizedJSD,
    NegativeLogLikelihood,
    Objective,
    WeightedSum,
)
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes import evaluate, generate, store_teacher, train
from gkd_jax.sampling.teacher_assisted import TeacherMixed
from gkd_jax.training import parameters

SPARSIFICATIONS = {"full": Full(), "top_k": TopK(5), "draws": Draws(20)}
ENTRY_BYTES = 24  # Of an example in the index.
NUM_EXAMPLES = 10  # Not a multiple of the batch size.
TEMPERATURE = 0.8
OBJECTIVE = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=TEMPERATURE)
TO_DRAWS = Objective(
    WeightedSum((ForwardKL(), NegativeLogLikelihood()), (1.0, 0.5)), teacher_temperature=TEMPERATURE
)


def experiment_of(folder: pathlib.Path, teacher, sparsification=None, **changes):
    """A run on ten examples, and a store of them beside it."""
    data = small_runs.data(num_examples=NUM_EXAMPLES)
    defaults = dict(
        objective=OBJECTIVE,
        outputs=OutputMix(0.0),
        train_data=data,
        student=Student(small_runs.model()),
        evaluation=None,
        num_steps=4,
        log_period=1,
        storing=Storing(data, str(folder / "store"), sparsification or TopK(5)),
    )
    return small_runs.gkd(folder / "run", teacher, **defaults | changes)


def from_store(experiment, path, **changes):
    return dataclasses.replace(experiment, teacher=StoredTeacher(str(path)), **changes)


@pytest.fixture(scope="module")
def stores(tiny_teacher, tmp_path_factory):
    """A store of each sparsification, that nothing interrupted."""
    paths = {}
    for name, sparsification in SPARSIFICATIONS.items():
        folder = tmp_path_factory.mktemp(name)
        said = store_teacher.store_teacher(experiment_of(folder, tiny_teacher, sparsification))
        assert said.startswith(f"{folder / 'store'}: ")
        assert "float32 of the whole vocabulary: 1,036" in said
        paths[name] = folder / "store"
    return paths


@pytest.fixture(scope="module")
def teacher_log_probs(tiny_teacher, tmp_path_factory):
    """log p of every output token of every example, by the network itself; and the outputs."""
    experiment = experiment_of(tmp_path_factory.mktemp("log_probs"), tiny_teacher)
    model, params = experiment.teacher_model, parameters.load_teacher(experiment)

    @jax.jit
    def log_probs(batch):
        logits = model.unembed(model.head(params), model.hidden_states(params, batch))
        return jax.nn.log_softmax(logits / TEMPERATURE)

    found = {}
    for batch, examples in Dataset(experiment.train_data).eval_batches():
        for row, example in enumerate(examples.tolist()):
            if example >= 0:
                length = int(batch.loss_weights[row].sum())
                found[example] = (
                    np.asarray(log_probs(batch))[row, :length],
                    batch.targets[row, :length],
                )
    assert len(found) == NUM_EXAMPLES
    return found


def read(path, examples):
    rows = Dataset(small_runs.data())._rows.read(np.asarray(examples))
    return StoreReader(path).read(np.asarray(examples), rows.tokens(), target_length=24)


def test_what_is_stored_is_what_the_teacher_says(stores, teacher_log_probs):
    """Of each example by its number: the whole, the best with their tail, counts of draws."""
    for example, (log_p, targets) in teacher_log_probs.items():
        length = len(targets)
        full = read(stores["full"], [example, -1])
        np.testing.assert_allclose(full.log_probs[0, :length], log_p, atol=2e-6)

        best = read(stores["top_k"], [example])
        assert best.ids.shape == (1, 24, 6)
        for t in range(length):
            ids, p = best.ids[0, t], np.exp(log_p[t].astype(np.float64))
            assert targets[t] in ids
            assert set(np.argsort(-p)[:5]) <= set(ids)
            assert len(set(ids)) == 6
            np.testing.assert_allclose(np.exp(best.log_probs[0, t]), p[ids], rtol=1e-2)
            np.testing.assert_allclose(np.exp(best.tail[0, t]), 1 - p[ids].sum(), rtol=1e-2)
        assert np.all(best.ids[0, length:] == -1)

        drawn = read(stores["draws"], [example])
        assert np.all(np.any(drawn.ids[0, :length] == targets[:, None], axis=-1))
        counts = np.exp(drawn.log_probs[0, :length]) * 20
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
        np.testing.assert_allclose(counts.sum(-1), 20, rtol=1e-5)
        assert np.all(np.isneginf(drawn.tail[0, :length]))


def test_draws_follow_the_teacher(stores, teacher_log_probs):
    """Over all tokens: the share of draws on each token's likeliest entry is its probability."""
    share, wanted, variance = [], [], []
    for example, (log_p, targets) in teacher_log_probs.items():
        drawn = read(stores["draws"], [example])
        best = np.argmax(log_p, axis=-1)
        is_best = drawn.ids[0, : len(targets)] == best[:, None]
        share += np.where(is_best, np.exp(drawn.log_probs[0, : len(targets)]), 0).sum(-1).tolist()
        p = np.exp(log_p[np.arange(len(targets)), best].astype(np.float64))
        wanted += p.tolist()
        variance += (p * (1 - p) / 20).tolist()
    z = (np.sum(share) - np.sum(wanted)) / np.sqrt(np.sum(variance))
    assert abs(z) < 3.5


def test_bytes_a_token(stores):
    """Two bytes an id (259 of them), two a float16, four a float32, one a count."""
    num_tokens = StoreReader(stores["full"]).num_tokens
    index = ENTRY_BYTES * NUM_EXAMPLES
    sizes = {name: StoreReader(path).num_bytes - index for name, path in stores.items()}
    assert sizes["full"] == num_tokens * 259 * 4
    assert sizes["top_k"] == num_tokens * (6 * 2 + 7 * 2)
    assert sizes["draws"] < num_tokens * (2 + 21 * 3)
    for path in stores.values():
        size = sum((path / name).stat().st_size for name in ("distributions.bin", "index.bin"))
        assert size == StoreReader(path).num_bytes


@pytest.mark.parametrize("name", SPARSIFICATIONS)
@pytest.mark.parametrize("cut", ["nothing written", "within an example", "within the index"])
def test_a_stopped_store_is_completed_to_the_same(name, cut, stores, tiny_teacher, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(stores[name], path)
    whole = {child.name: child.read_bytes() for child in path.iterdir()}
    data, index = path / "distributions.bin", path / "index.bin"
    if cut == "nothing written":
        data.unlink()
        index.unlink()
    elif cut == "within an example":
        data.write_bytes(whole[data.name][: len(whole[data.name]) // 2])
    else:
        index.write_bytes(whole[index.name][: ENTRY_BYTES * 7 + 3])
    if cut != "nothing written":
        with pytest.raises(ValueError, match=r"is not complete: it has \d+ of 10 examples"):
            StoreReader(path)
    store_teacher.store_teacher(experiment_of(tmp_path, tiny_teacher, SPARSIFICATIONS[name]))
    assert {child.name: child.read_bytes() for child in path.iterdir()} == whole


def test_another_store_refuses_the_old_folder(stores, tiny_teacher, tmp_path):
    shutil.copytree(stores["top_k"], tmp_path / "store")
    for changes, differing in (
        ({"sparsification": TopK(6)}, r"support: TopK\(k=5.* before, TopK\(k=6.* now"),
        ({"objective": Objective(ForwardKL())}, r"temperature: 0\.8 before, 1\.0 now"),
    ):
        with pytest.raises(ValueError, match=f"holds a store of something else .*{differing}"):
            store_teacher.store_teacher(experiment_of(tmp_path, tiny_teacher, **changes))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is a folder of other files"):
        StoreWriter(tmp_path / "other", {})


def test_a_damaged_store_is_noticed(stores, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(stores["top_k"], path)
    content = bytearray((path / "distributions.bin").read_bytes())
    content[5] ^= 1
    (path / "distributions.bin").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: the bytes of example 0"):
        read(path, [0])
    read(path, [1])


def test_other_tokens_than_those_of_the_store_are_noticed(stores):
    """Of a prompt or of an output, where the data pass for the same."""
    store, rows = StoreReader(stores["top_k"]), Dataset(small_runs.data())._rows
    for feature in ("inputs", "targets"):
        changed = rows.read(np.array([3]))
        getattr(changed, feature)[0, 2] += 1
        with pytest.raises(ValueError, match="of another prompt or output of example 3"):
            store.read(np.array([3]), changed.tokens(), target_length=24)


def steps_of(experiment):
    """Losses by step, and the parameters after the last."""
    state = train.train(experiment).state
    rows = small_runs.metrics(pathlib.Path(experiment.model_dir))
    losses = [row["train/data/loss"] for row in rows if "train/data/loss" in row]
    assert len(losses) == experiment.num_steps
    return np.array(losses), jax.device_get(state.params)


@pytest.mark.slow
def test_training_from_a_full_store_equals_training_from_the_teacher(
    stores, tiny_teacher, tmp_path
):
    """Over shuffled epochs and microbatches, to 1e-6 of the loss and of the largest parameter."""
    live = experiment_of(tmp_path / "live", tiny_teacher, num_steps=6)
    stored = from_store(live, stores["full"], model_dir=str(tmp_path / "stored"))
    assert live.num_microbatches == 2
    (losses, params), (own_losses, own_params) = steps_of(live), steps_of(stored)
    np.testing.assert_allclose(own_losses, losses, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(own_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * max(np.abs(other).max(), 1.0))
    plan = (tmp_path / "stored" / "metrics.jsonl").read_text().partition("\n")[0]
    assert f"teacher: stored, from {stores['full']}" in plan
    assert "Full(dtype='float32') of " in plan
    # Stopped and started again, it is the same; with another store it is another run.
    resumed = dataclasses.replace(stored, model_dir=str(tmp_path / "resumed"))
    train.train(dataclasses.replace(resumed, num_steps=2))
    with pytest.raises(ValueError, match=r"stored_teacher: .*Full.* before, .*TopK.* now"):
        train.train(from_store(resumed, stores["top_k"]))
    small_runs.assert_equal_bits(train.train(resumed).state.params, own_params)


@pytest.mark.slow
def test_every_sparsification_trains_and_is_evaluated(stores, tiny_teacher, tmp_path):
    """The divergence of held-out outputs comes from a store of their own."""
    heldout = small_runs.data("validation")
    experiment = experiment_of(tmp_path, tiny_teacher, num_steps=2)
    storing = Storing(heldout, str(tmp_path / "heldout"), Full())
    store_teacher.store_teacher(dataclasses.replace(experiment, storing=storing))
    evaluation = Evaluation(heldout, num_divergence_examples=4)
    other = Student(small_runs.model(24, dropout_rate=0.0), str(tiny_teacher))
    live = dataclasses.replace(
        experiment,
        evaluation=evaluation,
        objective=dataclasses.replace(OBJECTIVE, student_temperature=1.5),
        student=other,
        model_dir=str(tmp_path / "none"),
    )
    for name, path in stores.items():
        objective = TO_DRAWS if name == "draws" else OBJECTIVE
        teacher = StoredTeacher(str(path), str(tmp_path / "heldout") if name == "full" else None)
        result = train.train(
            dataclasses.replace(
                experiment, teacher=teacher, objective=objective, evaluation=evaluation,
                model_dir=str(tmp_path / name),
            )
        )  # fmt: skip
        assert "gsm8k_accuracy" in result.scores
        assert ("on_data/loss" in result.scores) == (name == "full")
        assert "on_samples/loss" not in result.scores
    own = dataclasses.replace(live, teacher=StoredTeacher("/none", str(tmp_path / "heldout")))
    scores = [evaluate.evaluate(one).scores["on_data/loss"].value for one in (own, live)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] > 1e-3


REFUSED = {
    "samples": (
        {"outputs": OutputMix(0.5)},
        r"knows no others; got OutputMix\(.*Set OutputMix\.student_data_fraction",
    ),
    "replay": ({"outputs": OutputMix(1.0), "replay": Replay(8)}, "knows no others"),
    "temperature": (
        {"objective": Objective(GeneralizedJSD(0.3))},
        r"of the teacher temperature 0\.8, and the objective's is 1\.0",
    ),
    "data": (
        {"train_data": small_runs.data(num_examples=9)},
        r"is of other data, .*num_examples: 10 before, 9 now",
    ),
    "lengths": (
        {"train_data": small_runs.data(feature_lengths={"inputs": 40, "targets": 24})},
        r"feature_lengths: \{'inputs': 48, .* before, \{'inputs': 40",
    ),
    "output layer": (
        {"student": Student(small_runs.model(vocab_size=300))},
        r"output layer has 259 entries, and the student's has 300",
    ),
    "policy": (
        {"rollout": Rollout(teacher_assistance=TeacherMixed(0.2))},
        r"Rollout\.teacher_assistance = .* asks the teacher for its next token",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_store_that_does_not_fit_is_refused(what, stores, tiny_teacher, tmp_path):
    changes, message = REFUSED[what]
    experiment = from_store(experiment_of(tmp_path, tiny_teacher, **changes), stores["top_k"])
    with pytest.raises(ConfigurationError, match=message):
        prepare.prepare(experiment, run_mode="train")


@pytest.mark.pitfall(37)
def test_a_store_of_another_vocabulary_is_refused(stores, tiny_teacher, tmp_path):
    """Of the same size, whose ids mean other bytes."""

    class Rotated(ByteVocabulary):
        name, fingerprint = "Rotated()", "rotated"

    data = small_runs.data(vocabulary=Rotated(), num_examples=NUM_EXAMPLES)
    experiment = from_store(experiment_of(tmp_path, tiny_teacher, train_data=data), stores["top_k"])
    with pytest.raises(ConfigurationError, match=r"got ByteVocabulary\(\) .* and Rotated\(\) .*"):
        prepare.prepare(experiment, run_mode="train")


def test_draws_are_for_divergences_that_are_linear_in_the_teacher(stores, tiny_teacher, tmp_path):
    experiment = from_store(experiment_of(tmp_path, tiny_teacher), stores["draws"])
    with pytest.raises(ConfigurationError, match=r"Draws\(num_draws=20\) estimates .*ForwardKL"):
        prepare.prepare(experiment, run_mode="train")
    prepare.prepare(dataclasses.replace(experiment, objective=TO_DRAWS), run_mode="train")


def test_what_is_missing_is_said(stores, tiny_teacher, tmp_path):
    experiment = experiment_of(tmp_path, tiny_teacher)
    with pytest.raises(ConfigurationError, match="which is no store of a teacher"):
        prepare.prepare(from_store(experiment, tmp_path / "none"), run_mode="train")
    with pytest.raises(ConfigurationError, match=r"writes what Experiment\.storing says; got None"):
        store_teacher.store_teacher(dataclasses.replace(experiment, storing=None))
    with pytest.raises(ConfigurationError, match="needs a teacher with a model"):
        store_teacher.store_teacher(from_store(experiment, stores["full"]))
    generation = Generation(experiment.train_data, str(tmp_path / "out"), model="teacher")
    with pytest.raises(ConfigurationError, match=r"needs a teacher; got .*StoredTeacher"):
        generate.generate(from_store(experiment, stores["full"], generation=generation))
    for make, message in (
        (lambda: TopK(0), r"TopK\.k must be a whole number from 1 on; got 0"),
        (lambda: TopK(8, "int8"), r"TopK\.dtype must be 'float32' or 'float16'"),
        (lambda: Full("float64"), r"Full\.dtype must be"),
        (lambda: Draws(1 << 16), r"Draws\.num_draws must be a whole number from 1 to 65,534"),
        (lambda: Storing(experiment.train_data, "x", TopK), "with brackets"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_fingerprint_of_parameters_notices_every_change():
    params = {"a": np.ones((3, 4), np.float32), "b": {"c": np.arange(5, dtype=np.float16)}}
    found = {store_teacher.fingerprint_of_params(params)}
    assert found == {store_teacher.fingerprint_of_params(jax.tree.map(np.copy, params))}
    changed = jax.tree.map(np.copy, params)
    changed["a"][1, 2] += 1e-6
    exchanged = jax.tree.map(np.copy, params)
    exchanged["b"]["c"][[1, 3]] = exchanged["b"]["c"][[3, 1]]
    for other in (changed, exchanged, {"b": params["b"], "d": params["a"]}):
        found.add(store_teacher.fingerprint_of_params(other))
    assert len(found) == 4
