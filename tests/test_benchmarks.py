"""The benchmarks run: their timing, and each script at its smallest size."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_FOLDER = _ROOT / "benchmarks"

_STEPPER = """
import timing
steps = timing.StepsOnRequest()
print("what a library prints is no answer")
while steps.wait():
    total = sum(range(10_000))
    steps.answer()
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Benchmarks run as a user runs them: without the eight simulated devices of other tests."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(str(_FOLDER))
    monkeypatch.syspath_prepend(str(_ROOT))
    return importlib.import_module


def test_contestants_take_turns(load):
    timing = load("timing")
    calls = []
    times = timing.turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3
    )
    assert calls[:2] == ["a", "b"]
    assert [sorted(calls[i : i + 2]) for i in (2, 4, 6)] == [["a", "b"]] * 3
    assert {name: len(time.wall) for name, time in times.items()} == {"a": 3, "b": 3}
    assert timing.Times((1.0, 5.0, 3.0), (2.0, 4.0, 9.0)).seconds(1) == 4.0
    assert timing.Times((1.0, 5.0, 3.0), (2.0, 4.0, 9.0)).seconds(2) == 3.0


def test_processes_race(load, tmp_path):
    timing = load("timing")
    script = tmp_path / "stepper.py"
    script.write_text(_STEPPER)
    racers = {
        "good": timing.Racer((sys.executable, str(script))),
        "broken": timing.Racer((sys.executable, "-c", "raise SystemExit(1)")),
    }
    results = timing.race(racers, num_threads=1, repeats=2, warm_up=1)
    ((times, megabytes),) = results.values()
    assert list(results) == ["good"]
    assert len(times.wall) == 2
    assert 0 < times.seconds(1) < 1
    assert 1 < megabytes < 1000


def test_models_cost_what_the_peers_do(load):
    """In a step, the layers of the T5s take the operations that those of the Llamas take."""
    step, work = load("step"), load("work")
    sizes = work.Sizes()
    operations = step.flops(sizes)
    tokens = sizes.batch_size * (sizes.prompt + sizes.output)
    parameters = {}
    for name, llama in (("student", sizes.student), ("teacher", sizes.teacher)):
        layer = 4 * llama.dim**2 + 3 * llama.dim * llama.mlp_dim + 2 * llama.dim
        layers = sizes.num_layers * layer + llama.dim
        parameters[name] = layers + sizes.vocab_size * llama.dim
        attention = sizes.num_layers * 4 * llama.dim * (sizes.prompt + sizes.output)
        operations[name] = tokens * (2 * layers + attention)
    assert parameters == {"student": 4_949_120, "teacher": 19_369_344}
    ours = operations["student's layers and gradient"] / 3, operations["teacher's layers"]
    assert ours == pytest.approx((operations["student"], operations["teacher"]), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "wanted"),
    [
        ("loss.py", ("--memory", "--quick"), "| 32,128 | 256 |"),
        ("loss.py", ("--num_threads=1", "--quick"), "| default |"),
        ("sampling.py", ("--num_threads=1", "--smallest", "--quick"), "| sample, top-p 0.9 |"),
        ("step.py", ("--num_threads=1", "--smallest", "--quick"), "| step, lambda = 1 |"),
    ],
)
def test_a_benchmark_prints_its_table(script, options, wanted):
    done = subprocess.run(
        [sys.executable, str(_FOLDER / script), *options],
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "on_policy"])
def test_our_step_races(load, kind):
    timing = load("timing")
    command = (sys.executable, str(_FOLDER / "step.py"), "--smallest", f"--serve={kind}")
    results = timing.race({"ours": timing.Racer(command)}, num_threads=1, repeats=2)
    assert results["ours"][0].seconds(1) > 0


def test_scaling_compiles_up_to_the_first_slice_that_fits_and_keeps_it(load, monkeypatch, tmp_path):
    scaling, hlo = load("scaling"), importlib.import_module("gkd_jax.devices.hlo")
    report = importlib.import_module("gkd_jax.run_modes.compile_report")
    compiled = []

    def run(command, **_):
        *_, topology, names = json.loads(command[-1].removeprefix("--cell="))
        compiled.append(topology)
        room = 1 << 30 if topology == "v5e:2x4" else None
        cost = hlo.Cost(flops=1.5e12, collectives={"all-gather": 2e6})
        parts = [report.Part(name, room, "20G of 16G", 1.0, cost, 8e12, 2e12) for name in names]
        found = report.Report(topology, {"data": 8, "model": 1}, {"teacher": 1 << 30}, parts)
        text = "a line of a log\n" + json.dumps(dataclasses.asdict(found))
        return subprocess.CompletedProcess(command, 0, stdout=text)

    monkeypatch.setattr(scaling.subprocess, "run", run)
    recipe = scaling.of_t5("xsum", "base")
    path = tmp_path / "scaling.json"
    scaling.smallest(recipe, scaling.Results(path), may_compile=True)
    assert compiled == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
    table = scaling.recipes_table(scaling.Results(path), [recipe], may_compile=False)
    smaller, holds = table.splitlines()[2:]
    assert "| v5e:2x2 | **no** | 1,024 | train step: 20G of 16G |" in smaller
    # 12 TFLOP are done, 2 of them a second time: 10 of 6 that are needed.
    assert "| v5e:2x4 | yes | 1,024 | train step: 12% | 0.008, compute |" in holds
    assert "| 1.67 / 1.67 / 1.67 | 33% | 3 |" in holds
    scaling.smallest(recipe, scaling.Results(path), may_compile=True)
    assert len(compiled) == 3
