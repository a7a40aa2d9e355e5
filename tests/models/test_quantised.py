"""Teachers in int8: rounding, its scales, and what it costs."""

import dataclasses

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax.checkpoints import load, pretrained
from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.pipeline import Dataset, DatasetConfig
from gkd_jax.data.recipes import arithmetic
from gkd_jax.data.vocabularies import ByteVocabulary
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.teachers import TeacherMixture
from gkd_jax.experiment import prepare
from gkd_jax.models.families import model_from_hf
from gkd_jax.models.lora import products
from gkd_jax.models.quantised import Int8, quantise_kernel
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.run_modes import train
from gkd_jax.run_modes.evaluate import task_scores
from gkd_jax.sampling.methods import Greedy
from gkd_jax.training import jitted_functions, parameters


def base(name, dtype="float32"):
    return model_from_hf(hf_models.make(name).config.to_dict(), dtype=dtype)


def random_params(model):
    """By NumPy: nothing is compiled."""
    generator = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: np.float32(generator.normal(0, leaf.shape[0] ** -0.5, leaf.shape)),
        model.abstract_params(),
    )


def logits(model, params, batch):
    return jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)


def rounded(model, params):
    """The parameters that int8 stands for, by NumPy."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.removesuffix("/kernel") not in products(model):
            return leaf
        scale = np.max(np.abs(leaf), axis=0) / np.float32(127)
        return np.round(leaf / scale) * scale

    return jax.tree_util.tree_map_with_path(one, params)


def test_a_kernel_by_hand():
    kernel = np.array([[1.0, -2.0, 0.0], [-0.5, 0.3, 0.0], [0.1, 2.0, 0.0]], np.float32)
    weights, scales = quantise_kernel(kernel)
    assert weights.dtype == jnp.int8
    np.testing.assert_array_equal(weights, [[127, -127, 0], [-64, 19, 0], [13, 127, 0]])
    np.testing.assert_allclose(scales, [1 / 127, 2 / 127, 1.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["t5_1_1", "llama_biases", "gemma2"])
def test_logits_are_those_of_the_rounded_weights(name):
    """Biases are not scaled; decoding over a cache agrees."""
    plain = base(name)
    model, params, batch = Int8(plain), random_params(plain), hf_models.random_batch()
    quantised = jax.jit(model.quantise)(params)
    ours = logits(model, quantised, batch)
    np.testing.assert_allclose(ours, logits(plain, rounded(plain, params), batch), atol=2e-5)
    assert np.max(np.abs(ours - logits(plain, params, batch))) > 1e-3
    hidden, _ = jax.jit(lambda p, b: model.prefill(p, b.inputs, b.inputs_mask, max_length=4))(
        quantised, batch
    )
    np.testing.assert_allclose(model.unembed(quantised, hidden), ours[:, 0], atol=2e-5)


def test_kernels_take_a_quarter_of_float32_on_any_mesh():
    plain = base("llama3")
    model, params = Int8(plain), random_params(plain)
    partitioner = Partitioner(model_parallelism=2)
    shardings = partitioner.param_shardings(model)
    quantised = jax.jit(model.quantise, out_shardings=shardings)(params)
    kernel = quantised["weights"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert (kernel.dtype, kernel.nbytes) == (jnp.int8, 32 * 48)
    assert kernel.addressable_shards[0].data.shape == (32, 24)
    scale = quantised["scales"]["layers_0/mlp/wi_0"]
    assert scale.addressable_shards[0].data.shape == (24,)
    batch = hf_models.random_batch(rows=8)
    function = partitioner.annotate(lambda p, b: model.unembed(p, model.hidden_states(p, b)))
    np.testing.assert_allclose(
        jax.jit(function)(quantised, partitioner.shard_batch(batch)),
        logits(model, jax.jit(model.quantise)(params), batch),
        atol=2e-5,
    )


TEACHER = T5(
    T5Config(
        vocab_size=259, emb_dim=128, num_heads=4, num_encoder_layers=3, num_decoder_layers=3,
        head_dim=32, mlp_dim=320, dtype="float32",
    )
)  # fmt: skip


def problems(number):
    """The quickstart's test problems, which its teacher was not trained on, and their batches."""
    config = DatasetConfig(
        task=arithmetic(max_steps=2, max_operand=20, num_heldout=512),
        split="test", feature_lengths={"inputs": 72, "targets": 32}, batch_size=64,
        vocabulary=ByteVocabulary(), num_examples=number,
    )  # fmt: skip
    dataset = Dataset(config)
    return dataset, [one for one, _ in dataset.eval_batches(process_index=0, process_count=1)]


