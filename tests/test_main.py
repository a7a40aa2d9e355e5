"""The command line: flags, run modes, and errors that end in one message."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from gkd_jax import main
from gkd_jax.data.metrics.score import Score
from gkd_jax.experiment import Experiment
from gkd_jax.run_modes import dry_run, evaluate, generate, study, train
from gkd_jax.run_modes.evaluate import EvalResult
from gkd_jax.run_modes.train import TrainResult

_EXPERIMENT = """
from __gin__ import dynamic_registration
from gkd_jax import data
from gkd_jax import experiment
from gkd_jax import models
from gkd_jax import objectives
from gkd_jax.data import vocabularies
from gkd_jax.distillation import optimizers

MODEL_DIR = %gin.REQUIRED
BETA = 0.5
experiment.Experiment:
  model_dir = %MODEL_DIR
  student = @experiment.Student()
  objective = @objectives.Objective()
  train_data = @train/data.DatasetConfig()
  optimizer = @optimizers.AdamW()
  num_steps = 3
experiment.Student.model = @models.T5()
models.T5.config = @models.T5Config()
models.T5Config:
  vocab_size = 260
  emb_dim = 8
  num_heads = 2
  head_dim = 4
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
objectives.Objective.divergence = @objectives.GeneralizedJSD()
objectives.GeneralizedJSD.beta = %BETA
train/data.DatasetConfig:
  task = 'none'
  split = 'train'
  feature_lengths = {'inputs': 8, 'targets': 8}
  batch_size = 4
  vocabulary = @vocabularies.ByteVocabulary()
