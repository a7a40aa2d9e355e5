"""The recipes' gin files, small, on local files: train on samples, evaluate, stop, go on.

On real data where GKD_JAX_DATA names them, and on synthetic files of the same shape elsewhere.
"""

import json
import pathlib
import subprocess
import textwrap

import processes
import pytest
import small_recipes
import small_runs
from small_recipes import run_main

METRICS = {
    "wmt_ende": {"eval/bleu"},
    "xsum": {"eval/rouge1", "eval/rouge2", "eval/rougeLsum"},
    "gsm8k": {"eval/gsm8k_accuracy", "eval/gsm8k_accuracy_se"},
    "flan2021": {"eval/exact_match", "eval/exact_match_se"},
}
ON_POLICY = {"STUDENT_DATA_FRACTION": 1.0, "EVAL_PERIOD": 20, "CHECKPOINT_PERIOD": 10}


def run_twice(recipe: small_recipes.Recipe, model_dir: pathlib.Path, **changes: object) -> None:
    """Ten steps, then ten more of the same run; checks what they wrote."""
    changes = ON_POLICY | changes
    log = []
    for steps in (10, 20):
        status, out, err = run_main(*recipe.flags(model_dir, TRAIN_STEPS=steps, **changes))
        assert status == 0, err
        log.append(err)
        for name in METRICS[recipe.name]:
            assert any(line.startswith(f"{name}: ") for line in out.splitlines()), out
    assert "step 20/20" in log[1]
    assert "step 10/" not in log[1]  # Nothing of the first ten steps was made again.
    rows = small_runs.metrics(model_dir)
    evaluated = [row["step"] for row in rows if "eval/outputs/output_length" in row]
    assert evaluated == [0, 10, 20]
    assert METRICS[recipe.name] <= set(rows[-1])
    assert {"eval/on_data/loss", "eval/on_samples/loss"} <= set(rows[-1])
    losses = [name for row in rows for name in row if name.endswith("/loss") and "train" in name]
    assert set(losses) == {"train/on_policy/loss"}
    saved = sorted(path.name for path in model_dir.glob("checkpoint_*"))
    assert saved == ["checkpoint_10", "checkpoint_20"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_small_recipe(name, tmp_path):
    recipe = small_recipes.make_recipe_on_best(name, tmp_path / "data", lengths=(48, 24))
    changes = {"gsm8k.num_exemplars": 0} if name == "gsm8k" else {}
    run_twice(recipe, tmp_path / "run", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["distillm", "speculative_kd"])
def test_methods_of_sampling(method, tmp_path):
    """The overlays run, stop and go on; DistiLLM's trains on kept outputs towards its end."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    changes = ON_POLICY | ({"REPLAY_CAPACITY": 8} if method == "distillm" else {})
    for steps in (10, 20):
        flags = recipe.flags(tmp_path / "run", TRAIN_STEPS=steps, **changes)
        if method == "distillm":  # Its schedule is that of the whole training.
            flags.append("--gin.FallingRefresh.num_steps=20")
        first = next(i for i, flag in enumerate(flags) if flag.startswith("--gin."))
        flags.insert(first, f"--gin_file=gin_configs/methods/{method}.gin")
        status, out, err = run_main(*flags)
        assert status == 0, err
        assert "eval/bleu: " in out
    assert "step 20/20" in err
    names = {name for row in small_runs.metrics(tmp_path / "run") for name in row}
    assert ("train/replay/staleness" in names) == (method == "distillm")
    assert "train/on_policy/loss" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gsm8k", "gin_configs/methods/rl_gkd.gin"),
        ("xsum", "examples/entailment_reward.gin"),
        ("wmt_ende", "gin_configs/methods/minillm.gin"),
    ],
)
def test_methods_with_a_reward(name, file, tmp_path):
    """Stopped and gone on with; reward and divergence are written apart."""
    recipe = small_recipes.make_recipe(name, tmp_path / "data")
    changes = {"Experiment.log_period": 1}
    if name == "gsm8k":
        changes["gsm8k.num_exemplars"] = 0
    for steps in (2, 4):
        flags = recipe.flags(tmp_path / "run", TRAIN_STEPS=steps, **changes)
        first = next(i for i, flag in enumerate(flags) if flag.startswith("--gin."))
        flags.insert(first, f"--gin_file={file}")
        status, _, err = run_main(*flags)
        assert status == 0, err
    rows = [row for row in small_runs.metrics(tmp_path / "run") if "train/learning_rate" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        if "minillm" in file:
            assert 0 < row["train/reward/importance"] <= 1.25
        else:
            assert 0 <= row["train/reward/mean"] <= 1
        assert row["train/on_policy/divergence"] > 0


@pytest.mark.slow
def test_generated_outputs_train_a_student(tmp_path):
    """SeqKD by the overlays: the teacher's outputs, then fine-tuning on them."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    output = tmp_path / "outputs.jsonl"
    generation = ["--gin_file=gin_configs/generate.gin", f"--gin.GENERATION_OUTPUT={str(output)!r}"]
    flags = [*recipe.flags(tmp_path / "none"), *generation, "--run_mode=generate"]
    status, out, err = run_main(*flags)
    assert (status, out) == (0, f"written: {output}\n"), err
    assert len(small_runs.rows(output)) == 64

    settings = {name: value for name, value in recipe.settings.items() if "TEACHER" not in name}
    sft = small_recipes.Recipe("sft/wmt_ende", settings)
    flags = [
        *sft.flags(tmp_path / "run"),
        "--gin_file=gin_configs/methods/seqkd.gin",
        f"--gin.TEACHER_OUTPUTS={str(output)!r}",
    ]
    status, out, err = run_main(*flags)
    assert status == 0, err
    assert "eval/bleu: " in out
    plan = (tmp_path / "run" / "metrics.jsonl").read_text().partition("\n")[0]
    assert "task 'teacher_outputs', split 'train': 64 examples" in plan


@pytest.mark.slow
@pytest.mark.parametrize("sparsification", ["TopK", "Full", "Draws"])
def test_a_store_of_the_teacher_trains_a_student(sparsification, tmp_path):
    """Two commands after a recipe of parallel text; the second one reads no teacher."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    store = f"--gin.STORE_PATH={str(tmp_path / 'store')!r}"
    flags = [
        *recipe.flags(tmp_path / "none"),
        *("--gin_file=gin_configs/store_teacher.gin", store, "--run_mode=store_teacher"),
        f"--gin.STORE_SPARSIFICATION='@stored_distributions.{sparsification}()'".replace("'", ""),
    ]
    status, out, err = run_main(*flags)
    assert status == 0, err
    assert out.startswith(f"written: {tmp_path / 'store'}: ")
    assert "a token (float32 of the whole vocabulary: 400)" in out
    no_teacher = {name: None for name in recipe.settings if name.startswith("TEACHER")}
    flags = [
        *recipe.flags(tmp_path / "run", **no_teacher),
        *("--gin_file=gin_configs/methods/stored_teacher.gin", store),
    ]
    status, out, err = run_main(*flags)
    assert status == 0, err
    assert "eval/bleu: " in out
    names = {name for row in small_runs.metrics(tmp_path / "run") for name in row}
    assert "train/data/loss" in names


_TASKS = """
    import seqio
    import tensorflow as tf

    VOCABULARY = seqio.SentencePieceVocabulary({vocabulary!r}, extra_ids=0)
    FEATURES = {{
        "inputs": seqio.Feature(VOCABULARY, add_eos=True),
        "targets": seqio.Feature(VOCABULARY, add_eos=True),
    }}

    def count_right(targets, predictions):
        right = sum(target == prediction for target, prediction in zip(targets, predictions))
        return {{"right": 100.0 * right / len(targets)}}

    def to_text(example):
        return {{"inputs": example["en"], "targets": example["de"]}}

    def lines(split, shuffle_files=False):
        paths = {paths!r}[split]
        pair = tuple(tf.data.TextLineDataset(path) for path in paths)
        return tf.data.Dataset.zip(pair).map(lambda en, de: {{"en": en, "de": de}})

    seqio.TaskRegistry.add(
        "users_translation",
        source=seqio.FunctionDataSource(lines, splits=("train", "validation")),
        preprocessors=[
            seqio.map_over_dataset(to_text),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        metric_fns=[count_right],
    )
"""


@pytest.mark.slow
def test_seqio_task_of_a_users_module(tmp_path, monkeypatch):
    """Named by MIXTURE_OR_TASK_NAME and MIXTURE_OR_TASK_MODULE, in a process of its own."""
    pytest.importorskip("seqio")
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    files = {
        key: recipe.settings[key] for key in recipe.settings if "INPUTS" in key or "TARGETS" in key
    }
    paths = {
        split: (files[f"{split.upper()}_INPUTS"], files[f"{split.upper()}_TARGETS"])
        for split in ("train", "validation")
    }
    source = _TASKS.format(vocabulary=recipe.settings["VOCABULARY_PATH"], paths=paths)
    (tmp_path / "users_tasks.py").write_text(textwrap.dedent(source))
    changes = dict.fromkeys(files) | {
        "MIXTURE_OR_TASK_NAME": "users_translation",
        "MIXTURE_OR_TASK_MODULE": "users_tasks",
        "Checkpoints.best_metric": "right",
        **ON_POLICY,
    }
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model_dir = tmp_path / "run"
    for steps in (10, 20):
        process = processes.start(
            recipe.flags(model_dir, TRAIN_STEPS=steps, **changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, log = process.communicate()
        assert process.returncode == 0, log
        assert "eval/right: " in output
    assert "resuming after step 10 of 20" in log
    rows = small_runs.metrics(model_dir)
    assert rows[-1]["step"] == 20
    assert "eval/right" in rows[-1]
    scores = json.loads((model_dir / "eval" / "scores_20.json").read_text())
    assert scores["right"]["value"] == rows[-1]["eval/right"]
