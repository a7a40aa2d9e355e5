"""Whole runs from Hugging Face checkpoints, by command, and back to one."""

import dataclasses
import json
import re

import hf_models
import hf_tokenizers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_recipes import run_main

from gkd_jax.checkpoints import hf, load
from gkd_jax.checkpoints.save import save_params
from gkd_jax.data.hf_tokenizer import HFTokenizer
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Student, prepare


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A student and two teachers of different families over one vocabulary of letters."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama3", "qwen3", "t5_1_1"):
        hf_models.save(name, root / name)
        hf_tokenizers.save(root / name)
    return root


def flags(checkpoints, model_dir, *, student="llama3", teacher="qwen3", files=(), **changes):
    settings = {
        "MODEL_DIR": str(model_dir),
        "INITIAL_CHECKPOINT_PATH": str(checkpoints / student),
        "TEACHER_CHECKPOINT_PATH": str(checkpoints / teacher),
        "TRAIN_STEPS": 2, "experiment.Experiment.log_period": 1, "BATCH_SIZE": 8,
        "EVAL_BATCH_SIZE": 8, "EVAL_PERIOD": 2,
        "CHECKPOINT_PERIOD": 1, "MODEL_PARALLELISM": 2, "WARMUP_STEPS": 1,
        "recipes.arithmetic.num_heldout": 8, "recipes.arithmetic.num_train": 64,
        "INPUTS_BOS": True,
    } | changes  # fmt: skip
    names = ("gin_configs/arithmetic.gin", "gin_configs/hf.gin", *files)
    return [
        *(f"--gin_file={name}" for name in names),
        *(f"--gin.{name}={value!r}" for name, value in settings.items()),
    ]


@pytest.mark.parametrize("teacher", ["qwen3", "t5_1_1"])
def test_a_run_from_checkpoints_and_back(checkpoints, tmp_path, teacher):
    """On-policy, on a mesh of 4 x 2, from a decoder-only teacher and from an encoder-decoder.

    What is exported gives transformers the logits of the student that was trained.
    """
    run = tmp_path / "run"
    status, out, err = run_main(*flags(checkpoints, run, teacher=teacher))
    assert status == 0, err
    rows = small_runs.metrics(run)
    assert rows[-1]["eval/on_samples/loss"] > 0
    assert any(row.get("train/on_policy/loss", 0) > 0 for row in rows)

    output = tmp_path / "student"
    export = dict(files=["gin_configs/export.gin"], EXPORT_PATH=str(output), EXPORT_DTYPE="float32")
    arguments = flags(checkpoints, run, teacher=teacher, **export)
    status, out, err = run_main("--run_mode=export", *arguments)
    assert status == 0, err
    assert f"written: {output}" in out
    assert {file.name for file in output.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = (output / "README.md").read_text()
    for text in (str(checkpoints / teacher), "GeneralizedJSD(beta=0.5,", "| gsm8k_accuracy |",
                 "| steps | 2 of 2, 8 examples each |", "arithmetic, split train"):  # fmt: skip
        assert text in card
    # Fields that our models do not have are kept.
    assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 64

    reloaded, missing, unexpected = hf_models.from_pretrained(output)
    assert not missing
    assert not unexpected
    model = hf.hf_model(str(output), dtype="float32")
    abstract = model.abstract_params()
    trained = load.load_params(run, abstract)
    start = load.load_params(checkpoints / "llama3", abstract)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (trained, start)), strict=True))
    batch = hf_models.random_batch()
    ours = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))(trained, batch)
    theirs = hf_models.torch_logits("llama3", batch, model=reloaded)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

    status, _, err = run_main("--run_mode=export", *arguments)
    assert status == 2
    assert "exists already, and nothing is written over" in err


def small_export(checkpoints, tmp_path, **changes):
    experiment = small_runs.gkd(tmp_path / "run", checkpoints)
    model = hf.hf_model(str(checkpoints / "llama3"), dtype="float32")
    data = small_runs.data(vocabulary=HFTokenizer(checkpoints / "llama3"))
    return dataclasses.replace(
        experiment,
        student=Student(model, str(checkpoints / "llama3")),
        teacher=Teacher(
            hf.hf_model(str(checkpoints / "qwen3"), dtype="float32"), str(checkpoints / "qwen3")
        ),
        train_data=data,
        evaluation=None,
        **changes,
    )


