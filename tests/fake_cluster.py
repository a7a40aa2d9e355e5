"""Stands in for the programs that the launchers call, and for the run that they start.

It is linked as gcloud, kubectl, xpk, sky, sbatch, squeue, scancel and srun, and as the python of a
host. $FAKE is its folder: a line of `plan` is a try of the run, such as "75 100": exit status and
the step that is saved; "gone 100" is one whose machine is taken away, "broken 100" one after which
nothing answers. calls.jsonl gets all calls.
"""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
SAVED = 75


def read(name):
    path = FAKE / name
    return path.read_text().strip() if path.exists() else ""


def write(name, text):
    (FAKE / name).write_text(str(text))


def forget(*names):
    for name in names:
        (FAKE / name).unlink(missing_ok=True)


def option(name):
    return next(one.partition("=")[2] for one in sys.argv if one.startswith(f"--{name}="))


def has_python(folder):
    """A checkout's environment: its python is this file, its pip does nothing."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(FAKE / "bin" / "python")
    (programs / "pip").symlink_to("/bin/true")


def python():
    """The run: saves a checkpoint, and ends as planned."""
    lines = read("plan").splitlines()
    status, step = lines[0].split()
    write("plan", "\n".join(lines[1:]))
    start = "--gin.MODEL_DIR="
    folder = pathlib.Path(
        ast.literal_eval([one for one in sys.argv if one.startswith(start)][-1].removeprefix(start))
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.gin").write_text("experiment.Experiment.num_steps = 300\n")
    if int(step):
        checkpoint = folder / f"checkpoint_{step}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "host.json").write_text('{"host": {}}')
        (checkpoint / "MANIFEST.json").write_text("{}")
    write("ended", status)
    if status == "cancelled":
        subprocess.run(["bash", "launch/slurm.sh", "cancel"], check=True)
        status = SAVED
    if status == "broken":
        write("broken", "yes")
    sys.exit(137 if status in ("gone", "broken") else int(status))


def gcloud():
    host = FAKE / "host"
    verb = next(verb for verb in ("describe", "create", "delete", "scp", "ssh") if verb in sys.argv)
    is_queued = "queued-resources" in sys.argv
    if verb == "create":
        write("state", "ACTIVE" if is_queued else "READY")
        has_python(host / "gkd_jax")
    elif verb == "delete":
        forget("state")
        shutil.rmtree(host)
    elif verb == "scp":
        shutil.copy(sys.argv[sys.argv.index("scp") + 1], host / "gkd_jax.tar.gz")
    elif verb == "ssh":
        sys.exit(subprocess.run(["bash", "-c", option("command")], cwd=host).returncode)
    elif not read("state"):
        sys.exit("ERROR: (gcloud) NOT_FOUND: it was not found")
    elif read("ended") == "gone":
        forget("ended")
        write("state", "SUSPENDED" if is_queued else "PREEMPTED")
    if verb == "describe":
        print("WARNING: of something\n" + read("state"))


def finish_jobset(command, **arguments):
    status = subprocess.run(command, **arguments).returncode
    write("terminal", "Failed" if status else "Completed")
    write("pods", f"{status} {'True' if read('ended') == 'gone' else ''}\n0 \n")


def delete_jobset():
    forget("terminal", "pods")


def kubectl():
    if "create" in sys.argv:
        jobset = json.loads(pathlib.Path(option("filename")).read_text())
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        finish_jobset(["python", *(one.replace("$$", "$") for one in container["args"])])
    elif "delete" in sys.argv:
        delete_jobset()
    elif "pods" in sys.argv:
        print(read("pods"))
    elif not read("terminal"):
        sys.exit('Error from server (NotFound): jobsets.jobset.x-k8s.io "x" not found')
    else:
        print(read("terminal"))


def xpk():
    if "create" in sys.argv:
        finish_jobset(["bash", "-c", option("command").replace("$$", "$")])
    elif "delete" in sys.argv:
        delete_jobset()


def sbatch():
    number = len(list(FAKE.glob("job-*"))) + 7
    write(f"job-{number}", "")
    at = sys.argv.index("launch/slurm_job.sh")
    environment = os.environ | {"SLURM_JOB_ID": str(number)}
    with open(option("output").replace("%j", str(number)), "w") as log:
        subprocess.run(
            ["bash", *sys.argv[at:]], cwd=option("chdir"), env=environment, stdout=log, stderr=log
        )
    if read("ended") == "gone":
        pathlib.Path(option("output")).with_name(f"slurm-{number}.status").unlink()
    print(f"{number};here")


def srun():
    first = next(i for i, one in enumerate(sys.argv) if i and not one.startswith("--"))
    command = sys.argv[first:]
    sys.exit(subprocess.run(command).returncode)


def sky():
    if "launch" in sys.argv:
        task = json.loads(pathlib.Path(sys.argv[-1]).read_text())
        has_python(FAKE / "node")
        nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
        environment = os.environ | nodes | {"SKYPILOT_NODE_RANK": "0"}
        status = SAVED
        while status in task["resources"]["job_recovery"]["recover_on_exit_codes"]:
            status = subprocess.run(
                ["bash", "-c", task["run"]], cwd=FAKE / "node", env=environment
            ).returncode
        write("sky", 100 if status else 0)
    elif "logs" in sys.argv:
        sys.exit(int(read("sky")))


if __name__ == "__main__":
    called_as = pathlib.Path(sys.argv[0]).name
    with (FAKE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([called_as, *sys.argv[1:]]) + "\n")
    if read("broken") and called_as != "python":
        sys.exit("ERROR: there is no network")
    # squeue and scancel have nothing to say: a job is over when sbatch returns.
    stand_ins = (python, gcloud, kubectl, xpk, sbatch, srun, sky)
    {one.__name__: one for one in stand_ins}.get(called_as, lambda: None)()