optimizers.AdamW.schedule = @optimizers.Constant()
optimizers.Constant.learning_rate = 0.001
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process; returns exit status, what it printed, what it ran."""
    gin_file = tmp_path / "experiment.gin"
    gin_file.write_text(_EXPERIMENT)
    calls = []

    def record(name, result):
        def call(experiment, *, before_start=None, **kwargs):
            calls.append((name, experiment, kwargs))
            if before_start is not None:
                before_start()
            return result

        return call

    score = Score(33.25, standard_error=0.5)
    monkeypatch.setattr(train, "train", record("train", TrainResult(None, {"bleu": 33.25})))
    monkeypatch.setattr(evaluate, "evaluate", record("eval", EvalResult({"bleu": score}, [])))
    monkeypatch.setattr(generate, "generate", record("generate", "outputs.jsonl"))
    monkeypatch.setattr(dry_run, "dry_run", record("dry_run", "the plan"))
    monkeypatch.setattr(study, "run_study", record("study", []))

    def run_main(*arguments, gin_files=(str(gin_file),)):
        calls.clear()
        argv = ["main", *(f"--gin_file={file}" for file in gin_files), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        status = 0
        with flagsaver.flagsaver():
            try:
                main.main(flags.FLAGS(main.rewrite_gin_flags(argv)))
            except SystemExit as error:
                status = error.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err, list(calls)

    return run_main


def _model_dir_flag(tmp_path):
    return f"--gin.MODEL_DIR='{tmp_path}/run'"


def test_gin_flags_are_rewritten_in_order():
    argv = ["main", "--gin.A=1", "--gin_bindings=B = 2", "--gin.s/m.C.d={'x': 1}", "--dry_run"]
    assert main.rewrite_gin_flags(argv) == [
        "main",
        "--gin_bindings=A = 1",
        "--gin_bindings=B = 2",
        "--gin_bindings=s/m.C.d = {'x': 1}",
        "--dry_run",
    ]
    with pytest.raises(ValueError, match="must have a value after '='"):
        main.rewrite_gin_flags(["--gin.A"])


def test_trains_by_default_and_saves_the_configuration(run, tmp_path):
    flag = _model_dir_flag(tmp_path)
    status, out, _, calls = run(flag, "--gin.BETA=0.1")
    assert status == 0
    assert out == "eval/bleu: 33.25\n"
    ((name, experiment, _),) = calls
    assert name == "train"
    assert type(experiment) is Experiment
    assert experiment.objective.divergence.beta == 0.1
    saved = tmp_path / "run" / "config.gin"
    assert "--gin.BETA=0.1" in saved.read_text().splitlines()[1]

    # The saved file alone gives the same run, in place and elsewhere.
    status, _, _, calls = run(gin_files=[str(saved)])
    assert (status, calls[0][1]) == (0, experiment)
    status, _, err, calls = run(f"--gin.MODEL_DIR='{tmp_path}/other'", gin_files=[str(saved)])
    assert (status, calls[0][1].objective) == (0, experiment.objective), err


def test_changed_configuration_is_refused_unless_accepted(run, tmp_path):
    flag = _model_dir_flag(tmp_path)
    assert run(flag)[0] == 0
    assert run(flag, "--gin.Experiment.num_steps=6")[0] == 0
    status, _, err, calls = run(flag, "--gin.BETA=0.9")
    assert (status, calls) == (2, [])
    assert "-objective.divergence.beta = 0.5" in err
    assert "+objective.divergence.beta = 0.9" in err
    status, _, _, calls = run(flag, "--gin.BETA=0.9", "--allow_changed_config")
    assert (status, len(calls)) == (0, 1)
    assert len(list((tmp_path / "run").glob("config.*.gin"))) == 2


@pytest.mark.parametrize(
    ("mode", "printed"),
    [("eval", "bleu: "), ("generate", "written: outputs.jsonl\n"), ("train", "eval/bleu: 33.25\n")],
)
def test_run_modes(run, tmp_path, mode, printed):
    status, out, _, calls = run(_model_dir_flag(tmp_path), f"--run_mode={mode}")
    assert (status, [name for name, *_ in calls]) == (0, [mode])
    assert out.startswith(printed)
    assert (tmp_path / "run" / "config.gin").exists() == (mode == "train")


def test_dry_run_runs_nothing(run, tmp_path):
    status, out, _, calls = run(_model_dir_flag(tmp_path), "--dry_run", "--run_mode=eval")
    assert (status, out) == (0, "the plan\n")
    assert [(name, kwargs) for name, _, kwargs in calls] == [("dry_run", {"run_mode": "eval"})]
    assert not (tmp_path / "run").exists()


def test_a_study_is_run_as_one(run, tmp_path):
    text = _EXPERIMENT + (
        "from gkd_jax.run_modes import study\n"
        "study.Study.cells = (@sft/study.Cell(),)\n"
        "study.Study.model_dir = %MODEL_DIR\n"
        "study.Study.test = @experiment.Evaluation()\n"
        "study.Study.metric = 'bleu'\n"
        "sft/study.Cell.name = 'sft'\n"
        "sft/study.Cell.experiment = @experiment.Experiment()\n"
        "experiment.Evaluation.data = @train/data.DatasetConfig()\n"
    )
    (tmp_path / "study.gin").write_text(text)
    files = [str(tmp_path / "study.gin")]
    flag = _model_dir_flag(tmp_path)
    status, out, err, calls = run(flag, gin_files=files)
    assert (status, [name for name, *_ in calls]) == (0, ["study"]), err
    assert out.startswith("| run |")
    status, _, err, calls = run(flag, "--run_mode=train", gin_files=files)
    assert (status, calls) == (2, [])
    assert "bind a Study" in err


_WRONG = {
    "missing value": ([], "--gin.MODEL_DIR=..."),
    "misspelt macro": (["--gin.MODEL_DIR='x'", "--gin.BETTA=1"], "Did you mean 'BETA'?"),
    "beta out of range": (["--gin.MODEL_DIR='x'", "--gin.BETA=1.5"], "beta"),
    "unexpected argument": (["x.gin"], "--gin_file"),
    "study mode without a study": (
        ["--gin.MODEL_DIR='x'", "--run_mode=study"],
        "set it to one of train, eval, generate, interactive, store_teacher, export",
    ),
}


@pytest.mark.parametrize("case", _WRONG)
def test_errors_are_one_message(run, case):
    arguments, wanted = _WRONG[case]
    status, out, err, calls = run(*arguments)
    assert (status, out, calls) == (2, "", [])
    assert err.startswith("error: ")
    assert wanted in err
    assert "Traceback" not in err


def test_missing_gin_file_is_one_message(run):
    status, _, err, _ = run(gin_files=["gin_configs/nowhere.gin"])
    assert status == 2
    assert err.startswith("error: there is no gin file 'gin_configs/nowhere.gin'")


def test_errors_of_a_run(run, tmp_path, monkeypatch):
    """What a user can mend is a message; what may be a fault of the code keeps its traceback."""
    flag = _model_dir_flag(tmp_path)

    def missing_file(experiment, **kwargs):
        pathlib.Path(tmp_path / "absent").read_text()

    monkeypatch.setattr(train, "train", missing_file)
    status, _, err, _ = run(flag)
    assert status == 2
    assert "absent" in err
    with pytest.raises(FileNotFoundError):
        run(flag, "--traceback")

    def not_finite(experiment, **kwargs):
        raise FloatingPointError("training stopped at step 3: loss not finite.")

    monkeypatch.setattr(train, "train", not_finite)
    status, _, err, _ = run(flag)
    assert (status, err) == (1, "error: training stopped at step 3: loss not finite.\n")

    def fault(experiment, **kwargs):
        raise ValueError("raised outside of the package")

    monkeypatch.setattr(train, "train", fault)
    with pytest.raises(ValueError, match="outside"):
        run(flag)


def test_exit_status_of_the_module():
    """`python -m gkd_jax.main` itself ends with the status, and a misspelt flag is refused."""
    command = [sys.executable, "-m", "gkd_jax.main"]
    misspelt = subprocess.run([*command, "--gin_fil=x"], capture_output=True, text=True)
    assert misspelt.returncode == 1
    assert "Did you mean: gin_file" in misspelt.stderr
    missing = subprocess.run([*command, "--gin_file=no.gin"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "error: there is no gin file 'no.gin'" in missing.stderr
    assert "Traceback" not in missing.stderr


_PROCESS = """
import sys
import jax
from gkd_jax import main
from gkd_jax.run_modes import train
from gkd_jax.run_modes.train import TrainResult

