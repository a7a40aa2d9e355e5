"""Times whole rollouts by sampling method: drawing tokens should cost about what greedy does.

    python benchmarks/sampling.py --batch_size=8 --vocab_size=32000

Prints seconds a rollout (best of several) and its ratio to greedy decoding, for a T5 of 4 + 4
layers with random parameters, of which no output ends early.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from gkd_jax.models.config import T5Config
from gkd_jax.models.t5 import T5
from gkd_jax.sampling.beam_search import BeamSearch
from gkd_jax.sampling.decode import DecodingMethod, decode
from gkd_jax.sampling.methods import Greedy, Sample

METHODS: dict[str, DecodingMethod] = {
    "greedy": Greedy(),
    "sample": Sample(),
    "sample, top-k 40": Sample(top_k=40),
    "sample, top-p 0.9": Sample(top_p=0.9),
    "beam search, 4 beams": BeamSearch(),
}


def seconds_a_rollout(method: DecodingMethod, args: argparse.Namespace) -> float:
    """Compiles a rollout and returns the best of `args.repeats` times."""
    model = T5(
        T5Config(
            vocab_size=args.vocab_size,
            emb_dim=args.emb_dim,
            num_heads=4,
            num_encoder_layers=4,
            num_decoder_layers=4,
            head_dim=args.emb_dim // 4,
            mlp_dim=3 * args.emb_dim,
            dtype="float32",
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    inputs = jnp.ones((args.batch_size, args.source_length), jnp.int32)
    decode_fn = jax.jit(
        functools.partial(
            decode, model, method=method, max_length=args.target_length, eos_ids=(), pad_id=0
        )
    )
    times = []
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(decode_fn(params, inputs, inputs > 0, key=jax.random.key(repeat)))
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one compiles


def main() -> None:
    """Prints one line a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--source_length", type=int, default=64)
    parser.add_argument("--target_length", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--emb_dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {vars(args)}")
    greedy = seconds_a_rollout(Greedy(), args)
    for name, method in METHODS.items():
        seconds = greedy if name == "greedy" else seconds_a_rollout(method, args)
        print(f"{name:22} {seconds:8.3f} s {seconds / greedy:7.2f} x greedy")


if __name__ == "__main__":
    main()
