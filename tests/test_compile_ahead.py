"""What a run needs of a TPU slice: counted on known programs, and compiled where libtpu is."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
import small_runs
from jax import lax
from jax.sharding import PartitionSpec

from gkd_jax.devices import chips, collectives, flops, hlo
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation.replay import Replay
from gkd_jax.distillation.teachers import InitialStudent, TeacherMixture
from gkd_jax.experiment import Evaluation
from gkd_jax.models.lora import LoRA
from gkd_jax.objectives.mixing import OutputMix
from gkd_jax.run_modes import compile_ahead, compile_report
from gkd_jax.training import programs

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: it compiles for a TPU",
)
ROWS, WIDTH, LENGTH = 64, 256, 13


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    """A program for other devices cannot be read back from the cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def products(x, w):
    """LENGTH products in a loop."""
    return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=LENGTH)[0]


def nested(x, w):
    return lax.scan(lambda x, _: (products(x, w), None), x, None, length=3)[0]


def batched(x, w):
    """Heads times heads, as attention has them."""
    heads = x.reshape(8, 8, WIDTH)
    return jnp.einsum("bqk,blk->bql", heads, heads) @ jnp.ones((8, 8)) + w.sum()


def branches(x, w):
    return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


def bounded(x, w):
    """At most LENGTH products: data may end the loop sooner."""

    def is_open(carry):
        return (carry[0] < LENGTH) & jnp.any(carry[1] > 0)

    return lax.while_loop(is_open, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]


ONE = 2.0 * ROWS * WIDTH * WIDTH
EXPECTED = {
    products: LENGTH * ONE,
    nested: 3 * LENGTH * ONE,
    batched: 2.0 * 8 * 8 * 8 * WIDTH + 2.0 * 8 * 8 * 8 * 8,
    branches: 2 * ONE,
    bounded: LENGTH * ONE,
}


@pytest.mark.parametrize("function", EXPECTED, ids=lambda function: function.__name__)
def test_loops_count_as_often_as_they_run(function):
    arguments = shape(ROWS, WIDTH), shape(WIDTH, WIDTH)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert flops.traced(function, *arguments) == EXPECTED[function]
    if function is not batched:  # The compiler may turn a small product into sums.
        assert hlo.cost(text).flops == EXPECTED[function]
        assert hlo.cost(text).unknown_loops == 0


def test_a_loop_reads_of_stacked_layers_the_one_that_it_is_at():
    def function(x, layers):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    def moved(depth):
        arguments = shape(8, WIDTH), shape(depth, WIDTH, WIDTH)
        return hlo.cost(jax.jit(function).lower(*arguments).compile().as_text()).bytes

    one_layer = 4 * WIDTH * WIDTH
    # Read where it lies; a copy of it would be written and read again.
    assert 8 * one_layer <= moved(16) - moved(8) <= 3.5 * 8 * one_layer


def test_a_loop_of_unknown_length_is_told_and_counted_as_given():
    def function(x, w, number):
        return lax.fori_loop(0, number, lambda _, x: x @ w, x)

    arguments = shape(ROWS, WIDTH), shape(WIDTH, WIDTH), shape(dtype=jnp.int32)
    cost = hlo.cost(jax.jit(function).lower(*arguments).compile().as_text(), unknown_trips=5)
    assert cost.flops == flops.traced(function, *arguments, unknown_trips=5) == 5 * ONE
    assert cost.unknown_loops == 1


