"""What a user can get wrong: one clear message that names setting and remedy, before any step."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import small_recipes
import small_runs
from small_recipes import Gin, run_main

from gkd_jax.checkpoints.save import save_params
from gkd_jax.data import vocabularies
from gkd_jax.data.train_vocabulary import train_sentencepiece
from gkd_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from gkd_jax.distillation.teachers import Teacher
from gkd_jax.experiment import Checkpoints, Evaluation, Student
from gkd_jax.experiment.prepare import ConfigurationError
from gkd_jax.run_modes import train
from gkd_jax.run_modes.dry_run import dry_run


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return {name: small_recipes.make_recipe(name, folder / name) for name in _RECIPES}


_RECIPES = ("wmt_ende", "gsm8k", "flan2021")


@pytest.fixture(autouse=True)
def no_training_step(monkeypatch):
    """Whatever is refused here is refused before any training step."""

    def step(*args):
        raise AssertionError("a training step was made")

    monkeypatch.setattr(train.Trainer, "step", step)


def refused(arguments: list[str], *wanted: str) -> None:
    """The command ends with status 2 and one message that has all that is wanted."""
    status, out, err = run_main(*arguments)
    assert status == 2, err
    message = err[err.index("error: ") :]
    assert "Traceback" not in err
    for text in wanted:
        assert text in message, message
    assert out == ""


@pytest.fixture
def other_file(tmp_path):
    """Writes a file of the given text and returns its path."""

    def write(text: str | bytes, name: str = "file.txt") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# Recipe, changed settings, and parts of the message: the setting, what came, the remedy.
_SETTINGS = {
    "misspelt binding": (
        "wmt_ende", {"OutputMix.student_data_fractoin": 0.5},
        ("student_data_fractoin", "Did you mean", "student_data_fraction"),
    ),
    "misspelt macro": ("wmt_ende", {"BETTA": 0.5}, ("BETTA", "Did you mean 'BETA'")),
    "unused macro": ("wmt_ende", {"MY_OWN": 1}, ("MY_OWN",)),
    "missing data file": (
        "wmt_ende", {"TRAIN_INPUTS": "/nowhere/train.en"},
        ("ParallelText.inputs_path", "'/nowhere/train.en'", "Correct the path"),
    ),
    "missing vocabulary file": (
        "wmt_ende", {"VOCABULARY_PATH": "/nowhere/spm.model"},
        ("SentencePieceVocabulary.path", "'/nowhere/spm.model'"),
    ),
    "missing teacher": (
        "wmt_ende", {"TEACHER_CHECKPOINT_PATH": "/nowhere/teacher"},
        ("Teacher.checkpoint", "/nowhere/teacher", "does not exist"),
    ),
    "missing initial checkpoint": (
        "wmt_ende", {"INITIAL_CHECKPOINT_PATH": "/nowhere/student"},
        ("Student.initial_checkpoint", "/nowhere/student", "does not exist"),
    ),
    "student of another shape": (
        "wmt_ende", {"STUDENT_DIM": 32},
        ("Student.initial_checkpoint", "does not fit", "[16], wanted [32]", "Set the"),
    ),
    "teacher of another shape": (
        "wmt_ende", {"TEACHER_LAYERS": 2},
        ("Teacher.checkpoint", "does not fit", "layers_1", "is missing", "Set the"),
    ),
    "more pieces than the output layer": (
        "wmt_ende", {"VOCAB_SIZE": 50},
        ("vocab_size", "50 and 100", "to 100 or more"),
    ),
    "batch and mesh": (
        "wmt_ende", {"Partitioner.data_parallelism": 8, "BATCH_SIZE": 12},
        ("batch_size must be divisible by", "12 and 8", "multiple of 8"),
    ),
    "batch and microbatches": (
        "wmt_ende", {"NUM_MICROBATCHES": 3},
        ("batch_size must be divisible by", "4 and 1 * 3", "multiple of 3"),
    ),
    "beta above 1": (
        "wmt_ende", {"BETA": 1.5}, ("GeneralizedJSD.beta", "1.5", "ReverseKL"),
    ),
    "beta of 0": ("wmt_ende", {"BETA": 0.0}, ("GeneralizedJSD.beta", "0.0", "ForwardKL")),
    "lambda above 1": (
        "wmt_ende", {"STUDENT_DATA_FRACTION": 1.5},
        ("OutputMix.student_data_fraction (lambda)", "1.5", "inside that range"),
    ),
    "lambda below 0": (
        "wmt_ende", {"STUDENT_DATA_FRACTION": -0.1},
        ("OutputMix.student_data_fraction (lambda)", "-0.1", "inside that range"),
    ),
    "sampling at temperature 0": (
        "wmt_ende", {"SAMPLING_TEMPERATURE": 0.0},
        ("Sample.temperature must be above 0", "Greedy()"),
    ),
    "teacher's temperature 0": (
        "wmt_ende", {"TEACHER_TEMPERATURE": 0.0},
        ("Objective.teacher_temperature", "above 0"),
    ),
    "student's temperature 0": (
        "wmt_ende", {"STUDENT_TEMPERATURE": 0.0},
        ("Objective.student_temperature", "above 0"),
    ),
    "lengths that leave nothing": (
        "wmt_ende", {"TASK_FEATURE_LENGTHS": {"inputs": 1, "targets": 16}},
        ("feature_lengths['inputs']", "at least 2", "Set it"),
    ),
    "lengths that cut all to one text": (
        "wmt_ende", {"TASK_FEATURE_LENGTHS": {"inputs": 4, "targets": 16}},
        ("feature_lengths['inputs'] = 4", "cuts every prompt", "Set it higher"),
    ),
    "unknown split": ("wmt_ende", {"EVAL_SPLIT": "dev"}, ("'dev'", "'validation'")),
    "cross-entropy on samples": (
        "wmt_ende", {"DIVERGENCE": Gin("@objectives.NegativeLogLikelihood()")},
        ("student_data_fraction to 0",),
    ),
    "packed prompts to answer": (
        "wmt_ende", {"train/data.DatasetConfig.pack": True},
        ("DatasetConfig.pack", "student_data_fraction=1.0", "(STUDENT_DATA_FRACTION) to 0.0"),
    ),
    "packed evaluation": (
        "wmt_ende", {"data.DatasetConfig.pack": True, "STUDENT_DATA_FRACTION": 0.0},
        ("DatasetConfig.pack", "Evaluation.data", "train/data.DatasetConfig.pack = True"),
    ),
    "more data than there is": (
        "wmt_ende", {"DatasetConfig.num_examples": 1000}, ("num_examples is 1000", "at most 64"),
    ),
    "no rollout": (
        "wmt_ende", {"Experiment.rollout": Gin("None")},
        ("Experiment.rollout", "Rollout; got None", "leave the setting out"),
    ),
    "no objective": (
        "wmt_ende", {"Experiment.objective": Gin("None")},
        ("Experiment.objective", "Objective; got None", "Set Experiment.objective to one"),
    ),
    "a number for what holds it": (
        "wmt_ende", {"Experiment.outputs": 0.5},
        ("Experiment.outputs", "OutputMix; got 0.5", "with brackets"),
    ),
    "a model of None": (
        "wmt_ende", {"Student.model": Gin("None")}, ("Student.model", "got None"),
    ),
    "missing field": (
        "gsm8k", {"gsm8k.question_field": "problem"}, ("'problem'", "'question', 'answer'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _SETTINGS)
def test_wrong_settings(case, recipes, tmp_path):
    name, changes, wanted = _SETTINGS[case]
    refused(recipes[name].flags(tmp_path / "run", **changes), *wanted)
    # Nothing is left behind: the corrected command is not another configuration.
    assert not (tmp_path / "run").exists()


# Recipe, the setting that names a file, what the file holds, and parts of the message.
_FILES = {
    "empty file": (
        "wmt_ende", "TRAIN_INPUTS", "",
        ("ParallelText.inputs_path names an empty file", "Give a file"),
    ),
    "no example": ("gsm8k", "TRAIN_PATH", "\n\n", ("JsonLines.path", "empty data set", "Give")),
    "line counts": (
        "wmt_ende", "TRAIN_TARGETS", "der hund\n" * 63,
        ("ParallelText wants as many lines", "64 (", "63 (", "no line was lost"),
    ),
    "broken JSON": (
        "gsm8k", "TRAIN_PATH",
        '{"question": "1+1?", "answer": "#### 2"}\n' * 2 + '{"question": "1+2?", "answer": \n',
        ("JsonLines.path", "broken JSON line", "line 3", "Correct or remove"),
    ),
    "no JSON object": (
        "gsm8k", "TEST_PATH", '{"question": "1+1?", "answer": "#### 2"}\n[1, 2]\n',
        ("JsonLines.path", "line 2", "list", "Correct or remove"),
    ),
    "missing TSV column": (
        "flan2021", "TRAIN_PATH", "a question\tan answer\ta reason\na question\tan answer\n",
        ("Tsv.path", "line 2 has 2 columns where 3 are wanted", "input, answer, rationale"),
    ),
    "no vocabulary": (
        "wmt_ende", "VOCABULARY_PATH", "these are words, not a model",
        ("SentencePieceVocabulary.path", "not a SentencePiece model", "train_vocabulary"),
    ),
    "no UTF-8": ("wmt_ende", "TRAIN_INPUTS", b"caf\xe9\n" * 64, ("ParallelText", "UTF-8")),
    "no checkpoint": (
        "wmt_ende", "TEACHER_CHECKPOINT_PATH", "weights",
        ("Teacher.checkpoint", "is not a checkpoint"),
    ),
    "MODEL_DIR is a file": (
        "wmt_ende", "MODEL_DIR", "in the way", ("model_dir", "cannot be written", "Set MODEL_DIR")
    ),
    "MODEL_DIR below a file": (
        "wmt_ende", "MODEL_DIR", "in the way", ("model_dir", "cannot be written", "Set MODEL_DIR")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _FILES)
def test_wrong_files(case, recipes, tmp_path, other_file):
    name, setting, content, wanted = _FILES[case]
    path = other_file(content) + ("/run" if "below" in case else "")
    recipe = recipes[name]
    if setting == "MODEL_DIR":
        refused(recipe.flags(pathlib.Path(path)), *wanted)
    else:
        refused(recipe.flags(tmp_path / "run", **{setting: path}), *wanted)
        assert not (tmp_path / "run").exists()


def test_missing_gin_file(recipes, tmp_path):
    arguments = ["--gin_file=gin_configs/wmt_ened.gin", *recipes["wmt_ende"].flags(tmp_path)]
    refused(
        arguments, "there is no gin file 'gin_configs/wmt_ened.gin'", "'gin_configs/wmt_ende.gin'?"
    )


def test_all_that_is_wrong_is_said_at_once(recipes, tmp_path):
    arguments = recipes["wmt_ende"].flags(
        tmp_path / "run",
        TRAIN_INPUTS="/nowhere/train.en",
        VALIDATION_INPUTS="/nowhere/val.en",
        TEACHER_CHECKPOINT_PATH="/nowhere/teacher",
        STUDENT_DIM=32,
        BATCH_SIZE=6,
        NUM_MICROBATCHES=4,
    )
    wanted = (
        "5 things are wrong", "/nowhere/train.en", "/nowhere/val.en", "/nowhere/teacher",
        "does not fit", "6 and 1 * 4",
    )  # fmt: skip
    refused(arguments, *wanted)
    refused([*arguments, "--dry_run"], *wanted)


def test_dry_run_describes_the_plan_and_makes_nothing(recipes, tmp_path, monkeypatch):
    """With the overrides that the README shows."""
    monkeypatch.setattr(train, "Trainer", None)
    recipe = recipes["wmt_ende"]
    status, out, err = run_main(
        *recipe.flags(tmp_path / "run", STUDENT_DATA_FRACTION=0.5),
        "--gin.DIVERGENCE=@objectives.ForwardKL()",
        "--dry_run",
    )
    assert status == 0, err
    for name, width in (
        ("student", small_recipes.STUDENT_WIDTH),
        ("teacher", small_recipes.TEACHER_WIDTH),
    ):
        params = small_recipes.t5(width, recipe.settings["VOCAB_SIZE"]).abstract_params()
        number = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert (
            f"{name}: {number:,} parameters, from {recipe.settings['VOCABULARY_PATH'][:-9]}" in out
        )
    for text in (
        "ForwardKL()", "student_data_fraction=0.5", "steps: 4 of 4 examples", "64 examples",
        "evaluation: 10 examples every 10 steps", "BeamSearch",
    ):  # fmt: skip
        assert text in out, out
    assert not (tmp_path / "run").exists()


def damage_truncate(path: pathlib.Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def damage_flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


_DAMAGE = {"truncated": (damage_truncate, "bytes"), "flipped bit": (damage_flip, "SHA-256")}


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", _DAMAGE)
@pytest.mark.parametrize("setting", ["INITIAL_CHECKPOINT_PATH", "TEACHER_CHECKPOINT_PATH"])
def test_damaged_checkpoints(damage, setting, recipes, tmp_path):
    recipe = recipes["wmt_ende"]
    copy = tmp_path / "copy"
    shutil.copytree(recipe.settings[setting], copy)
    change, named = _DAMAGE[damage]
    change(largest_file(copy / "arrays"))
    arguments = recipe.flags(tmp_path / "run", **{setting: str(copy)})
    refused(arguments, str(copy), named)


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_checkpoint_of_the_run_itself(damage, tiny_teacher, tmp_path):
    """The only one: there is none to fall back to."""
    run = tmp_path / "run"
    shutil.copytree(tiny_teacher, run)
    change, named = _DAMAGE[damage]
    change(largest_file(run / "checkpoint_5" / "arrays"))
    student = small_runs.Student(small_runs.model(small_runs.TEACHER_WIDTH))
    experiment = small_runs.sft(run, student=student, num_steps=6)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used") as error:
        train.train(experiment)
    assert named in str(error.value)
    assert "set MODEL_DIR to a new directory" in str(error.value)


def test_a_run_of_other_shapes_in_model_dir(tiny_teacher, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_teacher, run)
    with pytest.raises(ValueError, match=r"does not fit: .* wanted .* Set the model"):
        train.train(small_runs.sft(run, num_steps=6))


@pytest.mark.pitfall(37)
def test_a_vocabulary_that_is_not_the_teachers(recipes, tmp_path):
    """Of the same size, by name, and by what the teacher's own checkpoint tells."""
    recipe = recipes["wmt_ende"]
    texts = [f"other words {word} {number}" for number in range(200) for word in ("xyz", "qux")]
    vocab_size = recipe.settings["VOCAB_SIZE"]
    other = train_sentencepiece(
        texts, tmp_path / "other", vocab_size=vocab_size, model_type="bpe",
        byte_fallback=False,
    )  # fmt: skip
    wanted = (
        "Student and teacher must share one vocabulary",
        f"{recipe.settings['VOCABULARY_PATH']}",
        f"{other}",
        "Give the student the teacher's vocabulary",
    )
    teachers = tmp_path / "teachers.gin"
    teachers.write_text(
        "from __gin__ import dynamic_registration\n"
        "from gkd_jax.distillation import teachers\n"
        "from gkd_jax.data import vocabularies\n"
        "teachers.Teacher.vocabulary = @teacher/vocabularies.SentencePieceVocabulary()\n"
        f"teacher/vocabularies.SentencePieceVocabulary.path = {str(other)!r}\n"
    )
    refused([*recipe.flags(tmp_path / "run"), f"--gin_file={teachers}"], *wanted)

    vocabulary = SentencePieceVocabulary(str(other))
    trained = tmp_path / "trained_teacher"
    params = small_recipes.init_params(small_recipes.TEACHER_WIDTH, vocab_size)
    save_params(trained, params, {"vocabulary": vocabularies.describe_vocabulary(vocabulary)})
    refused(
        recipe.flags(tmp_path / "run", TEACHER_CHECKPOINT_PATH=str(trained)),
        "Teacher.checkpoint", "was trained with another vocabulary", str(other),
        str(recipe.settings["VOCABULARY_PATH"]), "VOCABULARY_PATH",
    )  # fmt: skip


