"""Whole runs of a student with adapters: training, resuming, evaluating, generating, exporting."""

import dataclasses
import json
import pathlib
import re

import hf_models
import hf_tokenizers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_recipes import run_main

from gkd_jax.checkpoints import hf, layout, load
from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.distillation.teachers import AverageStudent, InitialStudent, Teacher
from gkd_jax.experiment import Export, Generation, Student, prepare
from gkd_jax.experiment.plan import describe_plan
from gkd_jax.models import lora
from gkd_jax.models.lora import LoRA
from gkd_jax.run_modes import evaluate, export, generate, train
from gkd_jax.training import parameters

RANK = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Parameters of a base and of a teacher of another width."""
    root = tmp_path_factory.mktemp("saved")
    for name, model in (("base", small_runs.model()), ("teacher", teacher_model())):
        save_params(root / name, jax.jit(model.init)(jax.random.key(len(name))))
    return root


def teacher_model():
    return small_runs.model(small_runs.TEACHER_WIDTH)


def experiment(saved, model_dir, **changes):
    """Distillation of everything at once, as `small_runs.gkd` has it, into adapters."""
    student = Student(LoRA(small_runs.model(dropout_rate=0.1), rank=RANK), str(saved / "base"))
    run = small_runs.gkd(model_dir, saved / "teacher", student=student)
    return dataclasses.replace(run, **changes)


@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    """A run of 12 steps."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train.train(experiment(saved, folder))


def test_a_run_trains_and_keeps_adapters_alone(saved, finished):
    folder, result = finished
    shapes = load.describe_checkpoint(folder).shapes
    assert len(shapes) == 2 * 18  # Of 7 products in the encoder's layer and 11 in the decoder's.
    header = layout.read_header(load.layout.absolute(folder / "checkpoint_12"))
    small = small_runs.model().abstract_params()
    largest = max(leaf.size for leaf in jax.tree.leaves(small))
    assert all(np.prod(shape) <= 32 * RANK < largest for shape, _ in header.shapes.values())
    assert {"params", "opt_state", "step"} == {name.split("/")[0] for name in header.shapes}
    start = parameters.init_params(experiment(saved, folder))
    for old, new in zip(*map(jax.tree.leaves, (start, result.state.params)), strict=True):
        assert new.dtype == jnp.float32
        assert np.any(np.asarray(old) != np.asarray(new))
    assert np.isfinite(result.scores["on_samples/loss"])


def test_resuming_is_bit_for_bit(saved, finished, tmp_path, monkeypatch):
    """12 steps are 7, stop, resume, 5; the base comes from its path again."""
    folder, whole = finished
    with monkeypatch.context() as patch:
        small_runs.stop_at(patch, 7)
        with pytest.raises(small_runs.Stopped):
            train.train(experiment(saved, tmp_path))
    resumed = train.train(experiment(saved, tmp_path))
    small_runs.assert_equal_bits(resumed.state, whole.state)
    assert small_runs.metrics(tmp_path)[-1] == small_runs.metrics(folder)[-1]


def test_evaluation_and_generation_use_both(saved, finished, tmp_path):
    """`--run_mode=eval` gives the scores that training gave; merged, it generates the same."""
    folder, result = finished
    run = experiment(saved, folder)
    scores = evaluate.evaluate(run).values()
    assert {name: scores[name] for name in scores if "loss" in name} == {
        name: value for name, value in result.scores.items() if "loss" in name
    }
    model = run.student.model
    student = parameters.student_to_use(run)
    save_params(tmp_path / "merged", model.merge(student.params))
    alone = dataclasses.replace(
        run, model_dir=str(tmp_path), student=Student(model.model, str(tmp_path / "merged"))
    )
    written = []
    for one, name in ((run, "lora"), (alone, "merged")):
        output = str(tmp_path / f"{name}.jsonl")
        generation = Generation(small_runs.data("validation"), output)
        generate.generate(dataclasses.replace(one, generation=generation))
        written.append([row["targets"] for row in small_runs.rows(tmp_path / f"{name}.jsonl")])
    assert written[0] == written[1]


def test_the_base_teaches_without_a_copy(saved, tmp_path):
    """Adapters off: its arrays are the student's own, and it does not move."""
    run = experiment(saved, tmp_path, teacher=InitialStudent(), num_steps=2, evaluation=None)
    assert run.teacher_model == run.student.model.model
    prepared = prepare.prepare(run, run_mode="train")
    trainer = train.Trainer(run, prepared.train_data)
    assert trainer.teacher_params is None
    assert trainer.teaching_params(trainer.init_state()) is trainer.frozen
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.frozen)} == {jnp.dtype("bfloat16")}
    before = jax.tree.map(np.array, trainer.frozen)
    train.train(run)
    batch = next(prepared.train_data.train_iterator(0, process_index=0, process_count=1))
    batch = run.partitioner.shard_batch(batch)
    state = trainer.init_state()
    for step in range(2):
        state, _, _ = trainer.step(state, batch, step)
    small_runs.assert_equal_bits(trainer.frozen, before)


