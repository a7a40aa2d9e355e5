"""Our objective and rollout in T5X's own trainer, with T5X itself; skipped where it is missing."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax import traverse_util

from gkd_jax.checkpoints.load import describe_checkpoint, load_params
from gkd_jax.common.batch import Batch
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.distillation.train_step import make_gradient_fn, make_loss_fn
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives.divergences import ForwardKL, GeneralizedJSD, NegativeLogLikelihood
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.objectives.objective import Objective, final_weights
from gkd_jax.run_modes import export
from gkd_jax.sampling.methods import Sample
from gkd_jax.sampling.teacher_assisted import TeacherMixed

pytest.importorskip(
    "t5x.trainer", reason="T5X is not installed: docs/t5x.md says how", exc_type=ImportError
)

import seqio
from t5x import adafactor, models, partitioning, trainer, utils
from t5x.examples.t5 import network

from gkd_jax import t5x_trainer
from gkd_jax.t5x_trainer.batches import to_batch
from gkd_jax.t5x_trainer.model import FINAL_WEIGHTS
from gkd_jax.t5x_trainer.programs import ModelWithTeacher

ROOT = pathlib.Path(t5x_trainer.__file__).resolve().parents[2]
OBJECTIVE = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.7, z_loss=1e-4)
SIZES = {
    "vocab_size": 96,
    "emb_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "head_dim": 8,
    "mlp_dim": 32,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0,
    "logits_via_embedding": False,
    "dtype": "float32",
}
KINDS = pytest.mark.parametrize("kind", ["native", "orbax"])


@pytest.fixture(scope="module", autouse=True)
def t5x_on_a_mesh():
    """Eight simulated devices as 4 x 2, where T5X would put all on 'model'; and T5X's habits."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        devices = np.array(jax.devices()).reshape(4, 2)
        mesh = jax.sharding.Mesh(devices, ["data", "model"])
        patch.setattr(partitioning, "get_cpu_mesh", lambda: mesh)
        yield


@pytest.fixture(scope="module")
def tiny(external_data):
    return external_data / "t5x_tiny" / "v1_1"


def transformer(**changes):
    return network.Transformer(network.T5Config(**{**SIZES, **changes}))


@pytest.fixture(scope="module")
def teacher_sizes(tiny):
    return json.loads((tiny / "meta.json").read_text())["config"]


def make_model(teacher_sizes, objective=OBJECTIVE, **changes):
    vocabulary = seqio.PassThroughVocabulary(96, eos_id=1)
    arguments = dict(
        module=transformer(),
        teacher_module=transformer(**teacher_sizes),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=adafactor.Adafactor(
            decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
        ),
        objective=objective,
    )
    return t5x_trainer.GkdModel(**{**arguments, **changes})


@pytest.fixture(scope="module")
def features(tiny):
    """T5X's fixed batch, eight rows of unequal length."""
    arrays = dict(np.load(tiny / "reference.npz"))
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: arrays[name] for name in names}
    batch["decoder_loss_weights"] = arrays["decoder_loss_weights"].astype(np.int32)
    return {name: np.concatenate([array, array[3:5]]) for name, array in batch.items()}


def ours(features):
    return Batch(
        inputs=jnp.asarray(features["encoder_input_tokens"]),
        inputs_mask=jnp.asarray(features["encoder_input_tokens"] > 0),
        targets=jnp.asarray(features["decoder_target_tokens"]),
        loss_weights=jnp.asarray(features["decoder_loss_weights"], jnp.float32),
        example_id=jnp.arange(len(features["decoder_target_tokens"])),
    )


def make_trainer(model, tiny, tmp_path, *, fraction=0.0, kind="native", **changes):
    """T5X's trainer on parameters from scratch, as `t5x.train.train` makes it."""
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    shapes = dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens"), (8, 10))
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={"encoder_input_tokens": (8, 12), **shapes},
        partitioner=partitioner,
    )
    arguments = dict(
        model=model,
        train_state=initializer.from_scratch(jax.random.PRNGKey(3)),
        partitioner=partitioner,
        eval_names=["validation"],
        summary_dir=str(tmp_path),
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(5),
        learning_rate_fn=lambda step: jnp.float32(0.01),
        num_microbatches=None,
        teacher_checkpoint=str(tiny / kind / "checkpoint_2000"),
        output_mix=OutputMix(student_data_fraction=fraction),
        rollout=Rollout(),
        seed=7,
    )
    return t5x_trainer.GkdTrainer(**{**arguments, **changes})


