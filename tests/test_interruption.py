"""SIGTERM between steps, in an evaluation, over two processes: saved, and gone on from there."""

import os
import signal
import subprocess

import processes
import pytest
import small_recipes
import small_runs
import test_kill_and_resume
import test_two_processes

from gkd_jax.checkpoints import last_step
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.experiment import Evaluation
from gkd_jax.run_modes import study, train
from gkd_jax.run_modes.evaluate import Evaluator
from gkd_jax.training import interruption


def terminate_at(monkeypatch, wanted):
    """SIGTERM comes while update number `wanted` is made."""
    original = train.Trainer.step

    def step(self, state, batch, step):
        if step == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state, batch, step)

    monkeypatch.setattr(train.Trainer, "step", step)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    state = train.train(small_runs.gkd(folder, tiny_teacher)).state
    return state, small_runs.metrics(folder)


# Checkpoints are due at 5 and 10, evaluations at 0, 6 and 12.
@pytest.mark.parametrize("wanted", [2, 5, 11])
def test_sigterm_saves_and_the_run_goes_on(
    tmp_path, monkeypatch, tiny_teacher, undisturbed, wanted
):
    experiment = small_runs.gkd(tmp_path / "run", tiny_teacher)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        terminate_at(patch, wanted)
        with pytest.raises(
            interruption.InterruptedRunError, match=f"after step {wanted + 1} of 12, which is saved"
        ):
            train.train(experiment)
    assert signal.getsignal(signal.SIGTERM) is before
    assert CheckpointManager(tmp_path / "run", read_only=True).latest_step() == wanted + 1
    state, metrics = undisturbed
    small_runs.assert_equal_bits(train.train(experiment).state, state)
    # An evaluation that was due when it was stopped has been made.
    assert small_runs.metrics(tmp_path / "run") == metrics
    assert last_step.read_progress(tmp_path / "run", train_steps=12).done


def test_an_evaluation_owed_to_the_last_step_is_made_once(
    tmp_path, monkeypatch, tiny_teacher, undisturbed
):
    """Its checkpoint cannot be written again, and its scores are found beside it."""
    folder = tmp_path / "run"
    experiment = small_runs.gkd(folder, tiny_teacher)
    with monkeypatch.context() as patch:
        terminate_at(patch, 11)
        with pytest.raises(interruption.InterruptedRunError):
            train.train(experiment)
    assert not last_step.read_progress(folder, train_steps=12).done
    scores = train.train(experiment).scores
    assert last_step.read_progress(folder, train_steps=12).done
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", lambda *_, **__: pytest.fail("evaluated again"))
        again = train.train(experiment).scores
    assert again == scores
    assert small_runs.metrics(folder) == undisturbed[1]


def test_sigterm_twice_at_an_owed_evaluation(tmp_path, monkeypatch, tiny_teacher, undisturbed):
    experiment = small_runs.gkd(tmp_path / "run", tiny_teacher)
    with monkeypatch.context() as patch:
        terminate_at(patch, 5)
        with pytest.raises(interruption.InterruptedRunError):
            train.train(experiment)
    with monkeypatch.context() as patch:
        original = Evaluator.__call__

        def evaluate(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

        patch.setattr(Evaluator, "__call__", evaluate)
        with pytest.raises(interruption.InterruptedRunError, match="after step 7"):
            train.train(experiment)
    state, metrics = undisturbed
    small_runs.assert_equal_bits(train.train(experiment).state, state)
    assert small_runs.metrics(tmp_path / "run") == metrics


@pytest.mark.slow
def test_a_study_is_stopped_between_its_runs(tmp_path, monkeypatch, tiny_teacher):
    """What is told after a run's last step is known in the next; a second start makes the rest."""
    cells = tuple(
        study.Cell(name, small_runs.sft(tmp_path / name, num_steps=3)) for name in ("a", "b")
    )
    plan = study.Study(
        cells=cells, model_dir=str(tmp_path / "study"), test=Evaluation(small_runs.data("test")),
        metric="gsm8k_accuracy",
    )  # fmt: skip
    original = train._Loop.close

    def close(self, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "close", close)
        with pytest.raises(interruption.InterruptedRunError, match="after the run a of the study"):
            study.run_study(plan)
    assert [row.name for row in study.run_study(plan)] == ["a", "b"]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch, tiny_teacher):
    experiment = small_runs.gkd(tmp_path / "run", tiny_teacher)
    original = train._Loop.__init__

    def init(self, *args):
        original(self, *args)
        monkeypatch.setattr(interruption.Interruption, "is_due", lambda self: True)

    monkeypatch.setattr(train._Loop, "__init__", init)
    with pytest.raises(interruption.InterruptedRunError, match="when there was nothing to save"):
        train.train(experiment)


@pytest.mark.slow
def test_the_command_exits_with_a_status_of_its_own(tmp_path):
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    flags = recipe.flags(
        tmp_path / "run",
        **{"TRAIN_STEPS": 500, "EVAL_PERIOD": 500, "CHECKPOINT_PERIOD": 500,
           "Experiment.log_period": 1},
    )  # fmt: skip
    process = processes.start(flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = []
    for line in process.stderr:
        log.append(line)
        if line.startswith("step 3/500"):
            process.terminate()
    assert process.wait() == interruption.EXIT_STATUS, "".join(log)
    assert "Give the same command again to go on" in log[-1]


@pytest.mark.slow
def test_one_of_two_processes_is_told(tmp_path):
    """Both save the same step, and go on to what an undisturbed run of two gives."""
    recipe = small_recipes.make_recipe("wmt_ende", tmp_path / "data")
    settings = test_two_processes.SETTINGS | {
        "TRAIN_STEPS": 12, "EVAL_PERIOD": 12, "CHECKPOINT_PERIOD": 12,
    }  # fmt: skip

    def flags(name):
        return recipe.flags(tmp_path / name, **settings)

    test_two_processes.finish(test_two_processes.together(flags("whole")))
    started = test_two_processes.together(flags("cut"))
    for line in started[0].stdout:
        if line.startswith("step 3/12"):
            started[1].terminate()
            break
    outputs = [process.communicate(timeout=300)[0] for process in started]
    statuses = [process.returncode for process in started]
    assert statuses == [interruption.EXIT_STATUS] * 2, outputs
    step = CheckpointManager(tmp_path / "cut", read_only=True).latest_step()
    assert 3 <= step < 12
    test_two_processes.finish(test_two_processes.together(flags("cut")))
    whole, cut = (
        test_kill_and_resume.all_arrays(tmp_path / name / "checkpoint_12")
        for name in ("whole", "cut")
    )
    small_runs.assert_equal_bits(whole, cut)