@pytest.mark.slow
def test_an_average_of_adapters_teaches(saved, tmp_path):
    run = experiment(saved, tmp_path, teacher=AverageStudent(0.9), num_steps=3)
    result = train.train(run)
    assert jax.tree.structure(result.state.average) == jax.tree.structure(result.state.params)
    found = parameters.teacher_to_use(run).params
    small_runs.assert_equal_bits(lora.split(run.student.model, found)[0], result.state.average)


def test_the_plan_tells_the_optimizers_memory(saved, tmp_path):
    """AdamW keeps two float32 numbers a trained parameter, and its count."""
    run = experiment(saved, tmp_path)
    model = run.student.model
    parts = lora.split(model, model.abstract_params())
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts)
    plan = describe_plan(run, prepare.prepare(run, run_mode="train"))
    line = next(line for line in plan.splitlines() if line.startswith("trained: "))
    found = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)]
    # Counts of updates are a few bytes more.
    more = found[2] - 8 * trained
    assert 0 < more <= 16
    assert found == [
        trained, 4 * trained, 8 * trained + more, 8 * frozen + more, frozen, 2 * frozen,
    ]  # fmt: skip


def test_what_cannot_be_is_refused_before_it_begins(saved, finished, tmp_path):
    folder, _ = finished
    run = experiment(saved, tmp_path)

    def refused(message, run, run_mode="train"):
        with pytest.raises(prepare.ConfigurationError, match=message):
            prepare.prepare(run, run_mode=run_mode)

    def student(run, path, model=None):
        return dataclasses.replace(run, student=Student(model or run.student.model, path))

    refused(r"got Student\.initial_checkpoint = None\. Set it \(INITIAL_CHECKPOINT_PATH\)",
            student(run, None))  # fmt: skip
    gone = str(tmp_path / "gone")
    refused(r"Student\.initial_checkpoint: there is no checkpoint at .*gone", student(run, gone))
    for run_mode in ("eval", "train"):
        trained = experiment(saved, folder)
        refused(r"there is no checkpoint at .*gone", student(trained, gone), run_mode)
    only_adapters = r"must hold a whole model; got .* with LoRA.*--run_mode=export"
    refused(rf"Student\.initial_checkpoint {only_adapters}", student(run, str(folder)))
    base = run.student.model.model
    refused(rf"Student\.initial_checkpoint {only_adapters}", student(run, str(folder), base))
    for model in (run.student.model, base):
        teacher = Teacher(model, str(folder))
        refused(rf"Teacher\.checkpoint {only_adapters}", dataclasses.replace(run, teacher=teacher))
    refused(r"Export\.adapters writes the adapters of a LoRA student alone; got .* = T5",
            dataclasses.replace(student(run, str(saved / "base"), base),
                                export=Export(str(tmp_path / "x"), adapters=True)),
            "export")  # fmt: skip


def test_another_base_is_refused(saved, finished, tmp_path):
    """Of equal shapes: adapters on weights that they were not trained on are another model."""
    folder, _ = finished
    save_params(tmp_path / "other", small_runs.model().init(jax.random.key(99)))
    run = experiment(saved, folder, num_steps=13)
    run = dataclasses.replace(run, student=Student(run.student.model, str(tmp_path / "other")))
    message = r"Student\.initial_checkpoint .*other holds other weights than those"
    with pytest.raises(ValueError, match=message):
        parameters.student_to_use(run)
    with pytest.raises(ValueError, match=message):
        train.train(run)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Students of two architectures, and the tokenizer that both have."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama3", "gemma2", "t5_1_1"):
        hf_models.save(name, root / name)
        hf_tokenizers.save(root / name)
    return root


def exported(checkpoints, name, folder, **changes):
    """Random adapters of a student that was never trained, exported; and all its parameters."""
    path = str(checkpoints / name)
    model = LoRA(hf.hf_model(path, dtype="float32"), rank=3, alpha=5.0, base_dtype="float32")
    settings = dict(dtype="float32") | changes.pop("export", {})
    return small_runs.sft(
        folder / "run",
        student=Student(dataclasses.replace(model, **changes), path),
        train_data=small_runs.data(vocabulary=HFTokenizer(path)),
        export=Export(str(folder / "out"), **settings),
    )


def logits(model, params, batch):
    return jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(params, batch)