def our_loss(features, params, teacher_params, teacher_sizes, objective=OBJECTIVE):
    """The loss of gkd_jax's own step, on one device."""
    student, teacher = T5(T5Config(**SIZES)), T5(T5Config(**teacher_sizes))
    batch = ours(features)
    weights = final_weights(batch.loss_weights, reduction=objective.reduction)
    loss_fn = jax.jit(make_loss_fn(student, teacher, objective))
    return float(loss_fn(*jax.device_get((params, teacher_params)), batch, weights)[0])


def on_host(state):
    return jax.device_get(traverse_util.flatten_dict(dict(state.params), sep="/"))


def losses_of(gkd, batches):
    """The loss of each step, one by one, as T5X reports it."""
    first = int(gkd.train_state.step)
    return [
        gkd.train(iter([batch]), 1, start_step=first + number).result()
        for number, batch in enumerate(batches)
    ]


@KINDS
def test_a_step_has_our_loss_and_leaves_the_teacher(kind, tiny, teacher_sizes, features, tmp_path):
    gkd = make_trainer(make_model(teacher_sizes), tiny, tmp_path, kind=kind)
    teacher_params = jax.device_get(gkd.teacher_params)
    params = on_host(gkd.train_state)
    wanted = our_loss(
        features, traverse_util.unflatten_dict(params, sep="/"), teacher_params, teacher_sizes
    )
    gkd.compile_train(features)
    (summary,) = losses_of(gkd, [features])
    assert summary["loss"].value == pytest.approx(wanted, rel=1e-6)
    assert summary["on_policy_share"].value == 0.0
    after = on_host(gkd.train_state)
    assert all(np.any(after[name] != params[name]) for name in params)
    jax.tree.map(np.testing.assert_array_equal, teacher_params, jax.device_get(gkd.teacher_params))
    names = traverse_util.flatten_dict(gkd.train_state.state_dict()["target"], sep="/")
    shapes = {name: leaf.shape for name, leaf in params.items()}
    # What T5X saves: the student alone.
    assert {name: leaf.shape for name, leaf in names.items()} == shapes
    gkd.close()


def test_the_teacher_is_an_argument_of_the_compiled_step(tiny, teacher_sizes, features, tmp_path):
    gkd = make_trainer(make_model(teacher_sizes), tiny, tmp_path)
    gkd.compile_train(features)
    step = gkd._compiled_train_step.on_data
    other = jax.tree.map(lambda leaf: leaf * 0.5, gkd.teacher_params)
    params = jax.device_get(dict(gkd.train_state.params))
    wanted = our_loss(features, params, other, teacher_sizes)
    assert wanted != pytest.approx(our_loss(features, params, gkd.teacher_params, teacher_sizes))
    _, metrics = dataclasses.replace(step, teacher_params=other)(gkd.train_state, features)
    assert float(metrics["loss"].compute()) == pytest.approx(wanted, rel=1e-6)
    # Nothing as large as the teacher is a constant of the program.
    program = gkd._partitioned_train_step.on_data.program
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves((gkd.teacher_params, other)))
    state = jax.eval_shape(lambda tree: tree, gkd.train_state)
    with gkd._partitioner.mesh:
        traced = jax.make_jaxpr(program._pjitted_fn)(state, gkd.teacher_params, features)
    size = sum(leaf.size for leaf in jax.tree.leaves(gkd.teacher_params))
    assert sum(np.size(constant) for constant in traced.consts) < size / 100
    gkd.close()


def test_the_loss_is_that_of_the_logits_of_t5x(tiny, teacher_sizes, features):
    """Of T5X's own networks, by the definition, in float64."""
    model = make_model(teacher_sizes, Objective(ForwardKL()))
    params = T5(T5Config(**SIZES)).init(jax.random.key(0))
    abstract = T5(T5Config(**teacher_sizes)).abstract_params()
    teacher_params = load_params(tiny / "orbax" / "checkpoint_2000", abstract)
    log_probs = []
    for module, tree in ((model.module, params), (transformer(**teacher_sizes), teacher_params)):
        tokens = [features[name] for name in list(features)[:3]]
        logits = module.apply({"params": tree}, *tokens, decode=False, enable_dropout=False)
        logits = np.asarray(logits, np.float64)
        highest = logits.max(axis=-1, keepdims=True)
        log_probs.append(
            logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
        )
    log_q, log_p = log_probs
    per_token = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    weights = features["decoder_loss_weights"]
    wanted = ((per_token * weights).sum(axis=1) / weights.sum(axis=1)).mean()
    loss, metrics = jax.jit(model.loss_fn)(params, features, None, teacher_params)
    assert float(loss) == pytest.approx(wanted, rel=1e-6)
    assert float(metrics["output_length"].compute()) == weights.sum() / len(weights)