@pytest.mark.pitfall(53)
def test_a_model_that_is_not_the_checkpoints_is_refused(checkpoints, tmp_path):
    """Shapes alone would not tell: another rotary base is another model."""
    experiment = small_export(checkpoints, tmp_path)
    prepare.prepare(experiment, run_mode="train")
    model = experiment.student.model
    other = dataclasses.replace(
        model.config, rope=dataclasses.replace(model.config.rope, theta=1e4)
    )
    student = Student(
        dataclasses.replace(model, config=other), experiment.student.initial_checkpoint
    )
    with pytest.raises(
        prepare.ConfigurationError,
        match=r"Student\.initial_checkpoint .* another model .* rope = Rope\(theta=500000\.0.*here",
    ):
        prepare.prepare(dataclasses.replace(experiment, student=student), run_mode="train")


@pytest.mark.pitfall(37)
def test_checkpoints_of_other_tokenizers_are_refused(checkpoints, tmp_path):
    """Both bring their own, of equal size: the teacher's is compared without being named."""
    folder = tmp_path / "other"
    hf_models.save("qwen3", folder)
    hf_tokenizers.save(folder, letters=hf_tokenizers.LETTERS[::-1])
    experiment = small_export(checkpoints, tmp_path)
    teacher = dataclasses.replace(experiment.teacher, checkpoint=str(folder))
    with pytest.raises(
        prepare.ConfigurationError, match=r"must share one vocabulary.*llama3'\).*other'\)"
    ):
        prepare.prepare(dataclasses.replace(experiment, teacher=teacher), run_mode="train")


def test_loading_on_a_mesh_in_another_dtype(checkpoints):
    """Each device holds its part only, in the dtype wanted."""
    from gkd_jax.devices.partitioning import Partitioner

    partitioner = Partitioner(model_parallelism=4, rules="fsdp")
    model = hf.hf_model(str(checkpoints / "llama3"))
    shardings = partitioner.param_shardings(model)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding),
        model.abstract_params(), shardings,
    )  # fmt: skip
    params = load.load_params(checkpoints / "llama3", abstract)
    whole = load.load_params(checkpoints / "llama3", model.abstract_params())
    kernel = params["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(left, right.astype(jnp.bfloat16))


def test_an_export_that_cannot_be_is_refused_before_it_begins(checkpoints, tmp_path):
    from gkd_jax.experiment import Export

    for export, message in (
        (None, r"--run_mode=export writes what Experiment\.export says; got None"),
        (Export("gs://bucket/student"), r"Export\.output must be a local directory"),
        (Export(str(tmp_path)), r"exists already"),
        (Export(str(tmp_path / "new"), tokenizer=str(tmp_path)), r"which holds no tokenizer"),
        (
            Export(str(tmp_path / "new"), format="t5x"),
            r"Export\.format = 't5x' .*got Student\.model = DecoderOnly \(llama\).* to 'hf'",
        ),
    ):
        experiment = small_export(checkpoints, tmp_path, export=export)
        with pytest.raises(prepare.ConfigurationError, match=message):
            prepare.prepare(experiment, run_mode="export")
    with pytest.raises(ValueError, match=r"Export\.dtype must be one of float32, bfloat16"):
        Export("x", dtype="int8")
    with pytest.raises(ValueError, match=r"Export\.format must be 'hf' or 't5x'; got 'torch'"):
        Export("x", format="torch")
    with pytest.raises(ValueError, match=r"Export\.adapters .* 't5x', and T5X has none"):
        Export("x", format="t5x", adapters=True)


def test_a_student_of_our_own_is_exported_with_its_vocabulary(tmp_path):
    """T5 of a run without any Hugging Face checkpoint; bytes have no tokenizer files."""
    from gkd_jax.experiment import Export
    from gkd_jax.run_modes import export

    model = small_runs.model()
    save_params(tmp_path / "params", model.init(jax.random.key(0)))
    experiment = small_runs.sft(
        tmp_path / "run", student=Student(model, str(tmp_path / "params")),
        export=Export(str(tmp_path / "out"), dtype="float32"),
    )  # fmt: skip
    export.export(experiment)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    assert "No evaluation was made" in (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"started from \| .*params", (tmp_path / "out" / "README.md").read_text())
    assert hf_models.from_pretrained(tmp_path / "out")[1:] == ([], [])