# A loop from 1 to 8 whose body adds 3 within a fusion, to which the constant is a parameter.
TURNS = """HloModule turns, is_scheduled=true, num_partitions=1

%next (x: u32[], y: u32[]) -> u32[] {
  %y = u32[] parameter(1)
  %x = u32[] parameter(0)
  ROOT %sum = u32[] add(%x, %y)
}

%body (b: (f32[4,4], u32[])) -> (f32[4,4], u32[]) {
  %b = (f32[4,4], u32[]) parameter(0)
  %m = f32[4,4] get-tuple-element(%b), index=0
  %i = u32[] get-tuple-element(%b), index=1
  %three = u32[] constant(3)
  %same = u32[] copy(%three)
  %j = u32[] fusion(%i, %same), kind=kLoop, calls=%next
  %d = f32[4,4] dot(%m, %m), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[4,4], u32[]) tuple(%d, %j)
}

%condition (c: (f32[4,4], u32[])) -> pred[] {
  %c = (f32[4,4], u32[]) parameter(0)
  %n = u32[] get-tuple-element(%c), index=1
  %eight = u32[] constant(8)
  ROOT %less = pred[] compare(%n, %eight), direction=LT
}

ENTRY %main (a: f32[4,4]) -> (f32[4,4], u32[]) {
  %a = f32[4,4] parameter(0)
  %one = u32[] constant(1)
  %first = (f32[4,4], u32[]) tuple(%a, %one)
  ROOT %loop = (f32[4,4], u32[]) while(%first), condition=%condition, body=%body
}
"""


def test_a_counter_need_not_start_at_0_and_go_by_1():
    assert hlo.cost(TURNS).flops == 3 * 2 * 4**3  # At 1, 4 and 7.


@NEEDS_LIBTPU
def test_products_that_overlap_with_gathering_count_once():
    """Over 16 chips a turn takes four shards of the parameter, two from either side."""
    run = small_runs.sft("/none", partitioner=Partitioner(rules="fsdp"))
    partitioner = compile_ahead.on_topology(run, "v5e:4x4").partitioner
    rows, width, wide = 64, 1024, 2048
    sharded = partitioner.sharding("data")
    arguments = (
        shape(rows, 128, width, sharding=sharded, dtype=jnp.bfloat16),
        shape(width, wide, sharding=sharded, dtype=jnp.bfloat16),
    )
    product = jax.jit(lambda x, w: jnp.tanh(x @ w), out_shardings=sharded)
    cost = hlo.cost(product.lower(*arguments).compile().as_text())
    assert cost.collectives["collective-permute"] > 0
    assert cost.flops == 2 * rows * 128 * width * wide / 16


def test_recomputation_and_shards_are_traced():
    layer = jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w))
    gradient = jax.grad(lambda x, w: layer(x, w).sum())
    # Two products forward, both made again, and two backward.
    assert flops.traced(gradient, shape(ROWS, WIDTH), shape(WIDTH, WIDTH)) == 6 * ONE
    mesh = Partitioner(model_parallelism=2).mesh
    spec = PartitionSpec("data")
    shards = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec,
        axis_names={"data"},
    )  # fmt: skip
    assert flops.traced(shards, shape(ROWS, WIDTH), shape(WIDTH, WIDTH)) == ONE


def compiled_on(partitioner, dtype=jnp.bfloat16):
    """A feed-forward block in a loop, its width split over 'model'."""
    x = shape(ROWS, WIDTH, sharding=partitioner.sharding("data"), dtype=dtype)
    wi = shape(WIDTH, 2 * WIDTH, sharding=partitioner.sharding(None, "model"), dtype=dtype)
    wo = shape(2 * WIDTH, WIDTH, sharding=partitioner.sharding("model", None), dtype=dtype)

    def function(x, wi, wo):
        return lax.scan(lambda x, _: (jnp.tanh(x @ wi) @ wo, None), x, None, length=LENGTH)[0]

    out = partitioner.sharding("data")
    return jax.jit(function, out_shardings=out).lower(x, wi, wo).compile()


@pytest.mark.parametrize("topology", [None, pytest.param("v5e:2x2", marks=NEEDS_LIBTPU)])
def test_a_known_loop_on_a_mesh(topology):
    """Each of 2 x 2 devices makes a quarter of every run; two add up their rows' results."""
    devices = tuple(jax.devices()[:4])
    if topology:
        run = compile_ahead.on_topology(small_runs.sft("/none"), topology)
        devices = run.partitioner.devices
    cost = hlo.cost(compiled_on(Partitioner(model_parallelism=2, devices=devices)).as_text())
    assert cost.flops == LENGTH * 4 * ONE / 4
    assert cost.unknown_loops == 0
    # All-reduce over two devices: each sends as many bytes as the result has. A CPU adds float32.
    width = 2 if topology else 4
    assert cost.collectives == {"all-reduce": LENGTH * ROWS / 2 * WIDTH * width}


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": [0, 1, 2, 3],
    "replica_groups=[2,4]<=[8]": [0, 1, 2, 3],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [0, 4],
    "replica_groups=mesh['slice'=2,'data'=4] {'slice'}": [0, 4],
    "replica_groups=mesh['slice'=2,'data'=2,'model'=2] {'slice','data'}": [0, 2, 4, 6],
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": [0, 1, 2, 3],
    "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": [0, 4],
    "replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}": [3, 2],
    "channel_id=1": [],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_devices_are_read(text):
    assert collectives.group(f"%x), {text}, to_apply=%add") == GROUPS[text]