@pytest.mark.parametrize("reduction", ["per_sequence", "per_token"])
def test_microbatches_of_t5x_give_our_gradient(reduction, tiny, teacher_sizes, features):
    objective = dataclasses.replace(OBJECTIVE, reduction=reduction)
    model = make_model(teacher_sizes, objective)
    params = model.student.init(jax.random.key(0))
    abstract = model.teacher.abstract_params()
    teacher_params = load_params(tiny / "native", abstract)
    batch = ours(features)
    weights = final_weights(batch.loss_weights, reduction=reduction)
    key = jax.random.key(1)
    gradient_fn = make_gradient_fn(model.student, model.teacher, objective, num_microbatches=1)
    wanted, _ = jax.jit(gradient_fn)(params, teacher_params, batch, weights, key)

    @functools.partial(jax.jit, static_argnames="num_microbatches")
    def of_t5x(params, teacher_params, *, num_microbatches):
        state = dataclasses.make_dataclass("State", ["params", "flax_mutables"])(params, None)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        bound = ModelWithTeacher(model, teacher_params, mesh)
        whole = {**features, FINAL_WEIGHTS: weights}
        whole = {name: jnp.asarray(array) for name, array in whole.items()}
        rng = jax.random.PRNGKey(2)
        grads, metrics, _ = trainer.accumulate_grads_microbatched(
            bound, state, whole, rng, num_microbatches
        )
        return grads, metrics["loss"].total

    losses = []
    for number in (1, 4):
        grads, loss = of_t5x(params, teacher_params, num_microbatches=number)
        losses.append(float(loss))
        difference = jax.tree.map(jnp.subtract, grads, wanted)
        norm = functools.partial(jax.tree.reduce, lambda total, g: total + jnp.sum(g**2))
        assert float(norm(difference, 0.0)) < 1e-10 * float(norm(wanted, 0.0))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_samples_are_the_students_and_change_with_the_step(tiny, teacher_sizes, features, tmp_path):
    model = make_model(teacher_sizes)
    rollout = Rollout(method=Sample(temperature=0.8), num_samples=2)
    gkd = make_trainer(model, tiny, tmp_path, fraction=1.0, rollout=rollout)
    assert gkd._partitioned_train_step.on_data is None
    gkd.compile_train(features)
    step = gkd._compiled_train_step
    params = gkd.train_state.params
    one, again, two = (
        jax.device_get(step.sample(params, jnp.int32(number), features)) for number in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, again)
    targets, weights = one["decoder_target_tokens"], one["decoder_loss_weights"]
    assert targets.shape == (16, 10)
    assert np.mean(targets != two["decoder_target_tokens"]) > 0.5
    np.testing.assert_array_equal(
        one["encoder_input_tokens"][::2], features["encoder_input_tokens"]
    )
    # Up to and including the end counts; what follows is padding.
    ended = np.cumsum(targets == 1, axis=1) - (targets == 1) > 0
    np.testing.assert_array_equal(weights, ~ended)
    assert np.all(targets[ended] == 0)
    np.testing.assert_array_equal(one["decoder_input_tokens"][:, 1:], targets[:, :-1])
    # The step's loss is ours, on the outputs of the step's key.
    teacher_params = jax.device_get(gkd.teacher_params)
    wanted = our_loss(one, jax.device_get(dict(params)), teacher_params, teacher_sizes)
    (summary,) = losses_of(gkd, [features])
    assert summary["loss"].value == pytest.approx(wanted, rel=1e-6)
    assert summary["on_policy_share"].value == 1.0
    gkd.close()


def test_coins_are_those_of_the_seed_and_the_step(tiny, teacher_sizes, features, tmp_path):
    mix = OutputMix(student_data_fraction=0.5)
    gkd = make_trainer(make_model(teacher_sizes), tiny, tmp_path, output_mix=mix)
    summaries = losses_of(gkd, [features] * 3)
    # T5X trains several steps at a time, and tells where it starts only where it wants to.
    summaries += [gkd.train(iter([features] * 5), 5).result()]
    tossed = [mix.is_on_policy(step, seed=7) for step in range(8)]
    assert 0 < sum(tossed[:3]) < 3
    shares = [summary["on_policy_share"].value for summary in summaries]
    assert shares == pytest.approx([*map(float, tossed[:3]), np.mean(tossed[3:])])
    gkd.close()