@pytest.mark.parametrize(
    ("name", "targets", "modules"),
    [
        ("llama3", lora.ALL_TARGETS, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                      "up_proj", "down_proj"}),
        ("gemma2", ("layers_1/attention/query", "mlp/wo"),
         {"model.layers.1.self_attn.q_proj",
          *(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))}),
        ("t5_1_1", ("query", "value", "wi*"), {"q", "v", "wi_0", "wi_1"}),
    ],
)  # fmt: skip
def test_peft_loads_adapters_with_equal_logits(
    checkpoints, tmp_path, monkeypatch, name, targets, modules
):
    """PEFT on transformers' own base, and after its own merge."""
    peft = pytest.importorskip("peft")
    run = exported(checkpoints, name, tmp_path, targets=targets, export=dict(adapters=True))
    model = run.student.model
    student = with_random_adapters(run, monkeypatch)
    output = export.export(run)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == modules
    assert "adapters alone" in (tmp_path / "out" / "README.md").read_text()

    base, _, _ = hf_models.from_pretrained(checkpoints / name)
    batch = hf_models.random_batch()
    ours = np.asarray(logits(model, student.params, batch))
    assert np.max(np.abs(hf_models.torch_logits(name, batch, model=base) - ours)) > 0.05
    loaded = peft.PeftModel.from_pretrained(base, output).eval()
    theirs = hf_models.torch_logits(name, batch, model=loaded)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert len([key for key, _ in loaded.named_parameters() if "lora_A" in key]) == len(
        model.kernels
    )
    merged = hf_models.torch_logits(name, batch, model=loaded.merge_and_unload())
    np.testing.assert_allclose(ours, merged, atol=1e-4)


def with_random_adapters(run, monkeypatch):
    """Stands for training: the run's student has adapters that are not zero."""
    student = parameters.student_to_use(run)
    adapters, frozen = lora.split(run.student.model, student.params)
    generator = np.random.default_rng(3)
    adapters = jax.tree.map(
        lambda leaf: jnp.float32(generator.normal(0, 0.3, leaf.shape)), adapters
    )
    student = dataclasses.replace(student, params=lora.join(adapters, frozen))
    monkeypatch.setattr(parameters, "student_to_use", lambda experiment: student)
    return student


def test_adapters_are_merged_for_t5x(checkpoints, tmp_path, monkeypatch):
    run = exported(checkpoints, "t5_1_1", tmp_path, export=dict(format="t5x"))
    student = with_random_adapters(run, monkeypatch)
    output = pathlib.Path(export.export(run))
    assert sorted(file.name for file in output.iterdir() if file.is_dir()) == [
        f"checkpoint_{student.step}"
    ]
    assert "adapters merged" in (output / "README.md").read_text()
    model = run.student.model
    read = load.load_params(output, model.model.abstract_params())
    small_runs.assert_equal_bits(read, model.merge(student.params))


def test_a_merged_export_is_a_whole_model(checkpoints, tmp_path, monkeypatch):
    run = exported(checkpoints, "gemma2", tmp_path)
    student = with_random_adapters(run, monkeypatch)
    output = export.export(run)
    reloaded, missing, unexpected = hf_models.from_pretrained(output)
    assert (missing, unexpected) == ([], [])
    batch = hf_models.random_batch()
    ours = logits(run.student.model, student.params, batch)
    theirs = hf_models.torch_logits("gemma2", batch, model=reloaded)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert "adapters merged" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_by_command(checkpoints, tmp_path):
    """A recipe, hf.gin and lora.gin, on a mesh of 4 x 2; then both exports."""
    settings = {
        "MODEL_DIR": str(tmp_path / "run"),
        "INITIAL_CHECKPOINT_PATH": str(checkpoints / "llama3"),
        "TEACHER_CHECKPOINT_PATH": str(checkpoints / "gemma2"),
        "TRAIN_STEPS": 2, "experiment.Experiment.log_period": 1, "BATCH_SIZE": 8,
        "EVAL_BATCH_SIZE": 8, "EVAL_PERIOD": 2, "MODEL_PARALLELISM": 2, "WARMUP_STEPS": 1,
        "recipes.arithmetic.num_heldout": 8, "recipes.arithmetic.num_train": 64,
        "INPUTS_BOS": True, "LORA_RANK": 2, "LORA_TARGETS": ("query", "wi*"),
    }  # fmt: skip
    names = ["arithmetic", "hf", "lora", "export"]
    flags = [f"--gin_file=gin_configs/{name}.gin" for name in names]
    flags += [f"--gin.{name}={value!r}" for name, value in settings.items()]
    output = str(tmp_path / "out")
    status, _, err = run_main(*flags, f"--gin.EXPORT_PATH={output!r}")
    assert status == 0, err
    for run_mode in ("eval", "export"):
        status, _, err = run_main(f"--run_mode={run_mode}", *flags, f"--gin.EXPORT_PATH={output!r}")
        assert status == 0, err
    status, _, err = run_main(
        "--run_mode=export", *flags, f"--gin.EXPORT_PATH={output + '_peft'!r}",
        "--gin.EXPORT_ADAPTERS=True",
    )  # fmt: skip
    assert status == 0, err
    batch = hf_models.random_batch()
    merged = hf_models.torch_logits("llama3", batch, hf_models.from_pretrained(output)[0])
    peft = pytest.importorskip("peft")
    base, _, _ = hf_models.from_pretrained(checkpoints / "llama3")
    loaded = peft.PeftModel.from_pretrained(base, output + "_peft")
    # The merged weights are written in bfloat16.
    np.testing.assert_allclose(merged, hf_models.torch_logits("llama3", batch, loaded), atol=0.1)
