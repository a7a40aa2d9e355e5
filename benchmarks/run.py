"""Runs all benchmarks and prints their tables as one Markdown document.

    python benchmarks/run.py            the loss, the sampler, a whole step
    python benchmarks/run.py --peers    and the same step in TRL and Tunix
    python benchmarks/run.py --quick    smaller sizes and fewer repetitions, for a first look

The figures of a table are measured in one run, in turns, and are only comparable with each other:
absolute times depend on the machine and its load. On one thread they are CPU times, which other
load hardly changes; on several threads they are wall times. TRL and Tunix are installed from PyPI
into environments of their own in `benchmarks/.environments`, once.
"""

import argparse
import datetime
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import venv

import timing

FOLDER = pathlib.Path(__file__).resolve().parent
ENVIRONMENTS = FOLDER / ".environments"

# By default glibc returns large blocks to the system at once, and torch allocates them again in
# every step. These settings make its steps two to three times as fast; JAX gains nothing.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

OURS = "gkd_jax"
# Name to script, environment, and whether it supports lambda = 0.
PEERS = {
    "TRL GKDTrainer": ("trl_gkd.py", "trl", True),
    "TRL DistillationTrainer": ("trl_distillation.py", "trl", False),
    "Tunix, JSD and sampler added": ("tunix_gkd.py", "tunix", True),
}


def make_environment(name: str) -> str:
    """Creates the environment of TRL or Tunix if needed; returns the path of its Python."""
    folder = ENVIRONMENTS / name
    requirements = FOLDER / "peers" / f"requirements-{name}.txt"
    installed = folder / "installed.txt"
    python = folder / "bin" / "python"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing {requirements.name} in {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        subprocess.run(command, check=True)
        shutil.copy(requirements, installed)
    return str(python)


def racers(*, on_policy: bool, smallest: bool = False) -> dict[str, timing.Racer]:
    """Returns the processes of all libraries that support such a step, by name."""
    options = (f"--serve={'on_policy' if on_policy else 'data'}",)
    options += ("--smallest",) if smallest else ()
    found = {OURS: timing.Racer((sys.executable, str(FOLDER / "step.py"), *options))}
    for name, (script, environment, has_data_steps) in PEERS.items():
        if on_policy or has_data_steps:
            command = (make_environment(environment), str(FOLDER / "peers" / script), *options)
            tuned = TUNED_ALLOCATOR if environment == "trl" else {}
            found[name] = timing.Racer(command, tuned)
    return found


def peers_table(num_threads: int, *, repeats: int, smallest: bool = False) -> str:
    """Times a step of each library, in absolute terms and relative to gkd_jax."""
    rows = []
    for on_policy in (False, True):
        results = timing.race(
            racers(on_policy=on_policy, smallest=smallest), num_threads=num_threads, repeats=repeats
        )
        seconds = {name: times.seconds(num_threads) for name, (times, _) in results.items()}
        for name, (times, megabytes) in results.items():
            wall = statistics.median(times.wall)
            rows.append(
                (
                    f"lambda = {int(on_policy)}",
                    name,
                    f"{seconds[name]:.2f}",
                    f"{wall:.2f}",
                    f"{seconds[name] / seconds[OURS]:.2f}" if OURS in seconds else "",
                    f"{megabytes:.0f}",
                    f"{megabytes / results[OURS][1]:.2f}" if OURS in seconds else "",
                )
            )
    relative = "relative to gkd_jax"
    header = ("", "trainer", "s per step", "wall, s", relative, "peak MB", relative)
    return timing.table(header, rows)


def machine() -> str:
    """Describes the machine, its load and the date."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    cores = len(os.sched_getaffinity(0))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    today = datetime.date.today().isoformat()
    return f"{model}, {cores} cores, load averages {load}, {today}"


def run_script(name: str, *options: str) -> str:
    """Runs another benchmark in a process of its own and returns its output."""
    command = [sys.executable, str(FOLDER / name), *options]
    path = os.pathsep.join(filter(None, (str(timing.ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return done.stdout.strip()


def main() -> None:
    """Prints the sections in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="Also TRL and Tunix.")
    parser.add_argument("--quick", action="store_true", help="Smaller sizes, fewer repetitions.")
    parser.add_argument("--only", help="Comma-separated sections: loss,sampling,step,peers.")
    parser.add_argument("--threads", default="1,2", help="Comma-separated numbers of threads.")
    args = parser.parse_args()
    wanted = ["loss", "sampling", "step", *(["peers"] if args.peers else [])]
    if args.only:
        wanted = args.only.split(",")
    cores = len(os.sched_getaffinity(0))
    threads = [number for number in map(int, args.threads.split(",")) if number <= cores]
    quick = ["--quick"] if args.quick else []
    print(f"{machine()}\n", flush=True)
    for section in wanted:
        if section == "loss":
            print(f"## Memory of the loss\n\n{run_script('loss.py', '--memory', *quick)}\n")
        for number in threads:
            print(f"## {section}, {number} thread{'s' if number > 1 else ''}\n")
            if section == "peers":
                print(peers_table(number, repeats=3 if args.quick else 8), flush=True)
            else:
                options = [f"--num_threads={number}", *quick]
                print(run_script(f"{section}.py", *options), flush=True)
            print()


if __name__ == "__main__":
    main()