def test_an_evaluation_compares_with_the_teacher(tiny, teacher_sizes, features, tmp_path):
    gkd = make_trainer(make_model(teacher_sizes), tiny, tmp_path)
    gkd.compile_eval({"validation": features})
    filled = {name: array.copy() for name, array in features.items()}
    for array in filled.values():
        array[5:] = 0
    summary = gkd.eval({"validation": iter([filled])})["validation"]
    params = jax.device_get(dict(gkd.train_state.params))
    wanted = our_loss(filled, params, gkd.teacher_params, teacher_sizes)
    assert summary["loss"].value == pytest.approx(wanted, rel=1e-6)
    lengths = filled["decoder_loss_weights"].sum(axis=1)[:5]
    assert summary["output_length"].value == pytest.approx(lengths.mean())
    gkd.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_module": network.Transformer(network.T5Config(97))}, "vocab_size"),
        ({"module": network.Encoder(network.T5Config(96), None)}, "GkdModel.module must be"),
        ({"objective": Objective(NegativeLogLikelihood())}, "NegativeLogLikelihood"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, message, teacher_sizes):
    with pytest.raises(ValueError, match=message):
        make_model(teacher_sizes, **changes)


def test_settings_that_t5x_cannot_have_are_refused(tiny, teacher_sizes, features, tmp_path):
    model = make_model(teacher_sizes)
    make = functools.partial(make_trainer, model, tiny, tmp_path)
    with pytest.raises(ValueError, match="per_example must be False"):
        make(output_mix=OutputMix(0.5, per_example=True))
    with pytest.raises(ValueError, match="got TeacherMixed"):
        make(rollout=Rollout(teacher_assistance=TeacherMixed(0.2)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(teacher_checkpoint="nowhere")
    with pytest.raises(ValueError, match=r"pack = False"):
        to_batch({**features, "decoder_segment_ids": features["decoder_input_tokens"]})
    with pytest.raises(ValueError, match="GkdTrainer"):
        model.loss_fn({}, features, None)
    plain = models.EncoderDecoderModel(
        transformer(), model.input_vocabulary, model.output_vocabulary, model.optimizer_def
    )
    with pytest.raises(ValueError, match="got EncoderDecoderModel"):
        make_trainer(plain, tiny, tmp_path)


TINY = "gin_configs/t5x/tiny.gin"
GKD = "gin_configs/t5x/tiny_gkd.gin"
WITHOUT_EVALUATION = ("train.train_eval_dataset_cfg=None",)
WITHOUT_EVALUATION += ("train.infer_eval_dataset_cfg=None",)


def run_t5x(gin_file, model_dir, *, steps, kind, evaluate=False, **macros):
    """T5X's own command, on one device; returns what it reported of training, by step."""
    settings = [f"{name}={value!r}" for name, value in macros.items()]
    settings += [f"MODEL_DIR={str(model_dir)!r}", f"TRAIN_STEPS={steps}"]
    settings += [f"train.use_orbax={kind == 'orbax'}", "BATCH_SIZE=8"]
    settings += ["utils.SaveCheckpointConfig.period=2", "train.stats_period=1"]
    settings += ["utils.SaveCheckpointConfig.save_dataset=True"]
    settings += ["EVAL_PERIOD=4", "EVAL_STEPS=1"] if evaluate else WITHOUT_EVALUATION
    command = [sys.executable, "-m", "t5x.train", f"--gin_file={gin_file}"]
    done = subprocess.run(
        [*command, *(f"--gin.{setting}" for setting in settings)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"\[(\d+)\] collection=train (.*)", done.stderr)
    reports: dict[int, dict[str, float]] = {}
    for step, values in lines:
        report = {k: float(v) for k, v in re.findall(r"([\w/]+)=([-\w.+]+)", values)}
        reports.setdefault(int(step), {}).update(report)
    return {step: report for step, report in reports.items() if "loss" in report}


def student_of(folder):
    """The student's parameters in a checkpoint that T5X wrote, read by us."""
    return load_params(folder, T5(T5Config(**SIZES)).abstract_params())


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Where a student of T5X's starts, by the kind of the checkpoint: four steps of fine-tuning."""
    folder = tmp_path_factory.mktemp("t5x")

    @functools.cache
    def make(kind):
        run_t5x(TINY, folder / kind, steps=4, kind=kind)
        return folder / kind / "checkpoint_4"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "kind"), [(0.0, "native"), (1.0, "orbax")])
def test_t5x_trains_the_gin_file_and_goes_on(fraction, kind, tiny, start, tmp_path):
    """T5X's own command; stopped and started again it does what it does in one go."""
    run = functools.partial(
        run_t5x,
        GKD,
        kind=kind,
        INITIAL_CHECKPOINT_PATH=str(start(kind)),
        TEACHER_CHECKPOINT_PATH=str(tiny / kind / "checkpoint_2000"),
        STUDENT_DATA_FRACTION=fraction,
    )
    whole = run(tmp_path / "whole", steps=8, evaluate=True)
    assert sorted(whole) == [5, 6, 7, 8]
    assert all(report["on_policy_share"] == fraction for report in whole.values())
    run(tmp_path / "parts", steps=6)
    parts = run(tmp_path / "parts", steps=8)
    assert sorted(parts) == [7, 8]
    for step, report in parts.items():
        assert report["loss"] == whole[step]["loss"]
    last = [student_of(tmp_path / name / "checkpoint_8") for name in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *last)
    assert describe_checkpoint(tmp_path / "whole" / "checkpoint_8").kind == f"t5x-{kind}"
    first = student_of(start(kind))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, last[0])), strict=True))
    # As many bytes as T5X's fine-tuning saves: the teacher is not among them.
    saved = describe_checkpoint(tmp_path / "whole" / "checkpoint_8").shapes
    assert saved == describe_checkpoint(start(kind)).shapes