@pytest.mark.parametrize(
    ("kind", "size", "slices", "expected"),
    [
        ("all-gather", 4, 1, (300.0, 0.0)),
        # Each of two slices needs the four shards of the other: one a device.
        ("all-gather", 8, 2, (600.0, 100.0)),
        ("all-reduce", 4, 1, (150.0, 0.0)),
        # Added up within a slice first: a quarter of it is what crosses, to and fro.
        ("all-reduce", 8, 2, (150.0, 25.0)),
        ("all-reduce", 2, 2, (0.0, 100.0)),
        ("reduce-scatter", 8, 2, (75.0, 12.5)),
        ("all-to-all", 8, 2, (37.5, 50.0)),
    ],
)
def test_bytes_of_a_collective_over_slices(kind, size, slices, expected):
    assert collectives.sent(kind, 100.0, size, slices) == expected


def test_bytes_of_permutations_and_transfers_are_read():
    ring = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert collectives.permuted(ring, 8.0, slice_size=4) == (8.0, 0.0)
    assert collectives.permuted(ring, 8.0, slice_size=2) == (8.0, 8.0)
    assert collectives.permuted("source_target_pairs={{0,2},{1,3}}", 8.0, 2) == (0.0, 8.0)
    said = '_xla_megascale_target="{{{}}}x{{0:3}}",_xla_megascale_transfer_type="{}"'
    assert collectives.transferred(said.format("1,2", "ALL_REDUCE"), 8.0) == {"all-reduce": 8.0}
    assert collectives.transferred(said.format("1:4", "ALL_REDUCE"), 8.0) == {"all-reduce": 12.0}
    assert collectives.transferred(said.format("1:4", "ALL_GATHER"), 8.0) == {"all-gather": 24.0}
    assert collectives.transferred(said.format("1,2", "ONE_TO_ONE"), 8.0) == {"one-to-one": 8.0}


@pytest.mark.parametrize("topology", [None, pytest.param("v5e:2x2*2", marks=NEEDS_LIBTPU)])
def test_what_crosses_between_slices_is_counted_apart(topology):
    """Parameters are gathered within a slice, gradients added up over both."""
    partitioner = Partitioner(rules="fsdp", num_slices=2)
    if topology:
        run = small_runs.sft("/none", partitioner=Partitioner(rules="fsdp"))
        partitioner = compile_ahead.on_topology(run, topology).partitioner
    assert dict(partitioner.mesh.shape) == {"slice": 2, "data": 4, "model": 1}
    w = partitioner.sharding("data")
    dtype = jnp.dtype(jnp.bfloat16 if topology else jnp.float32)

    def gradient(x, w):
        return jax.grad(lambda w: jnp.square(jnp.tanh(x @ w)).sum())(w)

    arguments = (
        shape(8 * WIDTH, WIDTH, sharding=partitioner.batch_sharding, dtype=dtype),
        shape(WIDTH, WIDTH, sharding=w, dtype=dtype),
    )
    text = jax.jit(gradient, out_shardings=w).lower(*arguments).compile().as_text()
    cost = hlo.cost(text, slice_size=4)
    size = dtype.itemsize * WIDTH * WIDTH
    assert cost.collectives["all-gather"] == size * 3 / 4
    # What a chip keeps of the gradient, which the other slice has too.
    assert cost.between_slices == {"all-reduce": size / 4}
    if topology:  # A CPU adds up the whole and keeps a part.
        assert cost.collectives["reduce-scatter"] == size * 3 / 4
    else:
        assert hlo.cost(text).between_slices == {}


