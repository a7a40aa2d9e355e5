"""Times a whole GKD step at lambda = 0 and at lambda = 1, and each of its parts.

    python benchmarks/step.py --num_threads=1

Batch size 8, prompts of 64 tokens, outputs of 64 that do not end early, a vocabulary of 32,000,
JSD(0.5), AdamW, float32. The T5s need the same FLOPs per step as the decoder-only models of the
scripts in `peers/` (a student of 4.95M and a teacher of 19.4M parameters). They have more
parameters, since a T5's encoder does not process the output. The parts are timed in the same turns
as the steps. Their lower bound is the time of their FLOPs at the speed of a large matrix product.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from work import SMALLEST, Llama, Sizes

from gkd_jax.common.batch import Batch
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.optimizers import AdamW, Constant
from gkd_jax.distillation.rollout import Rollout
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config
from gkd_jax.objectives import GeneralizedJSD, Objective, Predictions, fused_weighted_loss
from gkd_jax.objectives.objective import final_weights
from gkd_jax.sampling.methods import Greedy
from gkd_jax.training import jitted_functions
from gkd_jax.training.trainer import jit_step_functions

OBJECTIVE = Objective(GeneralizedJSD(Sizes().beta))
OPTIMIZER = AdamW(Constant(Sizes().learning_rate))


def t5(sizes: Sizes, llama: Llama, *, mlp_dim: int) -> T5:
    """Builds a T5 whose encoder and decoder each have the Llama's layers, width and heads.

    The width of the MLPs compensates for the cross-attention, and for each token passing through
    only half of the layers.
    """
    config = T5Config(
        vocab_size=sizes.vocab_size,
        emb_dim=llama.dim,
        num_heads=llama.num_heads,
        num_encoder_layers=sizes.num_layers,
        num_decoder_layers=sizes.num_layers,
        head_dim=llama.dim // llama.num_heads,
        mlp_dim=mlp_dim,
        mlp_activations=("silu", "linear"),
        logits_via_embedding=True,
        dtype="float32",
    )
    return T5(config)


def student_and_teacher(sizes: Sizes) -> tuple[T5, T5]:
    """Builds T5s with the FLOPs of the Llamas."""
    return t5(sizes, sizes.student, mlp_dim=304), t5(sizes, sizes.teacher, mlp_dim=768)


def restored_params(model: T5, *, seed: int) -> Any:
    """Returns random parameters made outside of JAX, as parameters of a checkpoint are."""
    generator = np.random.default_rng(seed)

    def leaf(shape: Any) -> jax.Array:
        scale = 1.0 if len(shape.shape) == 1 else shape.shape[0] ** -0.5
        return jnp.asarray(scale * generator.standard_normal(shape.shape, np.float32))

    return jax.tree.map(leaf, model.abstract_params())


class Work:
    """The arrays and jitted functions of one run, as in training."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.student, self.teacher = student_and_teacher(sizes)
        partitioner = Partitioner()
        functions = jit_step_functions(
            self.student, self.teacher, OBJECTIVE, OPTIMIZER, partitioner, num_microbatches=1
        )
        self.step_fn = functions.step
        self.state = functions.init(restored_params(self.student, seed=0))
        self.teacher_params = restored_params(self.teacher, seed=1)
        self.rollout_fn = self.make_rollout(Rollout())
        self.greedy_fn = self.make_rollout(Rollout(Greedy()))
        self.batch = self._make_batch()
        self.num_steps = 0

    def make_rollout(self, rollout: Rollout) -> Callable[..., Batch]:
        """Jits a rollout whose outputs do not end early."""
        return jitted_functions.jit_rollout(
            rollout, self.student, Partitioner(), eos_ids=(), pad_id=0
        )

    def _make_batch(self) -> Batch:
        inputs, targets = jnp.array(self.sizes.prompts()), jnp.array(self.sizes.outputs())
        return Batch(
            inputs=inputs,
            inputs_mask=jnp.ones(inputs.shape, bool),
            targets=targets,
            loss_weights=jnp.ones(targets.shape),
            example_id=jnp.arange(len(inputs)),
        )

    def next_key(self) -> jax.Array:
        """Returns a different key for every step."""
        self.num_steps += 1
        return jax.random.fold_in(jax.random.key(3), self.num_steps)

    def step(self, *, on_policy: bool) -> None:
        """Runs one training step and blocks until the new parameters are ready."""
        batch = self.batch
        if on_policy:
            batch = self.rollout_fn(self.state.params, batch, self.next_key())
            batch = jitted_functions.without_log_probs(batch)
        self.state, _ = self.step_fn(self.state, self.teacher_params, batch, self.next_key())
        jax.block_until_ready(self.state)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Returns a function for each part of a step."""
        student, teacher, batch = self.student, self.teacher, self.batch
        hidden_shape = jax.eval_shape(student.hidden_states, self.state.params, batch)
        cotangent = jnp.ones(hidden_shape.shape)
        weights = final_weights(batch.loss_weights, reduction=OBJECTIVE.reduction)

        def student_layers(params: Any, cotangent: Any) -> Any:
            hidden, pullback = jax.vjp(lambda p: student.hidden_states(p, batch), params)
            return hidden, pullback(cotangent)[0]

        def loss(hidden: Any, head: Any, of_teacher: Any) -> Any:
            return fused_weighted_loss(
                OBJECTIVE,
                student=Predictions(hidden, head, student.unembed),
                teacher=Predictions(*of_teacher, teacher.unembed),
                targets=batch.targets,
                weights=weights,
            )[0]

        def update(params: Any, opt_state: Any, grads: Any) -> Any:
            updates, opt_state = OPTIMIZER.build().update(grads, opt_state, params)
            return jax.tree.map(jnp.add, params, updates), opt_state

        student_fn, teacher_fn = jax.jit(student_layers), jax.jit(teacher.hidden_states)
        loss_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        update_fn = jax.jit(update, donate_argnums=(0, 1))
        hidden = student_fn(self.state.params, cotangent)[0]
        of_teacher = (
            teacher_fn(self.teacher_params, batch),
            teacher.head(self.teacher_params),
        )
        params = jax.tree.map(jnp.copy, self.state.params)
        grads = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
        updated = [params, OPTIMIZER.build().init(params)]

        def one_update() -> None:
            updated[:] = update_fn(*updated, grads)
            jax.block_until_ready(updated)

        def run(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
            return lambda: jax.block_until_ready(function(*arguments))

        head = student.head(self.state.params)
        head = jax.tree.map(jnp.copy, head)  # The next step donates those of the state.
        params = jax.tree.map(jnp.copy, self.state.params)
        return {
            "rollout": run(self.rollout_fn, params, batch, jax.random.key(4)),
            "greedy rollout": run(self.greedy_fn, params, batch, jax.random.key(4)),
            "teacher's layers": run(teacher_fn, self.teacher_params, batch),
            "student's layers and gradient": run(student_fn, params, cotangent),
            "heads, divergence and gradient": run(loss_fn, hidden, head, of_teacher),
            "AdamW": one_update,
        }


def count_parameters(params: Any) -> int:
    """Counts the elements of a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops(sizes: Sizes) -> dict[str, float]:
    """Counts FLOPs of matrix products in each part: 2 per parameter and token, and attention.

    Gradients cost twice the forward pass. Encoder layers process the prompt, decoder layers the
    output. The cross-attention's keys and values are parameters of the decoder, but are computed
    from the prompt.
    """

    def layers(model: T5) -> float:
        config = model.config
        params = count_parameters(model.abstract_params()) - config.vocab_size * config.emb_dim
        # Prompts and outputs have the same length, so that it does not matter which of them a
        # parameter is applied to.
        tokens = sizes.batch_size * sizes.output
        width = config.num_heads * config.head_dim
        attention = 3 * config.num_decoder_layers * 4 * width * sizes.output
        return tokens * (2.0 * params + attention)

    def head(model: T5) -> float:
        tokens = sizes.batch_size * sizes.output
        return 2.0 * tokens * model.config.vocab_size * model.config.emb_dim

    student, teacher = student_and_teacher(sizes)
    rollout = layers(student) + head(student)
    return {
        "rollout": rollout,
        "greedy rollout": rollout,
        "teacher's layers": layers(teacher),
        "student's layers and gradient": 3 * layers(student),
        "heads, divergence and gradient": 3 * head(student) + head(teacher),
        "AdamW": 0.0,
    }


