"""Whole runs with a teacher that reads its own tokens."""

import dataclasses

import jax
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.train_vocabulary import train_sentencepiece
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.rewards import HostReward, RewardMix
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import CrossTokenizerTeacher, Teacher, TeacherMixture
from gkd_jax.experiment import Evaluation, Generation, Storing, prepare
from gkd_jax.experiment.plan import describe_plan
from gkd_jax.objectives.divergences import ForwardKL
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective
from gkd_jax.run_modes import evaluate, generate, store_teacher, train
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.teacher_assisted import TeacherMixed
from gkd_jax.training.teacher_tokens import make_retokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The teacher's vocabulary: SentencePiece's, of the task's text."""
    dataset = small_runs.data().build()
    examples = [dataset.raw(index) for index in range(100)]
    texts = [text for one in examples for text in (one.inputs, one.targets)]
    path = train_sentencepiece(
        texts, tmp_path_factory.mktemp("vocabulary") / "pieces", vocab_size=120, model_type="bpe"
    )
    return SentencePieceVocabulary(str(path))


@pytest.fixture(scope="module")
def teacher(pieces, tmp_path_factory):
    """A random network over it."""
    model = small_runs.model(small_runs.TEACHER_WIDTH, vocab_size=pieces.size)
    folder = tmp_path_factory.mktemp("teacher") / "params"
    save_params(folder, model.init(jax.random.key(5)))
    return CrossTokenizerTeacher(
        Teacher(model, str(folder), vocabulary=pieces), inputs_length=32, targets_length=20
    )


def run_with(own, folder, /, **changes):
    settings = dict(
        teacher=own, outputs=OutputMix(1.0), num_steps=4, evaluation=None,
        objective=Objective(ForwardKL()),
    )  # fmt: skip
    return dataclasses.replace(small_runs.gkd(folder, "nowhere"), **settings | changes)


@pytest.mark.slow
def test_a_run_on_samples_learns_and_is_resumed_bit_for_bit(teacher, tmp_path, monkeypatch):
    evaluation = Evaluation(small_runs.data("validation"), period=8, method=Sample())
    experiment = run_with(
        teacher, tmp_path / "run", num_steps=16, evaluation=evaluation, outputs=OutputMix(0.5)
    )
    whole = train.train(experiment)
    rows = small_runs.metrics(tmp_path / "run")
    losses = [row["eval/on_data/loss"] for row in rows if "eval/on_data/loss" in row]
    assert losses[-1] < losses[0]
    samples = [row["eval/on_samples/loss"] for row in rows if "eval/on_samples/loss" in row]
    assert samples[-1] < samples[0]
    spans = [row for row in rows if "train/spans/covered_share" in row]
    assert spans
    for row in spans:
        assert 0 < row["train/spans/covered_share"] <= 1
        assert 1 <= row["train/spans/tokens_per_span"] < 10
    stopped = dataclasses.replace(
        experiment, model_dir=str(tmp_path / "stopped"),
        checkpoints=dataclasses.replace(experiment.checkpoints, period=5),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        small_runs.stop_at(patch, 7)
        with pytest.raises(small_runs.Stopped):
            train.train(stopped)
    small_runs.assert_equal_bits(train.train(stopped).state, whole.state)
    assert evaluate.evaluate(experiment).values()["on_data/loss"] == pytest.approx(
        losses[-1], rel=1e-5
    )


def test_the_teacher_reads_prompts_and_outputs_in_its_own_tokens(teacher, pieces, tmp_path):
    experiment = run_with(teacher, tmp_path / "run")
    prepared = prepare.prepare(experiment, run_mode="train")
    dataset = prepared.train_data
    batch = next(dataset.train_iterator())
    own = dataset.config.vocabulary
    for row, theirs in zip(batch.inputs, batch.teacher_inputs, strict=True):
        assert pieces.decode(theirs.tolist()) == own.decode(row.tolist())
    assert batch.teacher_inputs.shape == (small_runs.BATCH_SIZE, 32)
    trainer = train.Trainer(experiment, dataset)
    read, _ = trainer._retokenizer(experiment.partitioner.shard_batch(batch))
    view = read.as_teacher_reads()
    np.testing.assert_array_equal(view.inputs, batch.teacher_inputs)
    for row, theirs in zip(batch.targets, np.asarray(view.targets), strict=True):
        assert pieces.decode(theirs.tolist()) == own.decode(row.tolist())
        assert theirs[np.count_nonzero(theirs) - 1] == pieces.eos_ids[0]
    plan = describe_plan(experiment, prepared)
    assert "the teacher reads its own, compared on spans" in plan
    assert f"which reads {pieces.name}" in plan


def test_an_output_too_long_for_the_teacher_is_cut_with_its_spans(teacher, tmp_path):
    short = dataclasses.replace(teacher, targets_length=4)
    experiment = run_with(short, tmp_path / "run")
    dataset = prepare.prepare(experiment, run_mode="train").train_data
    batch = next(dataset.train_iterator())
    retokenizer = make_retokenizer(experiment, dataset.config.vocabulary)
    tokens = retokenizer.retokenize(batch.targets, batch.loss_weights)
    assert tokens.targets.shape == tokens.teacher_spans.shape == (small_runs.BATCH_SIZE, 4)
    for row in range(small_runs.BATCH_SIZE):
        numbers = set(tokens.spans[row].tolist()) - {0}
        assert numbers == set(tokens.teacher_spans[row].tolist()) - {0}
        assert 0 < len(numbers) <= 4
    assert (tokens.loss_weights == 1).all()


@pytest.mark.slow
def test_replay_and_microbatches(teacher, tmp_path):
    results = []
    for name, count in (("one", 1), ("two", 2)):
        experiment = run_with(
            teacher, tmp_path / name, num_microbatches=count,
            replay=Replay(capacity=8, refresh=0.5),
            student=dataclasses.replace(
                small_runs.sft(tmp_path).student, model=small_runs.model()
            ),
        )  # fmt: skip
        results.append(train.train(experiment).state.params)
    names = [name for row in small_runs.metrics(tmp_path / "two") for name in row]
    assert "train/replay/loss" in names
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-3)