def both():
    """The package's own teacher, and the same in int8."""
    params = load.load_params(pretrained.arithmetic_teacher(), TEACHER.abstract_params())
    return (TEACHER, params), (Int8(TEACHER), jax.jit(Int8(TEACHER).quantise)(params))


def test_what_a_trained_teacher_loses():
    """KL(float || int8) a token of the package's own teacher, and its best tokens."""
    (batch,) = problems(64)[1]
    exact, ours = (jax.nn.log_softmax(logits(*one, batch)) for one in both())
    counts = batch.loss_weights > 0
    divergence = np.sum(np.exp(exact) * (exact - ours), axis=-1)[counts]
    same = (np.argmax(exact, -1) == np.argmax(ours, -1))[counts]
    print(f"KL a token {divergence.mean():.2e}, largest {divergence.max():.2e}, "
          f"same best token {same.mean():.4f} of {same.size}")  # fmt: skip
    assert 0 < divergence.mean() < 1e-3
    assert same.mean() > 0.995


@pytest.mark.slow
def test_how_many_answers_a_trained_teacher_loses():
    """Of 512 problems, greedily: no more than one in a hundred."""
    dataset, batches = problems(512)
    vocabulary = dataset.config.vocabulary
    accuracies = []
    for model, params in both():
        decode = jitted_functions.jit_rollout(
            Rollout(method=Greedy()), model, small_runs.one_device(),
            eos_ids=vocabulary.eos_ids, pad_id=vocabulary.pad_id,
        )  # fmt: skip
        texts = []
        for batch in batches:
            decoded = decode(params, batch, jax.random.key(0))
            for row, weights in zip(
                np.asarray(decoded.targets), np.asarray(decoded.loss_weights), strict=True
            ):
                texts.append(vocabulary.decode(row[weights > 0].tolist()))
        accuracies.append(task_scores(dataset, texts)["gsm8k_accuracy"].value)
    print(f"accuracy {accuracies[0]:.4f}, in int8 {accuracies[1]:.4f}")
    assert accuracies[0] > 95
    assert abs(accuracies[0] - accuracies[1]) < 1


def small_run(folder):
    """A run of two steps on the student's own outputs and on the data's."""
    model = small_runs.model(small_runs.TEACHER_WIDTH)
    save_params(folder / "teacher", jax.jit(model.init)(jax.random.key(1)))
    run = small_runs.gkd(folder / "run", folder / "teacher", num_steps=2, evaluation=None)
    return dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, weights="int8"))


def test_a_teacher_is_kept_in_int8(tmp_path):
    """Beside another in a mixture too; its source tells, and with it what it generated."""
    run = small_run(tmp_path)
    teacher = run.teacher
    assert teacher.describe("").endswith("teacher in int8")
    held = parameters.load_teacher(run)["weights"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    assert held.dtype == jnp.int8
    prepare.prepare(run, run_mode="train")
    mixture = TeacherMixture((teacher, dataclasses.replace(teacher, weights=None)))
    assert [type(one) for one in mixture.model_for(small_runs.model()).models] == [Int8, T5]
    with pytest.raises(ValueError, match=r"Teacher\.weights must be None or 'int8'; got 'int4'"):
        dataclasses.replace(teacher, weights="int4")


@pytest.mark.slow
def test_a_run_with_an_int8_teacher(tmp_path):
    state = train.train(small_run(tmp_path)).state
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