def test_topologies_are_checked_and_ordered():
    assert chips.parse_topology("v5e:4x4") == chips.Topology("v5e", "4x4")
    assert chips.parse_topology("v5e:4x4*2") == chips.Topology("v5e", "4x4", num_slices=2)
    assert chips.larger("v5p:4x4x4")[0] == "v5p:4x4x8"
    assert chips.larger("v5p:4x4x4*2")[0] == "v5p:4x4x8*2"
    for wrong in ("v5e", "v5e:3x3", "h100:8", "", "v5e:4x4*", "v5e:4x4*0", "v5e:4x4*two"):
        with pytest.raises(ValueError, match="TOPOLOGY must be a chip and a size"):
            chips.parse_topology(wrong)
    for chip in chips.CHIPS.values():
        sizes = [math.prod(map(int, size.split("x"))) for size in chip.slices]
        assert sizes == sorted(sizes)


def test_the_roofline_names_what_binds():
    chip = chips.CHIPS["v5e"]
    roofline = compile_report.roofline
    assert roofline(hlo.Cost(flops=chip.flops), chip) == (1.0, "compute")
    cost = hlo.Cost(bytes=2 * chip.bandwidth, collectives={"all-reduce": chip.interconnect})
    assert roofline(cost, chip) == (2.0, "memory")
    crossing = hlo.Cost(between_slices={"all-reduce": 3 * chip.network})
    assert roofline(cost + crossing, chip) == (3.0, "network")


def small_run():
    """Vocabularies and widths that two chips divide; no file is there."""
    student = small_runs.model(vocab_size=512)
    experiment = small_runs.gkd("/none", "/none/teacher")
    return dataclasses.replace(
        experiment,
        student=dataclasses.replace(experiment.student, model=student),
        teacher=dataclasses.replace(experiment.teacher, model=small_runs.model(24, vocab_size=512)),
        train_data=dataclasses.replace(small_runs.data(), batch_size=8),
        evaluation=Evaluation(small_runs.data("validation")),
        num_microbatches=1,
        partitioner=Partitioner(model_parallelism=2),
    )


def arguments_of(experiment):
    """What `compile_ahead` would compile with, on simulated devices."""
    mesh = dataclasses.replace(experiment.partitioner, devices=tuple(jax.devices()[:4]))
    return programs.Arguments(dataclasses.replace(experiment, partitioner=mesh))


def test_several_teachers_lie_there():
    run = small_run()
    one = arguments_of(run).residents()["teacher"]
    two = TeacherMixture((run.teacher, run.teacher))
    assert arguments_of(dataclasses.replace(run, teacher=two)).residents()["teacher"] == 2 * one
    weights = dataclasses.replace(run.teacher, weights="int8")
    int8 = arguments_of(dataclasses.replace(run, teacher=weights)).residents()["teacher"]
    assert 0.25 * one < int8 < 0.8 * one  # Embeddings and the output layer are not quantised.


def test_a_base_that_teaches_lies_there_once():
    run = small_run()
    base = dataclasses.replace(run.student, model=LoRA(run.student.model, rank=4))
    run = dataclasses.replace(
        run, student=dataclasses.replace(base, initial_checkpoint="/none"), teacher=InitialStudent()
    )
    residents = arguments_of(run).residents()
    assert "teacher" not in residents
    assert residents["student's frozen parameters"] > residents["student's parameters"]


def test_a_teacher_may_lie_as_other_rules_say():
    run = small_run()
    whole = arguments_of(run).residents()["teacher"]
    mesh = dataclasses.replace(run.partitioner, teacher_rules="fsdp")
    split = arguments_of(dataclasses.replace(run, partitioner=mesh)).residents()
    # Over two more chips, but for what has no axis 'embed'.
    assert 0.5 * whole <= split["teacher"] < 0.52 * whole
    assert split["student's parameters"] == arguments_of(run).residents()["student's parameters"]


def test_a_replay_buffer_lies_there():
    run = dataclasses.replace(small_run(), outputs=OutputMix(1.0), replay=Replay(capacity=20))
    # Two rollouts of eight prompts of 48 bytes and outputs of 24, over two rows of the mesh.
    assert arguments_of(run).residents()["replay buffer"] == 2 * 8 // 2 * (5 * 48 + 8 * 24 + 4)