def matrix_product() -> tuple[Callable[[], Any], float]:
    """Returns a large matrix product, whose speed gives the lower bounds, and its FLOPs."""
    left, right = jnp.ones((1024, 1024)), jnp.ones((1024, 4096))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(left, right)), 2.0 * 1024 * 1024 * 4096


def serve(sizes: Sizes, *, on_policy: bool) -> None:
    """Runs steps on request, for a race with other libraries."""
    work = Work(sizes)
    work.step(on_policy=on_policy)
    steps = timing.StepsOnRequest()
    while steps.wait():
        work.step(on_policy=on_policy)
        steps.answer()


def report(sizes: Sizes, *, num_threads: int, repeats: int) -> str:
    """Returns the table of a step and its parts."""
    work = Work(sizes)
    product, product_flops = matrix_product()
    contestants = {
        "step, lambda = 0": functools.partial(work.step, on_policy=False),
        "step, lambda = 1": functools.partial(work.step, on_policy=True),
        **work.parts(),
        "matrix product": product,
    }
    times = timing.turns(contestants, repeats=repeats)
    seconds = {name: time.seconds(num_threads) for name, time in times.items()}
    rate = product_flops / seconds["matrix product"]
    operations = flops(sizes)
    whole = sum(count for name, count in operations.items() if "rollout" not in name)
    operations["step, lambda = 0"] = whole
    operations["step, lambda = 1"] = whole + operations["rollout"]
    rows = []
    for name in contestants:
        if name == "matrix product":
            continue
        bound = operations[name] / rate
        rows.append(
            (
                name,
                f"{1e3 * seconds[name]:.1f}",
                f"{seconds[name] / seconds['step, lambda = 1']:.2f}",
                f"{operations[name] / 1e9:.1f}",
                f"{1e3 * bound:.1f}",
                f"{seconds[name] / bound:.2f}" if bound else "",
            )
        )
    header = (
        "part",
        "ms",
        "share of the step at lambda = 1",
        "GFLOP",
        "lower bound, ms",
        "ratio",
    )
    parameters = [
        count_parameters(model.abstract_params()) for model in (work.student, work.teacher)
    ]
    return (
        f"{num_threads} threads, {rate / 1e9:.0f} GFLOP/s in a large matrix product; student "
        f"{parameters[0]:,} and teacher {parameters[1]:,} parameters; peak of the process "
        f"{timing.peak_megabytes():.0f} MB\n\n" + timing.table(header, rows)
    )


def main() -> None:
    """Prints the table, or takes part in a race."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_threads", type=int, help="Number of cores to use; default: all.")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="Fewer repetitions.")
    parser.add_argument("--smallest", action="store_true", help="Tiny sizes, for tests.")
    parser.add_argument("--serve", choices=("data", "on_policy"), help="Run steps on request.")
    args = parser.parse_args()
    repeats = args.repeats or (3 if args.quick else 8)
    num_threads = timing.keep_to_cores(args.num_threads)
    sizes = SMALLEST if args.smallest else Sizes()
    if args.serve:
        serve(sizes, on_policy=args.serve == "on_policy")
    else:
        print(report(sizes, num_threads=num_threads, repeats=repeats), flush=True)


if __name__ == "__main__":
    main()