def test_a_run_records_its_vocabulary(tiny_teacher, tmp_path):
    """So that the check above works for every teacher that gkd_jax trained."""

    @dataclasses.dataclass(frozen=True)
    class ShiftedBytes(ByteVocabulary):
        fingerprint = "0123456789abcdef"
        name = "ShiftedBytes()"

    experiment = small_runs.gkd(tmp_path, tiny_teacher, evaluation=None)
    data = dataclasses.replace(experiment.train_data, vocabulary=ShiftedBytes())
    with pytest.raises(ConfigurationError) as error:
        train.train(dataclasses.replace(experiment, train_data=data))
    (problem,) = error.value.problems
    assert "ByteVocabulary()" in problem
    assert "ShiftedBytes()" in problem


@pytest.mark.pitfall(36)
def test_teacher_with_another_output_layer(tmp_path):
    """Accepted where its vocabulary is known, refused where nothing tells that it is padding."""

    def plan(size: int, vocabulary=None, recorded=None):
        model = small_runs.model(small_runs.TEACHER_WIDTH, vocab_size=size)
        folder = tmp_path / f"teacher_{size}_{recorded is None}"
        if not folder.exists():
            described = {} if recorded is None else {"vocabulary": recorded}
            save_params(folder, model.init(jax.random.key(0)), described)
        teacher = Teacher(model, str(folder), vocabulary)
        student = Student(small_runs.model(vocab_size=264))
        experiment = small_runs.gkd(tmp_path, folder, student=student, evaluation=None)
        return dry_run(dataclasses.replace(experiment, teacher=teacher))

    with pytest.raises(
        ConfigurationError, match=r"got 300 \(teacher\) and 264 \(student\)"
    ) as error:
        plan(300)
    assert "set Teacher.vocabulary" in str(error.value)
    with pytest.raises(ConfigurationError, match=r"teacher's vocab_size .* got 200 and 259"):
        plan(200, ByteVocabulary())
    assert "padding" not in plan(264)
    line = "output layers of 264 (student) and 300 (teacher) entries"
    assert line in plan(300, ByteVocabulary())
    recorded = vocabularies.describe_vocabulary(ByteVocabulary())
    assert line in plan(300, recorded=recorded)
    cut = plan(259, ByteVocabulary())
    assert "over the first 259" in cut
    assert "student's last 5 are not trained" in cut


