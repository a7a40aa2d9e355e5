"""Times whole rollouts by decoding method, relative to greedy decoding.

    python benchmarks/sampling.py --num_threads=1

It uses the student of `step.py` with random parameters. No output ends early.
"""

import argparse
import functools

import jax
import timing
from step import Work
from work import SMALLEST, Sizes

from gkd_jax.distillation.rollout import Rollout
from gkd_jax.sampling.beam_search import BeamSearch
from gkd_jax.sampling.decode import DecodingMethod
from gkd_jax.sampling.methods import Greedy, Sample

METHODS: dict[str, DecodingMethod] = {
    "greedy": Greedy(),
    "sample": Sample(),
    "sample, temperature 0.7": Sample(temperature=0.7),
    "sample, top-k 40": Sample(top_k=40),
    "sample, top-p 0.9": Sample(top_p=0.9),
    "sample, top-k 40, top-p 0.9": Sample(top_k=40, top_p=0.9),
    "beam search, 4 beams": BeamSearch(),
}


def report(sizes: Sizes, *, num_threads: int, repeats: int) -> str:
    """Returns a table with one row per method."""
    work = Work(sizes)
    key = jax.random.key(0)

    def roll_out(rollout_fn: object) -> None:
        jax.block_until_ready(rollout_fn(work.state.params, work.batch, key))

    contestants = {
        name: functools.partial(roll_out, work.make_rollout(Rollout(method)))
        for name, method in METHODS.items()
    }
    times = timing.turns(contestants, repeats=repeats)
    seconds = {name: time.seconds(num_threads) for name, time in times.items()}
    rows = [
        (name, f"{1e3 * value:.0f}", f"{value / seconds['greedy']:.2f}")
        for name, value in seconds.items()
    ]
    return timing.table(("method", "ms per rollout", "relative to greedy"), rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_threads", type=int, help="Number of cores to use; default: all.")
    parser.add_argument("--quick", action="store_true", help="Fewer repetitions.")
    parser.add_argument("--smallest", action="store_true", help="Tiny sizes, for tests.")
    args = parser.parse_args()
    num_threads = timing.keep_to_cores(args.num_threads)
    sizes = SMALLEST if args.smallest else Sizes()
    print(report(sizes, num_threads=num_threads, repeats=3 if args.quick else 9))


if __name__ == "__main__":
    main()