@pytest.mark.slow
def test_t5x_reads_what_we_export(tmp_path):
    """Its `Checkpointer.restore`, for inference; and a fine-tuning that starts from it."""
    from gkd_jax.checkpoints.save import save_params
    from gkd_jax.experiment import Export, Student

    student = T5(T5Config(**SIZES))
    params = student.init(jax.random.key(4))
    save_params(tmp_path / "params", params)
    experiment = small_runs.sft(
        tmp_path / "run", student=Student(student, str(tmp_path / "params")),
        export=Export(str(tmp_path / "out"), format="t5x", dtype="float32"),
    )  # fmt: skip
    # The check of the vocabulary's size is none of the test: T5X's network is tiny.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gkd_jax.experiment.checks.models.check_vocab_size", lambda *_, **__: None)
        folder = os.path.join(export.export(experiment), "checkpoint_0")

    model = make_model(SIZES)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    shapes = dict.fromkeys(("decoder_input_tokens", "decoder_target_tokens"), (8, 10))
    for optimizer_def, changes in (
        (None, {}),
        (model.optimizer_def, {"fallback_to_scratch": True, "assignment_map": ()}),
    ):
        initializer = utils.TrainStateInitializer(
            optimizer_def=optimizer_def,
            init_fn=model.get_initial_variables,
            input_shapes={"encoder_input_tokens": (8, 12), **shapes},
            partitioner=partitioner,
        )
        config = utils.RestoreCheckpointConfig(
            path=folder, mode="specific", dtype="float32", **changes
        )
        state = initializer.from_checkpoint([config], init_rng=jax.random.PRNGKey(0))
        assert int(state.step) == 0
        restored = jax.device_get(traverse_util.flatten_dict(dict(state.params), sep="/"))
        wanted = jax.device_get(traverse_util.flatten_dict(params, sep="/"))
        assert restored.keys() == wanted.keys()
        for name, leaf in wanted.items():
            assert restored[name].tobytes() == leaf.tobytes(), name


def test_the_teacher_of_the_example_trains(tmp_path):
    """The remaining gin file; and its sizes are those of the teacher of the other."""
    run_t5x("gin_configs/t5x/tiny_teacher.gin", tmp_path / "teacher", steps=2, kind="orbax")
    sizes = re.compile(r"^  (\w+ = \d+)$", re.MULTILINE)
    texts = [(ROOT / name).read_text() for name in ("gin_configs/t5x/tiny_teacher.gin", GKD)]
    assert sizes.findall(texts[0]) == sizes.findall(texts[1]) != []


def test_every_gin_file_of_t5x_is_run_or_included():
    names = {path.name for path in (ROOT / "gin_configs" / "t5x").iterdir()}
    assert names == {"gkd.gin", "tiny.gin", "tiny_gkd.gin", "tiny_teacher.gin"}
    assert "include 'gin_configs/t5x/gkd.gin'" in (ROOT / GKD).read_text()