@pytest.mark.slow
def test_the_teacher_writes_in_its_own_tokens(teacher, pieces, tmp_path):
    data = small_runs.data(
        "validation", vocabulary=pieces, feature_lengths={"inputs": 32, "targets": 20}
    )
    generation = Generation(data, str(tmp_path / "out.jsonl"), model="teacher")
    experiment = run_with(teacher, tmp_path / "run", generation=generation)
    generate.generate(experiment)
    assert len(small_runs.rows(tmp_path / "out.jsonl")) == small_runs.NUM_HELDOUT
    wrong = dataclasses.replace(
        generation, data=small_runs.data("validation"), output=str(tmp_path / "x.jsonl")
    )
    with pytest.raises(prepare.ConfigurationError, match=r"Generation\.data.*share one vocabulary"):
        generate.generate(dataclasses.replace(experiment, generation=wrong))


def test_what_cannot_be_is_refused(teacher, pieces, tmp_path):
    def refused(match, run_mode="train", **changes):
        experiment = run_with(teacher, tmp_path / "run", **changes)
        with pytest.raises(prepare.ConfigurationError, match=match):
            prepare.prepare(experiment, run_mode=run_mode)

    refused(r"Rollout\.teacher_assistance = TeacherMixed.*got CrossTokenizerTeacher",
            rollout=Rollout(teacher_assistance=TeacherMixed()))  # fmt: skip
    refused(r"Experiment\.reward weighs the student's tokens.*got CrossTokenizerTeacher",
            reward=RewardMix(HostReward(lambda *_: 0.0), alpha=0.5))  # fmt: skip
    refused(r"Objective\.z_loss .*on spans", objective=Objective(ForwardKL(), z_loss=0.1))
    refused(r"is for a teacher with another vocabulary; got ByteVocabulary\(\).*the Teacher alone",
            teacher=CrossTokenizerTeacher(
                dataclasses.replace(teacher.teacher, vocabulary=ByteVocabulary())
            ))  # fmt: skip
    refused(r"store_teacher keeps distributions over the student's tokens", "store_teacher",
            storing=Storing(small_runs.data(), str(tmp_path / "store")))  # fmt: skip
    network = dataclasses.replace(teacher.teacher, model=small_runs.model(vocab_size=100))
    refused(r"the teacher's vocab_size must be at least .*got 100",
            teacher=dataclasses.replace(teacher, teacher=network))  # fmt: skip
    refused(r"CrossTokenizerTeacher\.inputs_bos .*has none", teacher=dataclasses.replace(
        teacher,
        inputs_bos=True,
        teacher=dataclasses.replace(teacher.teacher, vocabulary=_WithoutBos(pieces.path)),
    ))  # fmt: skip
    # Without it, a teacher with another vocabulary is refused as it was, and told of it.
    refused(r"must share one vocabulary.*or have it read its own tokens by teachers\.Cross",
            teacher=teacher.teacher)  # fmt: skip
    assert store_teacher  # The module is there: its run mode was checked above.


class _WithoutBos(SentencePieceVocabulary):
    bos_id = None


def test_a_teacher_without_a_vocabulary_and_lengths_of_nothing(teacher):
    with pytest.raises(ValueError, match=r"Teacher\.vocabulary = None\. Set it"):
        CrossTokenizerTeacher(dataclasses.replace(teacher.teacher, vocabulary=None))
    with pytest.raises(ValueError, match=r"targets_length must be at least 2; got 1"):
        dataclasses.replace(teacher, targets_length=1)
    with pytest.raises(ValueError, match=r"must each be a Teacher; got None"):
        CrossTokenizerTeacher(None)
    with pytest.raises(ValueError, match=r"with another vocabulary, cannot be one of several"):
        TeacherMixture((teacher.teacher, teacher))