def test_recomputation_is_told_apart():
    """The student's layers are computed again, but not the output layer, which the loss makes."""
    run = small_run()

    def step_of(policy):
        model = small_runs.model(vocab_size=512, remat_policy=policy)
        student = dataclasses.replace(run.student, model=model)
        changed = dataclasses.replace(run, student=student)
        return next(programs.functions_of(changed, arguments_of(changed)))

    plain, full = step_of("none"), step_of("full")
    assert plain.plain is None
    least = flops.traced(plain.function, *plain.arguments)
    assert flops.traced(full.plain, *full.arguments) == least
    assert 1.02 * least < flops.traced(full.function, *full.arguments) < 1.34 * least


def test_packed_rows_have_segments():
    run = small_run()
    packed = dataclasses.replace(run.train_data, pack=True)
    batch = arguments_of(dataclasses.replace(run, train_data=packed)).batch
    assert batch.targets_segments.shape == batch.targets.shape


def test_batches_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(compile_ahead, "on_topology", lambda experiment, _: experiment)
    devices = tuple(jax.devices()[:4])
    run = dataclasses.replace(
        small_run(), partitioner=Partitioner(model_parallelism=2, devices=devices)
    )
    three = dataclasses.replace(small_runs.data("validation"), batch_size=3)
    for changes in (dict(evaluation=Evaluation(three)), dict(train_data=three)):
        with pytest.raises(ValueError, match="batch_size must be divisible by the data axis"):
            compile_ahead.compile_for(dataclasses.replace(run, **changes), "v5e:2x2")


@pytest.fixture(scope="module")
def report():
    return compile_ahead.compile_for(small_run(), "v5e:2x2")


@pytest.mark.slow
@NEEDS_LIBTPU
def test_a_run_is_compiled_for_a_slice_that_is_not_there(report):
    assert report.mesh == {"data": 2, "model": 2}
    names = ["train step", "rollout", "evaluation", "divergence"]
    assert [part.name for part in report.parts] == names
    assert report.fits
    student = small_run().student.model.abstract_params()
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(student))
    assert size / 2 <= report.residents["student's parameters"] <= size
    step, rollout, *_ = report.parts
    # Small shares are rounded up to the chip's tiles, and some are made on both of two chips.
    assert 0.9 <= report.of_least(step) <= 1.3
    assert step.recomputed == 0
    assert rollout.cost.flops > 0
    assert step.cost.sent > 0
    table = report.table()
    assert "4 chips of 16 GiB, mesh data 2 x model 2" in table
    assert "| train step |" in table


@pytest.mark.slow
@NEEDS_LIBTPU
def test_what_does_not_fit_is_refused_with_what_would(monkeypatch, report):
    """The chips have a little more memory than the run needs on four times as many."""
    small = sum(report.residents.values()) + 1
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=small)
    monkeypatch.setitem(chips.CHIPS, "v5e", chip)
    fits = dataclasses.replace(report, topology="v5e:2x4", residents={}, parts=[])

    def compile_for(_, topology, **how):
        return fits if topology == "v5e:2x4" else report

    monkeypatch.setattr(compile_ahead, "compile_for", compile_for)
    experiment = dataclasses.replace(small_run(), topology="v5e:2x2")
    with pytest.raises(compile_ahead.DoesNotFitError, match="does not fit on v5e:2x2") as error:
        compile_ahead.compile_ahead(experiment)
    assert "The smallest slice of these chips that it fits on is v5e:2x4" in str(error.value)


def test_a_compiler_that_runs_out_of_memory_is_understood():
    understood = compile_ahead._out_of_memory
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm"
    assert understood(RuntimeError(message)) == "20.51G of 15.75G"
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (74.04G) exceeds available HBM (15.75G)."
    )
    assert understood(RuntimeError(message)) == "74.04G of 15.75G"
    assert understood(RuntimeError("INTERNAL: something else")) is None


def test_a_topology_must_be_named():
    with pytest.raises(ValueError, match="TOPOLOGY"):
        compile_ahead.compile_ahead(small_run())
