"""Runs whose folder is in a bucket, against a server that answers as Google Cloud Storage does."""

import json
import subprocess
import sys

import fake_gcs
import processes
import pytest
import small_runs
import test_kill_and_resume as kills

from gkd_jax.checkpoints import last_step
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.common.growing_files import GrowingFile
from gkd_jax.experiment import prepare


@pytest.fixture
def bucket(monkeypatch):
    """One that this process and those that it starts see as gs://runs."""
    pytest.importorskip("gcsfs")
    from etils.epath import gpath

    # TensorFlow knows Google's own server alone.
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    with fake_gcs.serve() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        forget_filesystem()
        yield bucket
        forget_filesystem()


def forget_filesystem():
    """Which has the server's address, and keeps listings."""
    import fsspec
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def test_a_local_file_grows_at_once(tmp_path):
    path = tmp_path / "folder" / "file"
    file = GrowingFile(path)
    file.append(b"one")
    assert path.read_bytes() == b"one"
    file.close()
    file = GrowingFile(path)
    file.append(b" two")
    assert path.read_bytes() == b"one two"
    file.close()
    file = GrowingFile(path, b"three")
    assert path.read_bytes() == b"three"
    file.close()
    assert [child.name for child in path.parent.iterdir()] == ["file"]


def test_an_object_is_written_whole(bucket, monkeypatch):
    def content():
        return bucket.objects["folder/file"][0]

    file = GrowingFile("gs://runs/folder/file", b"one")
    assert content() == b"one"
    file.append(b" two")
    assert content() == b"one"  # Not yet.
    file.sync()
    assert content() == b"one two"
    monkeypatch.setattr(file, "_due_time", 0.0)
    file.append(b" three")
    assert content() == b"one two three"
    file.close()
    file = GrowingFile("gs://runs/folder/file")
    file.append(b" four")
    file.close()
    assert content() == b"one two three four"


def test_a_folder_that_cannot_be_listed_is_not_taken_to_be_empty(bucket, monkeypatch):
    """Or a run would begin anew where its checkpoints could not be seen for a moment."""
    manager = CheckpointManager("gs://runs/run", read_only=True)
    assert manager.latest_step() is None
    forget_filesystem()
    monkeypatch.setattr(bucket, "status", 403)
    with pytest.raises(Exception, match=r"(?i)forbidden|403"):
        manager.latest_step()


def test_a_bucket_that_cannot_be_written_is_told_before_a_run(bucket):
    experiment = small_runs.sft("gs://runs/run")
    assert "model_dir" not in str(_problems(experiment))
    assert not bucket.objects
    bucket.status = 404
    problems = _problems(experiment)
    assert "Experiment.model_dir cannot be written: gs://runs/run" in str(problems)
    assert "Is that the bucket's name, and may you write there?" in str(problems)


def _problems(experiment):
    try:
        prepare.prepare(experiment, run_mode="train")
    except prepare.ConfigurationError as error:
        return error
    return None


def flags(model_dir, **settings):
    settings = {
        "MODEL_DIR": str(model_dir),
        "TRAIN_STEPS": 16,
        "WARMUP_STEPS": 1,
        "CHECKPOINT_PERIOD": 4,
        "EVAL_PERIOD": 8,
        "Experiment.log_period": 1,
        "recipes.arithmetic.num_train": 200,
        "recipes.arithmetic.num_heldout": 40,
        "student/models.T5Config.emb_dim": 32,
    } | settings
    return [
        "--gin_file=gin_configs/sft/arithmetic.gin",
        *(f"--gin.{name}={value!r}" for name, value in settings.items()),
    ]


def start(given):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return processes.start(given, **pipes)


def finish(process):
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return output


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_is_the_run_in_a_folder(bucket, tmp_path):
    """Checkpoints, metrics and predictions; generation reads and writes there too."""
    whole = tmp_path / "whole"
    finish(start(flags(whole)))

    process = start(flags("gs://runs/run"))
    for line in process.stderr:
        if line.startswith("step 11/16"):
            process.kill()
            break
    process.communicate()
    killed = last_step.read_progress(_path("gs://runs/run"))
    assert 4 <= killed.last_step <= 12
    assert not killed.done
    finish(start(flags("gs://runs/run")))

    asked = subprocess.run(
        [sys.executable, "-m", "gkd_jax.checkpoints.last_step", "gs://runs/run"],
        cwd=processes.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(asked.stdout) == {"last_step": 16, "train_steps": 16, "done": True}

    # Copied from the bucket it is the other run, but for the time of day.
    copy = tmp_path / "copy"
    for name, (content, _) in bucket.objects.items():
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    copy = copy / "run"
    one, other = (kills.all_arrays(folder / "checkpoint_16") for folder in (whole, copy))
    small_runs.assert_equal_bits(one, other)
    assert small_runs.metrics(copy) == small_runs.metrics(whole)
    names = {path.name for path in (whole / "eval").glob("predictions_*")}
    assert len(names) == 3
    for name in names:
        assert (copy / "eval" / name).read_bytes() == (whole / "eval" / name).read_bytes()
    assert {path.name for path in copy.glob("checkpoint_*")} == {
        path.name for path in whole.glob("checkpoint_*")
    }

    settings = {"GENERATION_OUTPUT": "gs://runs/outputs.jsonl", "Generation.model": "student"}
    generation = ["--gin_file=gin_configs/generate.gin", "--run_mode=generate"]
    finish(start([*flags("gs://runs/run", **settings), *generation]))
    assert bucket.objects["outputs.jsonl"][0].count(b"\n") == 200


def _path(name):
    from etils import epath

    return epath.Path(name)


@pytest.mark.slow
def test_a_bucket_that_refuses_is_told_by_the_command(bucket):
    bucket.status = 403
    process = start(flags("gs://runs/run"))
    log = process.communicate(timeout=300)[1]
    assert process.returncode == 2, log
    assert "error: Experiment.model_dir cannot be read: gs://runs/run/config.gin" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_bucket_that_vanishes_ends_the_run_with_a_message(bucket):
    process = start(flags("gs://runs/run", TRAIN_STEPS=2000, EVAL_PERIOD=2000))
    for line in process.stderr:
        if "saved checkpoint gs://runs/run/checkpoint_8" in line:
            bucket.status = 404
            break
    log = process.communicate(timeout=300)[1]
    assert process.returncode == 1, log
    assert "gs://runs/run/metrics.jsonl could not be written" in log
    assert "Is the bucket still there" in log
    bucket.status = 200
    assert last_step.read_progress(_path("gs://runs/run")).last_step >= 8