def test_evaluation_with_another_vocabulary_or_batch(tiny_teacher, tmp_path):
    evaluation = Evaluation(small_runs.data("validation", batch_size=6))
    partitioner = dataclasses.replace(small_runs.one_device(), data_parallelism=4, devices=None)
    experiment = small_runs.gkd(
        tmp_path, tiny_teacher, evaluation=evaluation, partitioner=partitioner, num_microbatches=1
    )
    with pytest.raises(ConfigurationError, match="got 6 and 4"):
        train.train(experiment)


def test_another_configuration_in_model_dir(recipes, tmp_path, monkeypatch):
    """Refused with the difference; what stopped before its start has left no configuration."""
    recipe = recipes["wmt_ende"]
    run = tmp_path / "run"
    refused(recipe.flags(run, TRAIN_INPUTS="/nowhere/train.en"), "/nowhere/train.en")
    monkeypatch.setattr(train, "Trainer", None)
    with pytest.raises(TypeError):  # As far as the first thing that a run makes.
        run_main(*recipe.flags(run))
    refused(
        recipe.flags(run, BETA=0.9, SEED=3),
        "holds a run of another configuration", "-objective.divergence.beta = 0.1",
        "+objective.divergence.beta = 0.9", "+seed = 3", "--allow_changed_config",
    )  # fmt: skip


def test_checkpoints_settings():
    for wrong, named in (
        ({"period": 0}, "Checkpoints.period"),
        ({"keep": 0}, "Checkpoints.keep"),
        ({"best_mode": "most"}, "Checkpoints.best_mode"),
    ):
        with pytest.raises(ValueError, match=named):
            Checkpoints(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"BETTA": 1}, {"TRAIN_INPUTS": "/nowhere/train.en"}, {"STUDENT_DIM": 32}]
)
def test_exit_status_of_the_command_itself(changes, recipes, tmp_path):
    process = subprocess.run(
        [
            *(sys.executable, "-m", "gkd_jax.main"),
            *recipes["wmt_ende"].flags(tmp_path / "run", **changes),
        ],
        cwd=small_recipes.ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.count("error: ") == 1
    assert "Traceback" not in process.stderr
