"""Parameters from our own checkpoints and from T5X's, described, checked and cast."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.checkpoints import load
from gkd_jax.checkpoints.manager import CheckpointManager
from gkd_jax.checkpoints.manifest import CorruptCheckpointError
from gkd_jax.checkpoints.save import save_params
from gkd_jax.devices.partitioning import Partitioner


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "decoder": {"kernel": rng.normal(size=(16, 8)).astype(np.float32)},
        "norm": {"scale": rng.normal(size=(8,)).astype(np.float32)},
    }


def make_abstract(partitioner, dtype=np.float32):
    shardings = {
        "decoder": {"kernel": partitioner.sharding("data", "model")},
        "norm": {"scale": partitioner.replicated},
    }
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), make_params(), shardings
    )


@pytest.fixture(scope="module")
def partitioner():
    return Partitioner(model_parallelism=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with steps 10 and 20, and exported parameters; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointManager(folder / "run", keep=None) as manager:
        for step in (10, 20):
            moments = {"kernel": np.zeros((16, 8), np.float32)}
            state = {"step": np.int32(step), "params": make_params(step), "moments": moments}
            manager.save(step, state, {"position": step})
    save_params(folder / "exported", make_params(5), {"name": "student"})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_params(got, want, abstract, dtype=np.float32):
    for a, b, s in zip(*map(jax.tree.leaves, (got, want, abstract)), strict=True):
        assert a.dtype == dtype
        assert a.sharding.is_equivalent_to(s.sharding, a.ndim)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(jnp.asarray(b, dtype)))


@pytest.mark.parametrize(
    ("path", "seed"), [("run", 20), ("run/checkpoint_10", 10), ("exported", 5)]
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_load_sharded_in_the_dtype_wanted(saved, partitioner, path, seed, dtype):
    abstract = make_abstract(partitioner, dtype)
    got = load.load_params(saved / path, abstract)
    assert_params(got, make_params(seed), abstract, dtype)


def test_string_paths_and_no_sharding_work(saved):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_params())
    got = load.load_params(str(saved / "run"), abstract, step=10)
    np.testing.assert_array_equal(got["norm"]["scale"], make_params(10)["norm"]["scale"])


@pytest.mark.parametrize("path", ["run", "run/checkpoint_10", "exported"])
def test_relative_paths_work(saved, partitioner, monkeypatch, path):
    monkeypatch.chdir(saved)
    expected = load.load_params(saved / path, make_abstract(partitioner))
    loaded = load.load_params(path, make_abstract(partitioner))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.pitfall(32)
def test_loading_parameters_reads_no_optimizer_state(saved, partitioner, monkeypatch):
    asked = []
    real = load.layout.read_arrays
    monkeypatch.setattr(
        load.layout, "read_arrays", lambda f, tree: asked.append(tree) or real(f, tree)
    )
    got = load.load_params(saved / "run", make_abstract(partitioner))
    assert set(got) == {"decoder", "norm"}
    assert [set(tree) for tree in asked] == [{"params"}]


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(bytes(contents))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_run_with_a_corrupt_last_checkpoint_loads_the_one_before(folder, partitioner):
    flip(largest(folder / "run" / "checkpoint_20" / "arrays"))
    abstract = make_abstract(partitioner)
    assert_params(load.load_params(folder / "run", abstract), make_params(10), abstract)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_20 cannot be used: .*arrays"):
        load.load_params(folder / "run" / "checkpoint_20", abstract)
    with pytest.raises(CorruptCheckpointError, match=r"step 20 cannot be used"):
        load.load_params(folder / "run", abstract, step=20)


def test_corrupt_export_is_an_error(folder, partitioner):
    path = largest(folder / "exported" / "arrays")
    flip(path)
    with pytest.raises(CorruptCheckpointError, match=path.name):
        load.load_params(folder / "exported", make_abstract(partitioner))
    (folder / "exported" / "MANIFEST.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"has lost its MANIFEST\.json"):
        load.load_params(folder / "exported", make_abstract(partitioner))


def test_export_never_overwrites(folder):
    with pytest.raises(ValueError, match=r"must be new; got .*exported\. Choose another"):
        save_params(folder / "exported", make_params())


@pytest.mark.parametrize("call", [load.load_params, load.check_compatible])
def test_missing_path_names_the_settings(tmp_path, partitioner, call):
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint at .*absent: .*Teacher\.checkpoint"
    ):
        call(tmp_path / "absent", make_abstract(partitioner))


@pytest.mark.parametrize("call", [load.load_params, load.check_compatible])
def test_what_is_no_checkpoint_lists_what_was_looked_for(tmp_path, partitioner, call):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"is not a checkpoint\. Looked for: .*MANIFEST.*T5X"):
            call(path, make_abstract(partitioner))


@pytest.mark.parametrize("call", [load.load_params, load.check_compatible])
@pytest.mark.parametrize("path", ["run", "run/checkpoint_10", "exported"])
def test_other_shapes_name_the_first_few(saved, partitioner, call, path):
    abstract = make_abstract(partitioner)
    wide = jax.ShapeDtypeStruct((16, 32), np.float32)
    with pytest.raises(ValueError, match=r"decoder/kernel is \[16, 8\], wanted \[16, 32\]"):
        call(saved / path, {**abstract, "decoder": {"kernel": wide}})
    with pytest.raises(ValueError, match=r"a0 .* a1 .* a2 .*; and 6 more"):
        call(saved / path, {**abstract, **{f"a{i}": wide for i in range(9)}})
    with pytest.raises(ValueError, match=r"norm/scale \[8\] is not wanted"):
        call(saved / path, {"decoder": abstract["decoder"]})


def test_matching_shapes_are_compatible_in_any_dtype(saved, partitioner):
    load.check_compatible(saved / "run", make_abstract(partitioner, jnp.bfloat16))


@pytest.mark.parametrize(
    ("path", "kind", "step"),
    [("run", "run", 20), ("run/checkpoint_10", "state", 10), ("exported", "params", None)],
)
def test_description_has_kind_step_and_parameters(saved, monkeypatch, path, kind, step):
    monkeypatch.setattr(load.layout, "read_arrays", None)  # Nothing is read.
    info = load.describe_checkpoint(saved / path)
    assert (info.kind, info.step) == (kind, step)
    assert info.shapes == {"decoder/kernel": ((16, 8), "float32"), "norm/scale": ((8,), "float32")}


def test_description_finds_a_truncated_file(folder):
    path = largest(folder / "exported" / "arrays")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=path.name):
        load.describe_checkpoint(folder / "exported")


def t5x_paths(root):
    for variant in ("v1_1", "v1_0"):
        for kind in ("native", "orbax"):
            yield variant, kind, root / "t5x_tiny" / variant / kind


def test_t5x_checkpoints_are_recognised_and_described(external_data):
    for variant, kind, root in t5x_paths(external_data):
        for path in (root, next(root.glob("checkpoint_*"))):
            info = load.describe_checkpoint(path)
            assert (info.kind, info.step) == (f"t5x-{kind}", 2000)
            assert info.shapes["decoder/decoder_norm/scale"] == ((28,), "float32")
            assert ("decoder/logits_dense/kernel" in info.shapes) == (variant == "v1_1")


def test_t5x_parameters_load_in_the_dtype_wanted(external_data, partitioner):
    _, _, root = next(t5x_paths(external_data))
    info = load.describe_checkpoint(root)
    abstract: dict = {}
    for name, (shape, _) in info.shapes.items():
        *parents, last = name.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=partitioner.replicated)
    load.check_compatible(root, abstract)
    params = load.load_params(root, abstract)
    scale = params["decoder"]["decoder_norm"]["scale"]
    assert scale.dtype == jnp.bfloat16
    assert scale.sharding.is_equivalent_to(partitioner.replicated, 1)
    assert float(jnp.abs(scale.astype(jnp.float32)).max()) > 0.1
    abstract["decoder"]["decoder_norm"]["scale"] = jax.ShapeDtypeStruct((29,), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"decoder/decoder_norm/scale is \[28\], wanted \[29\]"):
        load.check_compatible(root, abstract)
