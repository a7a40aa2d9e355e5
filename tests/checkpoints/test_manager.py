"""Saving, verifying, falling back, keeping: on eight simulated devices."""

import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import PartitionSpec

from gkd_jax.checkpoints import layout, manifest
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.checkpoints.manifest import CorruptCheckpointError
from gkd_jax.devices.partitioning import Partitioner
from gkd_jax.distillation import optimizers

TX = optimizers.Adafactor(optimizers.Constant(0.1), min_dim_size_to_factor=8).build()


@flax.struct.dataclass
class State:
    step: object
    params: object
    opt_state: object


def shardings_on(partitioner, abstract):
    params = {
        "dense": {"kernel": partitioner.sharding(None, "model")},
        "norm": {"scale": partitioner.replicated},
    }
    return partitioner.state_shardings(abstract, params)


def make_values(seed):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": rng.normal(size=(16, 32)).astype(np.float32)},
        "norm": {"scale": jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16)},
    }
    state = TX.init(params)
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) * 0.1, params)
    _, state = TX.update(grads, state, params)
    return State(step=jnp.int32(seed), params=params, opt_state=state)


def make_abstract(partitioner):
    abstract = jax.eval_shape(lambda: make_values(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings_on(partitioner, abstract),
    )


@pytest.fixture(scope="module")
def partitioner():
    return Partitioner(model_parallelism=2)


@pytest.fixture(scope="module")
def abstract(partitioner):
    return make_abstract(partitioner)


def make_state(seed, abstract):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), make_values(seed), abstract)


