"""Rewards: what functions are given and may give, baselines, advantages, runs with a reward."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs

from examples.entailment_reward import supported_words
from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.rewards import (
    HostReward,
    JittedReward,
    RewardMix,
    SequenceReverseKL,
    final_answer,
    reward_metrics,
    subtract_baseline,
    unigram_f1,
)
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.train_step import init_train_state, make_gradient_fn, make_train_step
from gkd_jax.experiment.checks.outputs import check_reward
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.experiment.step_objectives import on_policy_objective
from gkd_jax.objectives.divergences import ForwardKL, NegativeLogLikelihood, ReverseKL
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.objectives.policy_gradient import (
    PolicyGradient,
    token_advantages,
    with_policy_gradient,
)
from gkd_jax.run_modes import train
from gkd_jax.sampling.methods import Greedy, Sample
from gkd_jax.sampling.teacher_assisted import Corrected, TeacherMixed
from gkd_jax.training.rollout_scoring import ReturnScorer, RewardScorer, make_scorer


def length_reward(prompts, references, samples):
    return [float(len(sample)) for sample in samples]


LENGTH = HostReward(length_reward)


def test_baselines_by_hand():
    rewards = jnp.asarray([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
    for baseline, expected in {
        "none": rewards,
        "group_mean": [0.0, -1.0, 1.0, 0.0, 0.0, 0.0],
        # 1 - (0 + 2) / 2, 0 - (1 + 2) / 2, 2 - (1 + 0) / 2.
        "leave_one_out": [0.0, -1.5, 1.5, 0.0, 0.0, 0.0],
    }.items():
        found = subtract_baseline(rewards, num_samples=3, baseline=baseline)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_metrics_by_hand():
    """Rows of a filler prompt count nowhere."""
    rewards = jnp.asarray([1.0, 3.0, 2.0, 2.0, 100.0, 0.0])
    is_real = jnp.asarray([True, True, True, True, False, False])
    metrics = reward_metrics(rewards, is_real, num_samples=2)
    assert {name: (float(s), float(w)) for name, (s, w) in metrics.items()} == {
        "mean": (8.0, 4.0),
        "group_std": (1.0, 2.0),
    }
    assert set(reward_metrics(rewards, is_real, num_samples=1)) == {"mean"}


def test_unigram_f1():
    references = [("The cat sat.", "a dog"), ("a b c d",), ("a a b",), ("none",), ()]
    samples = ["the CAT sat!", "d c x y", "a", " . ", "x"]
    # m, s, r: 3, 3, 3; 2, 4, 4; 1, 1, 3; 0, 0, 1; no reference.
    assert unigram_f1([""] * 5, references, samples) == [1.0, 0.5, 0.5, 0.0, 0.0]


def test_final_answer():
    samples = ["7+5=12. #### 12", "The answer is 12.0.", "no idea", "#### 13", "7+5=13. #### 13"]
    references = [("12",)] * 4 + [("1 #### 12", "13")]
    prompts = [f"prompt {i}" for i in range(5)]
    assert final_answer(prompts, references, samples) == [1.0, 1.0, 0.0, 0.0, 1.0]
    wrong_sum = ["10-4=5. The answer is 5."]
    assert final_answer([""], [("6",)], wrong_sum) == [0.0]
    assert final_answer([""], [("6",)], ["10-4=<<10-4=5>>5 #### 5"], use_calculator=True) == [1.0]
    with pytest.raises(
        ValueError, match=r"must hold a final answer; got \('none',\) .*'How many\?'"
    ):
        final_answer(["How many?"], [("none",)], ["1"])


def test_supported_words():
    article = "The old ferry sank near the harbour on Monday."
    samples = ["The ferry sank on Monday.", "A ferry was attacked.", "It is.", ""]
    assert supported_words([article] * 4, [()] * 4, samples) == [1.0, 0.5, 0.0, 0.0]


def raising(prompts, references, samples):
    raise KeyError("my model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], r"given must give one number for each sample; got an array of shape \(1,\) for 2"),
        (None, r"given must give one number for each sample"),
        ([[1.0], [2.0]], r"shape \(2, 1\) for 2 samples"),
        (["a", "b"], r"must give one number for each sample; got \['a', 'b'\]"),
        ([1.0, math.nan], r"finite numbers; got nan for the sample 'out 1' of the prompt 'in 1'"),
        ([math.inf, 0.0], r"finite numbers; got inf for the sample 'out 0'"),
    ],
)
def test_what_a_reward_gives_is_checked(given, message):
    def name_of_given(prompts, references, samples):
        return given

    name_of_given.__qualname__ = "given"
    with pytest.raises(ValueError, match=message):
        HostReward(name_of_given)(["in 0", "in 1"], [("a",), ("b",)], ["out 0", "out 1"])


def test_an_error_inside_a_reward_names_it():
    with pytest.raises(KeyError) as caught:
        HostReward(raising)(["in"], [("a",)], ["out"])
    assert caught.value.__notes__ == ["In the reward raising (HostReward.function)."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardMix(LENGTH, 1.5), r"RewardMix\.alpha .* got 1\.5"),
        (lambda: RewardMix(LENGTH, math.nan), r"RewardMix\.alpha .* got nan"),
        (lambda: RewardMix(length_reward, 0.5), "must be a HostReward or a JittedReward; got"),
        (lambda: RewardMix(LENGTH, 0.5, baseline="mean"), "leave_one_out, group_mean, none; got"),
        (lambda: HostReward("f"), r"HostReward\.function must be a function; got 'f'"),
        (lambda: JittedReward(None), r"JittedReward\.function must be a function; got None"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rl(model_dir, teacher, *, alpha=0.25, baseline="leave_one_out", **changes):
    """RL with GKD at every step: two samples a prompt, rewarded by their length."""
    settings = {
        "objective": Objective(ReverseKL()),
        "outputs": OutputMix(1.0),
        "rollout": Rollout(num_samples=2),
        "reward": RewardMix(LENGTH, alpha, baseline),
        "evaluation": None,
        "num_steps": 3,
        "log_period": 1,
    }
    return small_runs.gkd(model_dir, teacher, **settings | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Objective(PolicyGradient()), "reward": None}, "without PolicyGradient"),
        ({"outputs": OutputMix(0.0)}, r"Set OutputMix\.student_data_fraction above 0"),
        ({"outputs": OutputMix(0.5, per_example=True)}, "per_example to False"),
        ({"rollout": Rollout()}, r"got Rollout\.num_samples = 1\. Set .* to 2 or more"),
        ({"rollout": Rollout(), "baseline": "group_mean"}, r"baseline = 'group_mean' compares"),
        ({"replay": Replay(8)}, r"Set Experiment\.replay to None"),
        (
            {"rollout": Rollout(num_samples=2, teacher_assistance=TeacherMixed())},
            r"teacher_assistance = TeacherMixed.* Set them to Sample\(.* and None",
        ),
        ({"rollout": Rollout(Sample(top_k=5), num_samples=2)}, "drawn from the very distribution"),
        ({"rollout": Rollout(Greedy()), "baseline": "none"}, "drawn from the very distribution"),
        ({"objective": Objective(ReverseKL(), student_temperature=0.5)}, r"temperature=0\.5"),
        ({"num_steps": 1 << 30}, r"Set Experiment\.num_steps lower"),
    ],
)
def test_experiments_that_a_reward_does_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_reward(rl(tmp_path, tmp_path, **changes))


def test_what_a_reward_allows(tmp_path):
    check_reward(rl(tmp_path, tmp_path, outputs=OutputMix(0.5)))
    check_reward(rl(tmp_path, tmp_path, baseline="none", rollout=Rollout()))
    # At an alpha of 1 outputs may be drawn in any way.
    check_reward(rl(tmp_path, tmp_path, alpha=1.0, rollout=Rollout(Sample(0.5), num_samples=2)))


def sampled_outputs(data: Batch, texts: list[str]) -> Batch:
    """Two outputs for each prompt, as a rollout would give them."""
    vocabulary = small_runs.data().vocabulary
    length = data.targets.shape[1]
    rows = [[*vocabulary.encode(text), vocabulary.eos_ids[0]] for text in texts]
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    weights = np.array([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows], np.float32)
    repeated = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), data)
    return dataclasses.replace(repeated, targets=tokens, loss_weights=weights)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_scoring_by_texts_and_by_arrays(mesh):
    """The function gets whole texts in order; both kinds of reward give the same advantages."""
    calls = []

    def by_text(prompts, references, samples):
        calls.append((prompts, references, samples))
        return [len(s) + 10.0 * p.count("7") for p, s in zip(prompts, samples, strict=True)]

    def by_array(sampled, data):
        num_sevens = jnp.sum((data.inputs == sevens) & data.inputs_mask, axis=1)
        return jnp.sum(sampled.loss_weights, axis=1) - 1 + 10 * num_sevens

    dataset = small_runs.data(batch_size=4).build()
    (sevens,) = dataset.config.vocabulary.encode("7")
    iterator = dataset.train_iterator(position=8)
    data = next(iterator)
    iterator.close()
    texts = ["ab", "", "abcd", "a", "xyz", "xy", "b", "bcd"]
    partitioner = Partitioner(*mesh[::-1], devices=tuple(jax.devices()[: mesh[0] * mesh[1]]))
    sharded, sampled = (partitioner.shard_batch(b) for b in (data, sampled_outputs(data, texts)))
    np.testing.assert_array_equal(partitioner.local_rows(sampled.targets), sampled.targets)

    found = {}
    for reward in (HostReward(by_text), JittedReward(by_array)):
        scorer = RewardScorer(
            RewardMix(reward, 0.5), dataset, partitioner, num_samples=2, reduction="per_sequence"
        )
        scored, metrics = scorer(None, None, sharded, sampled)
        found[type(reward).__name__] = np.asarray(scored.advantages)
    ((prompts, references, samples),) = calls
    examples = [dataset.raw(dataset.source_index(8 + row // 2)) for row in range(8)]
    assert prompts == [example.inputs for example in examples]
    assert references == [example.references for example in examples]
    assert samples == texts

    lengths = np.array([len(text) for text in texts], float)
    rest = lengths - lengths.reshape(4, 2)[:, ::-1].ravel()  # Of a prompt, sevens cancel.
    expected = (rest * (lengths + 1))[:, None] * np.asarray(sampled.loss_weights)
    np.testing.assert_allclose(found["HostReward"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["JittedReward"], expected, rtol=1e-6)
    assert float(metrics["group_std"][1]) == 4
    assert scored.advantages.sharding.is_equivalent_to(partitioner.batch_sharding, 2)


@pytest.mark.slow
def test_gradient_of_a_model_is_that_of_its_log_probability():
    """-mean of R log q(y), differentiated by JAX; in microbatches, by both reductions."""
    student, teacher = small_runs.model(), small_runs.model(small_runs.TEACHER_WIDTH)
    rng = np.random.default_rng(0)
    lengths = np.array([3, 6, 1, 4])
    weights = (np.arange(6) < lengths[:, None]).astype(np.float32)
    returns = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    batch = Batch(
        inputs=rng.integers(2, 250, (4, 5)).astype(np.int32),
        inputs_mask=np.ones((4, 5), bool),
        targets=rng.integers(2, 250, (4, 6)).astype(np.int32),
        loss_weights=weights,
        example_id=np.arange(4, dtype=np.int32),
    )
    params = jax.jit(student.init)(jax.random.key(0))

    def minus_return(params):
        logits = student.unembed(student.head(params), student.hidden_states(params, batch))
        log_probs = jax.nn.log_softmax(logits)
        of_tokens = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.mean(returns * jnp.sum(of_tokens * weights, axis=1))

    expected = jax.jit(jax.grad(minus_return))(params)
    for reduction, parts in (("per_sequence", 1), ("per_token", 2)):
        objective = with_policy_gradient(Objective(ForwardKL(), reduction=reduction), 0.0)
        advantages = token_advantages(returns, weights, reduction=reduction)
        gradient, metrics = jax.jit(
            make_gradient_fn(student, teacher, objective, num_microbatches=parts)
        )(
            params,
            None,
            dataclasses.replace(batch, advantages=advantages),
            final_weights(jnp.asarray(weights), reduction=reduction),
            jax.random.key(1),
        )
        assert "divergence" not in metrics
        for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            atol = 1e-5 * float(jnp.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_alpha_1_is_distillation_bit_for_bit(tiny_teacher, tmp_path):
    """On steps of both kinds; rewards are measured all the same."""
    settings = {"outputs": OutputMix(0.5), "num_steps": 6}
    rewarded = train.train(rl(tmp_path / "rl", tiny_teacher, alpha=1.0, **settings))
    plain = train.train(rl(tmp_path / "kd", tiny_teacher, reward=None, **settings))
    small_runs.assert_equal_bits(rewarded.state, plain.state)
    rows, others = (small_runs.metrics(tmp_path / name) for name in ("rl", "kd"))
    kept = [{name: value for name, value in row.items() if "/reward/" not in name} for row in rows]
    assert kept == others
    assert any("train/reward/mean" in row for row in rows)
    assert any("train/reward/mean" not in row and "train/data/loss" in row for row in rows)


@pytest.mark.slow
def test_reward_and_divergence_are_measured_and_resumed(tiny_teacher, tmp_path):
    """And a run in two parts is the whole one."""
    whole = train.train(rl(tmp_path / "whole", tiny_teacher, num_steps=4))
    train.train(rl(tmp_path / "parts", tiny_teacher, num_steps=2))
    parts = train.train(rl(tmp_path / "parts", tiny_teacher, num_steps=4))
    small_runs.assert_equal_bits(whole.state, parts.state)
    rows = [r for r in small_runs.metrics(tmp_path / "whole") if "train/reward/mean" in r]
    assert len(rows) == 4
    for row in rows:
        assert row["train/on_policy/loss"] == pytest.approx(
            0.25 * row["train/on_policy/divergence"], rel=1e-5
        )
        assert row["train/reward/group_std"] > 0


@pytest.mark.slow
def test_reinforce_alone_needs_no_teacher_and_learns(tmp_path):
    """From random outputs towards many of one letter."""

    def letters(sampled, data):
        (letter,) = small_runs.data().vocabulary.encode("e")
        return jnp.sum((sampled.targets == letter) * sampled.loss_weights, axis=1)

    experiment = rl(
        tmp_path,
        tmp_path,
        objective=Objective(NegativeLogLikelihood()),
        rollout=Rollout(num_samples=8),
        reward=RewardMix(JittedReward(letters), 0.0),
        num_steps=40,
        log_period=10,
    )
    train.train(dataclasses.replace(experiment, teacher=None))
    rewards = [r["train/reward/mean"] for r in small_runs.metrics(tmp_path) if "step" in r]
    assert rewards[-1] > 3 * rewards[0], rewards


def test_likelihood_of_own_outputs_is_refused_unless_the_reward_is_alone(tmp_path):
    experiment = rl(tmp_path, tmp_path, objective=Objective(NegativeLogLikelihood()))
    with pytest.raises(ConfigurationError, match="NegativeLogLikelihood on the student's own"):
        train.train(experiment)


def minillm(model_dir, teacher, **changes):
    """MiniLLM at every step."""
    settings = {
        "objective": Objective(ReverseKL(), reduction="per_token"),
        "rollout": Rollout(teacher_assistance=TeacherMixed(0.2)),
        "reward": SequenceReverseKL(),
    }
    return rl(model_dir, teacher, **settings | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Objective(ForwardKL())}, r"Set Objective\.divergence to ReverseKL\(\)"),
        ({"objective": Objective(ReverseKL(), teacher_temperature=0.5)}, "temperatures to 1"),
        ({"rollout": Rollout(Sample(0.5))}, r"Set them to Sample\(\), and to None or TeacherMixed"),
        ({"rollout": Rollout(teacher_assistance=Corrected())}, "None or TeacherMixed"),
        ({"replay": Replay(8)}, r"Set Experiment\.replay to None"),
    ],
)
def test_experiments_that_sequence_kl_does_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_reward(minillm(tmp_path, tmp_path, **changes))


@pytest.mark.slow
def test_a_step_of_minillm_is_the_papers(tmp_path):
    """Loss and gradient against log-probabilities of both whole models, in NumPy and by JAX."""
    student, teacher = small_runs.model(), small_runs.model(small_runs.TEACHER_WIDTH)
    rng = np.random.default_rng(0)
    weights = (np.arange(6) < np.array([3, 6, 1, 4])[:, None]).astype(np.float32)
    batch = Batch(
        inputs=rng.integers(2, 250, (4, 5)).astype(np.int32),
        inputs_mask=np.ones((4, 5), bool),
        targets=rng.integers(2, 250, (4, 6)).astype(np.int32),
        loss_weights=weights,
        example_id=np.arange(4, dtype=np.int32),
    )
    params = [jax.jit(m.init)(jax.random.key(i)) for i, m in enumerate((student, teacher))]

    def log_probs(model, params):
        return jax.nn.log_softmax(
            model.unembed(model.head(params), model.hidden_states(params, batch))
        )

    every = [
        np.asarray(log_probs(m, p), np.float64)
        for m, p in zip((student, teacher), params, strict=True)
    ]
    log_q, log_p = (
        np.take_along_axis(one, batch.targets[..., None], axis=-1)[..., 0] for one in every
    )
    importance = 1.0 / (0.8 + 0.2 * np.exp(log_p - log_q))
    returns = np.zeros((4, 6))
    for b in range(4):
        length = int(weights[b].sum())
        for t in range(length - 1):
            returns[b, t] = np.mean((log_p - log_q)[b, t + 1 : length])
    factors = weights * importance / weights.sum()

    def papers(params):
        own = log_probs(student, params)
        single = jnp.sum(jnp.exp(own) * (own - every[1].astype(np.float32)), axis=-1)
        of_token = jnp.take_along_axis(own, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(factors.astype(np.float32) * (single - returns * of_token))

    expected = jax.jit(jax.grad(papers))(params[0])

    scorer = make_scorer(minillm(tmp_path, tmp_path), small_runs.data().build())
    assert isinstance(scorer, ReturnScorer)
    partitioner = small_runs.one_device()
    scored, metrics = scorer(*params, None, partitioner.shard_batch(batch))
    np.testing.assert_allclose(scored.advantages, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored.importance * weights, importance * weights, rtol=1e-5)
    total, count = metrics["return"]
    np.testing.assert_allclose(total / count, np.sum((log_p - log_q) * weights) / 4, rtol=1e-5)

    experiment = minillm(tmp_path, tmp_path)
    step = make_train_step(
        student, teacher, on_policy_objective(experiment), optax.sgd(1.0), num_microbatches=2
    )
    state = init_train_state(params[0], optax.sgd(1.0))
    new, metrics = jax.jit(step)(state, params[1], scored, jax.random.key(0))
    moved = jax.tree.map(lambda old, new: old - new, params[0], new.params)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        atol = 1e-4 * float(jnp.abs(other).max()) + 1e-6
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=atol)


@pytest.mark.slow
def test_minillm_runs_on_steps_of_both_kinds(tiny_teacher, tmp_path):
    train.train(minillm(tmp_path, tiny_teacher, outputs=OutputMix(0.5), num_steps=6))
    rows = [row for row in small_runs.metrics(tmp_path) if "train/learning_rate" in row]
    sampled = [row for row in rows if "train/on_policy/loss" in row]
    assert 0 < len(sampled) < len(rows) == 6
    for row in sampled:
        assert 0 < row["train/reward/importance"] <= 1.25
        assert row["train/on_policy/divergence"] > 0