def report(experiment, before_start):
    before_start()
    count = len(jax.devices())
    print("process", jax.process_index(), "of", jax.process_count(), "devices", count, flush=True)
    return TrainResult(None, {"bleu": 1.0})

train.train = report
main.run()
"""


def start_two(tmp_path, *of_the_second):
    (tmp_path / "experiment.gin").write_text(_EXPERIMENT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", _PROCESS),
                f"--gin_file={tmp_path}/experiment.gin",
                _model_dir_flag(tmp_path),
                f"--coordinator_address=localhost:{port}",
                "--process_count=2",
                f"--process_index={index}",
                "--heartbeat_timeout_s=5",
                *(of_the_second if index else ()),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_processes_join_and_the_first_writes(tmp_path):
    processes = start_two(tmp_path)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [
        "process 0 of 2 devices 4\neval/bleu: 1\n",
        "process 1 of 2 devices 4\n",
    ]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.gin"]


@pytest.mark.slow
def test_a_process_that_fails_ends_with_its_status_and_the_others_after_it(tmp_path):
    """JAX would have it wait for the others for minutes, and then abort."""
    first, second = start_two(tmp_path, "--gin.BETA=7")
    message = second.communicate(timeout=60)[1]
    assert second.returncode == 2
    assert "beta" in message
    first.communicate(timeout=60)
    # As launch/ has it: LEFT_ALONE.
    assert first.returncode == -signal.SIGABRT


def test_heartbeat_timeout_is_jaxs_unless_it_is_given(run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.append(options))
    found_by_jax = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    assert run(_model_dir_flag(tmp_path), "--multiprocess")[0] == 0
    assert run(_model_dir_flag(tmp_path), "--multiprocess", "--heartbeat_timeout_s=30")[0] == 0
    assert given == [found_by_jax, found_by_jax | {"heartbeat_timeout_seconds": 30}]
    status, _, message, _ = run(_model_dir_flag(tmp_path), "--heartbeat_timeout_s=30")
    assert status == 2
    assert "--heartbeat_timeout_s is for several processes" in message