def assert_same(got, want):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, abstract):
    """A run with good checkpoints of steps 10, 20 and 30; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with CheckpointManager(folder, keep=None) as manager:
        for step in (10, 20, 30):
            manager.save(step, make_state(step, abstract), {"position": step * 4})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def warnings(caplog):
    """Text of all warnings that were logged."""
    absl_logger = absl_logging.get_absl_logger()
    absl_logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    absl_logger.removeHandler(caplog.handler)


def files_of(folder):
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


def flip(path, position, bit):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1 << bit
    path.write_bytes(bytes(contents))


def test_restore_gives_what_was_saved(run, abstract):
    manager = CheckpointManager(run)
    assert manager.all_steps() == [10, 20, 30]
    assert manager.latest_step() == 30
    state, host, step = manager.restore(abstract)
    assert (step, host) == (30, {"position": 120})
    assert isinstance(state, State)
    assert_same(state, make_values(30))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    state, host, step = manager.restore(abstract, step=10)
    assert (step, host) == (10, {"position": 40})
    assert_same(state, make_values(10))


@pytest.mark.parametrize("model", [1, 4])
def test_restore_on_another_mesh_gives_equal_arrays(run, model):
    other = Partitioner(model_parallelism=model)
    state, _, _ = CheckpointManager(run).restore(make_abstract(other))
    assert_same(state, make_values(30))
    kernel = state.params["dense"]["kernel"]
    assert kernel.sharding.mesh == other.mesh
    assert kernel.sharding.spec == PartitionSpec(None, "model")


@pytest.mark.pitfall(43)
def test_restored_optimizer_makes_the_same_next_update(run, abstract):
    state, _, _ = CheckpointManager(run).restore(abstract)
    grads = jax.tree.map(lambda x: jnp.ones(x.shape), state.params)

    @jax.jit
    def update(state):
        updates, _ = TX.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates)

    assert_same(update(state), update(make_state(30, abstract)))


def test_save_is_not_changed_by_a_donated_next_step(tmp_path, abstract):
    manager = CheckpointManager(tmp_path)
    state = make_state(7, abstract)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    step_fn = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0, out_shardings=shardings
    )
    state = step_fn.lower(state).compile()(make_state(7, abstract))  # Compiled beforehand.
    state = make_state(7, abstract)
    manager.save(1, state)
    for _ in range(5):
        state = step_fn(state)
    jax.block_until_ready(state)
    restored, _, _ = manager.restore(abstract)
    assert_same(restored, make_values(7))
    manager.close()


def test_checkpoint_counts_only_with_its_manifest(tmp_path, abstract, monkeypatch):
    manager = CheckpointManager(tmp_path)
    seen = []
    real = layout.write_manifest

    def spy(folder, **kwargs):
        assert (folder / "arrays" / "_METADATA").exists()  # committed by Orbax, yet
        seen.append((manager.all_steps(), manager.latest_step()))
        real(folder, **kwargs)

    monkeypatch.setattr(layout, "write_manifest", spy)
    manager.save(5, make_state(5, abstract))
    manager.wait()
    assert seen == [([], None)]
    assert manager.latest_step() == 5
    listed = json.loads((tmp_path / "checkpoint_5" / "MANIFEST.json").read_text())["files"]
    on_disk = {str(p.relative_to(tmp_path / "checkpoint_5")) for p in files_of(tmp_path)}
    assert set(listed) == on_disk - {"MANIFEST.json"}
    assert "host.json" in listed
    assert any(name.startswith("arrays/") and "/d/" in name for name in listed)
    manager.close()


def test_a_flipped_bit_in_any_file_is_found(run, abstract, warnings):
    folder = run / "checkpoint_30"
    files = files_of(folder)
    assert len(files) > 8
    rng = np.random.default_rng(0)
    manager = CheckpointManager(run)
    for path in files:
        original = path.read_bytes()
        size = len(original)
        for position in {0, size // 2, size - 1, int(rng.integers(size))}:
            flip(path, position, int(rng.integers(8)))
            assert manager.choose() == 20, (path, position)
            assert path.name in warnings().splitlines()[-1]
            assert "Using step 20 instead" in warnings().splitlines()[-1]
            with pytest.raises(CorruptCheckpointError, match=path.name.replace(".", r"\.")):
                CheckpointManager(run).choose(30)
            path.write_bytes(original)
    assert CheckpointManager(run).choose() == 30
    # And end to end: what is restored is the checkpoint before.
    flip(max(files, key=lambda p: p.stat().st_size), 100, 3)
    state, host, step = CheckpointManager(run).restore(abstract)
    assert (step, host["position"]) == (20, 80)
    assert_same(state, make_values(20))


def test_every_bit_of_the_manifest_itself_is_guarded(run):
    path = run / "checkpoint_30" / "MANIFEST.json"
    original = path.read_bytes()
    folder = layout.epath.Path(run / "checkpoint_30")
    for position in range(0, len(original), 3):
        flip(path, position, position % 8)
        with pytest.raises(CorruptCheckpointError):
            manifest.verify_manifest(folder, digests=False)
        path.write_bytes(original)
    manifest.verify_manifest(folder)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "append"])
def test_truncated_and_deleted_files_are_found(run, damage):
    manager = CheckpointManager(run)
    for path in files_of(run / "checkpoint_30"):
        original = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            changed = {"truncate": original[:-1], "empty": b"", "append": original + b"\0"}
            path.write_bytes(changed[damage])
        assert manager.choose() == 20, path
        path.write_bytes(original)
    assert manager.choose() == 30


def test_latest_step_after_the_fallback_goes_on_and_sets_the_corrupt_one_aside(
    run, abstract, warnings
):
    (run / "checkpoint_30" / "host.json").unlink()
    manager = CheckpointManager(run, keep=1)
    _, _, step = manager.restore(abstract)
    assert step == 20
    manager.save(25, make_state(25, abstract))
    manager.wait()
    assert manager.all_steps() == [25]
    assert (run / "corrupt_checkpoint_30.0").is_dir()
    assert "moved the corrupt checkpoint" in warnings()
    manager.save(30, make_state(31, abstract))
    manager.wait()
    state, _, step = manager.restore(abstract)
    assert step == 30
    assert_same(state, make_values(31))
    manager.close()


def test_all_corrupt_is_an_error_never_a_fresh_start(run, abstract):
    for step in (10, 20, 30):
        flip(run / f"checkpoint_{step}" / "host.json", 5, 0)
    manager = CheckpointManager(run)
    assert manager.latest_step() == 30
    with pytest.raises(CorruptCheckpointError, match=r"Step 10: .*host\.json .* Step 30: .*start"):
        manager.restore(abstract)


def test_lost_manifests_are_an_error_never_a_fresh_start(run):
    for step in (10, 20, 30):
        (run / f"checkpoint_{step}" / "MANIFEST.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"MANIFEST\.json is missing"):
        CheckpointManager(run).latest_step()


def test_a_first_save_cut_off_counts_as_no_checkpoint(tmp_path, abstract):
    folder = tmp_path / "checkpoint_10"
    folder.mkdir()
    (folder / "UNFINISHED").write_text("")
    manager = CheckpointManager(tmp_path)
    assert manager.latest_step() is None
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint"):
        manager.restore(abstract)
    manager.save(10, make_state(10, abstract))
    manager.wait()
    assert manager.latest_step() == 10
    assert not (folder / "UNFINISHED").exists()
    manager.close()


def test_unfinished_later_checkpoint_is_skipped_loudly(run, abstract, warnings):
    shutil.copytree(run / "checkpoint_30", run / "checkpoint_40")
    (run / "checkpoint_40" / "MANIFEST.json").unlink()
    (run / "checkpoint_40" / "UNFINISHED").write_text("")
    _, _, step = CheckpointManager(run).restore(abstract)
    assert step == 30
    assert "checkpoint_40 is unfinished" in warnings()
    assert "step 30 instead" in warnings()


def test_explicit_step_that_is_missing_lists_those_there(run, abstract):
    with pytest.raises(FileNotFoundError, match=r"checkpoint_15; there are steps \[10, 20, 30\]"):
        CheckpointManager(run).restore(abstract, step=15)


def steps_on_disk(folder):
    return sorted(int(p.name.split("_")[1]) for p in folder.glob("checkpoint_*"))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 1}, [2, 6]),
        ({"keep": 2, "best_mode": "min"}, [3, 5, 6]),
        ({"keep": 1, "keep_every": 4}, [2, 4, 6]),
        ({"keep": None}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_kept_are_the_last_the_best_and_every_nth(tmp_path, abstract, options, left):
    metrics = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: None, 6: 0.9}
    state = make_state(1, abstract)
    with CheckpointManager(tmp_path, **options) as manager:
        for step, metric in metrics.items():
            manager.save(step, state, metric=metric)
    assert steps_on_disk(tmp_path) == left
    assert CheckpointManager(tmp_path, **options).best_step() == (
        3 if "best_mode" in options else 2
    )


def test_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path, abstract, monkeypatch):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, make_state(1, abstract))
    manager.wait()

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "write_manifest", fail)
        manager.save(2, make_state(2, abstract))
        with pytest.raises(OSError, match="disk full"):
            manager.wait()
    state, _, step = manager.restore(abstract)
    assert step == 1
    assert_same(state, make_values(1))
    manager.save(2, make_state(2, abstract))
    manager.wait()
    assert steps_on_disk(tmp_path) == [2]
    manager.close()


def test_error_of_the_thread_surfaces_at_the_next_save(tmp_path, abstract, monkeypatch):
    manager = CheckpointManager(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "finish", fail)
        manager.save(1, make_state(1, abstract))
        with pytest.raises(OSError, match="disk full") as caught:
            manager.save(2, make_state(2, abstract))
    assert "checkpoint_1" in caught.value.__notes__[0]
    manager.save(2, make_state(2, abstract))  # Raised once, and no longer in the way.
    manager.close()
    assert manager.all_steps() == [2]


def test_a_later_checkpoint_is_never_overwritten(run, abstract):
    manager = CheckpointManager(run)
    manager.restore(abstract, step=20)
    with pytest.raises(ValueError, match=r"steps \[30\]; got step 25 .* new directory"):
        manager.save(25, make_state(25, abstract))
    manager.restore(abstract)
    assert manager.save(30, make_state(30, abstract)) is False
    with pytest.raises(ValueError, match=r"steps \[30\]; got step 30"):
        CheckpointManager(run).save(30, make_state(30, abstract))


def changed(abstract, **params):
    return abstract.replace(params={**abstract.params, **params})


def test_other_shapes_name_the_parameter_and_both_shapes(run, abstract):
    kernel = jax.ShapeDtypeStruct((16, 64), np.float32)
    with pytest.raises(
        ValueError,
        match=r"params/dense/kernel is float32\[16, 32\], wanted float32\[16, 64\]\. Set the model",
    ):
        CheckpointManager(run).restore(changed(abstract, dense={"kernel": kernel}))


def test_other_structure_names_missing_and_unwanted(run, abstract):
    extra = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(ValueError, match=r"params/bias float32\[3\] is missing"):
        CheckpointManager(run).restore(changed(abstract, bias=extra))
    with pytest.raises(ValueError, match=r"opt_state/\S+ \S+\[.*\] is not wanted"):
        CheckpointManager(run).restore(abstract.replace(opt_state=()))


def test_other_dtype_is_an_error_for_a_state(run, abstract):
    scale = jax.ShapeDtypeStruct((16,), np.float32)
    with pytest.raises(ValueError, match=r"bfloat16\[16\], wanted float32\[16\]"):
        CheckpointManager(run).restore(changed(abstract, norm={"scale": scale}))


def test_format_of_another_version_is_named(run, abstract):
    folder = run / "checkpoint_30"
    contents = json.loads((folder / "host.json").read_text())
    (folder / "host.json").write_text(json.dumps({**contents, "format_version": 2}))
    manifest.write_manifest(layout.epath.Path(folder))
    with pytest.raises(
        ValueError, match=r"checkpoint_30 has checkpoint format 2, .* reads format 1"
    ):
        CheckpointManager(run).restore(abstract)


def test_host_part_must_be_json(tmp_path, abstract):
    manager = CheckpointManager(tmp_path)
    with pytest.raises(ValueError, match=r"must be JSON; .*object"):
        manager.save(1, make_state(1, abstract), {"bad": object()})
    manager.save(1, make_state(1, abstract), {"loss": np.float32(0.5), "n": np.int64(3)})
    assert manager.restore(abstract)[1] == {"loss": 0.5, "n": 3}
    manager.close()


def test_random_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"random key at rng/dropout"):
        CheckpointManager(tmp_path).save(1, {"rng": {"dropout": jax.random.key(0)}})


def test_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .*file/run: .* Set MODEL_DIR"):
        CheckpointManager(tmp_path / "file" / "run")
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*absent"):
        CheckpointManager(tmp_path / "absent", read_only=True)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep must be at least 1; got 0"),
        ({"keep_every": 0}, r"keep_every must be at least 1; got 0"),
        ({"best_mode": "highest"}, r"'max' or 'min'; got 'highest'"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointManager(tmp_path, **options)


# Saves step 1, starts to save step 2, and is killed at a stage of that.
KILLED = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    import jax.numpy as jnp
    from gkd_jax.checkpoints import layout, manager as manager_lib, manifest

    folder, stage = sys.argv[1:]

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def delete_half(folder):
        (folder / layout.UNFINISHED).write_text("")
        (folder / manifest.MANIFEST).unlink()
        kill()

    def make(value):
        return {"params": {"w": jnp.full((512, 1024), value, jnp.float32)}}

    manager = manager_lib.CheckpointManager(folder, keep=1)
    manager.save(1, make(1.0), {"position": 1})
    manager.wait()
    if stage == "arrays written":
        layout.finish = kill
    elif stage == "host part written":
        layout.write_manifest = kill
    elif stage == "digests computed":
        manifest.write_durably = kill
    elif stage == "old one half deleted":
        layout.delete = delete_half
    elif stage != "at once":
        threading.Timer(float(stage), kill).start()
    manager.save(2, make(2.0), {"position": 2})
    if stage == "at once":
        kill()
    manager.wait()
    time.sleep(60)
    """
)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("at once", 1),
        ("host part written", 1),
        pytest.param("arrays written", 1, marks=SLOW),
        pytest.param("digests computed", 1, marks=SLOW),
        pytest.param("old one half deleted", 2, marks=SLOW),
        *(pytest.param(f"{delay}", None, marks=SLOW) for delay in (0.0, 0.01, 0.03, 0.1, 0.3)),
    ],
)
def test_killed_while_saving_leaves_a_good_checkpoint(tmp_path, stage, left):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), stage],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    manager = CheckpointManager(tmp_path, keep=1)
    abstract = {"params": {"w": jax.ShapeDtypeStruct((512, 1024), np.float32)}}
    state, host, step = manager.restore(abstract)
    assert step in (1, 2)
    assert left in (step, None)
    assert host == {"position": step}
    np.testing.assert_array_equal(np.asarray(state["params"]["w"]), float(step))
    # And the run goes on from there.
    if step == 1:
        manager.save(2, state, host)
    manager.save(3, state, host)
    manager.close()
    assert steps_on_disk(tmp_path) == [3]


def test_a_deletion_may_be_cut_off_anywhere(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    state = {"params": {"w": np.zeros(3)}}
    for allowed in range(100):
        manager = CheckpointManager(tmp_path / str(allowed), keep=1)
        manager.save(1, state)
        manager.wait()
        removed = []

        def count(remove, removed=removed, allowed=allowed):
            def wrapped(*args, **kwargs):
                if len(removed) == allowed:
                    raise KilledError
                removed.append(args)
                return remove(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("unlink", "remove", "rmdir"):
                patch.setattr(os, name, count(getattr(os, name)))
            try:
                layout.delete(manager.folder(1))
            except KilledError:
                assert manager.all_steps() == [1] or layout.is_unfinished(manager.folder(1))
            else:
                assert allowed > 5
                return
        manager.save(2, state)
        manager.close()
        assert steps_on_disk(manager.directory) == [2]
    pytest.fail("deleting a checkpoint takes fewer than 100 removals")


# Two processes of four devices each, on one directory.
TWO_PROCESSES = textwrap.dedent(
    """
    import os, pathlib, sys
    rank, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    import jax
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from gkd_jax.checkpoints import layout, load
    from gkd_jax.checkpoints.manager import CheckpointManager
    from gkd_jax.checkpoints.save import save_params
    from gkd_jax.devices.partitioning import Partitioner
    from gkd_jax.devices.processes import fetch_to_host

    partitioner = Partitioner(model_parallelism=2)
    ids = np.arange(8).reshape(2, 4)[partitioner.data_layout.shard_id]
    assert partitioner.data_layout.num_shards == 2
    rows = partitioner.shard_batch(ids)
    np.testing.assert_array_equal(partitioner.fetch_to_host(rows), np.arange(8))

    shardings = {"params": {"w": partitioner.sharding("data", "model")},
                 "step": partitioner.replicated}
    value = lambda k: {"params": {"w": jnp.arange(64.0 * 32).reshape(64, 32) * k},
                       "step": jnp.int32(k)}
    make = jax.jit(value, out_shardings=shardings)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                            jax.eval_shape(value, 1), shardings)

    def check(state, k):
        got = fetch_to_host(state)["params"]["w"]
        np.testing.assert_array_equal(got, np.arange(64.0 * 32).reshape(64, 32) * k)

    manager = CheckpointManager(folder / "run", keep=None)
    for step in (1, 2):
        manager.save(step, make(step), {"position": step})
    manager.wait()
    assert manager.all_steps() == [1, 2]
    state, host, step = manager.restore(abstract)
    assert (step, host) == (2, {"position": 2})
    check(state, 2)

    multihost_utils.sync_global_devices("before damage")
    if rank == 0:
        path = folder / "run" / "checkpoint_2" / "host.json"
        path.write_text(path.read_text().replace("position", "positiom"))
    multihost_utils.sync_global_devices("after damage")
    state, host, step = manager.restore(abstract)
    assert (step, host) == (1, {"position": 1})
    check(state, 1)
    try:
        manager.restore(abstract, step=2)
    except ValueError as error:
        assert "step 2 cannot be used" in str(error) or "process 0" in str(error)
    else:
        raise AssertionError("a corrupt checkpoint was restored")
    manager.save(2, state, host)
    manager.wait()
    assert manager.restore(abstract)[2] == 2

    def fail(*_):
        raise OSError("disk full")

    real, layout.finish = layout.finish, fail
    manager.save(3, state, host)
    try:
        manager.wait()
    except (OSError, RuntimeError) as error:
        assert isinstance(error, OSError) == (rank == 0)
    else:
        raise AssertionError("a failure was lost")
    layout.finish = real
    save_params(folder / "exported", state["params"])
    try:
        save_params(folder / "exported", state["params"])
    except ValueError as error:
        assert "must be new" in str(error) or "process 0" in str(error)
    else:
        raise AssertionError("an export was overwritten")
    check({"params": load.load_params(folder / "exported", abstract["params"])}, 1)
    manager.close()
    print("finished")
    """
)


@pytest.mark.slow
def test_two_processes_save_agree_and_restore(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(port), str(tmp_path)],
            cwd=pathlib.Path(__file__).parents[2],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
            assert out.strip().endswith("finished")
    finally:
        for process in processes:
            process.kill()
