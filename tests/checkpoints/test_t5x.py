"""Reading T5X's checkpoints: made here in its formats, and made by T5X itself."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import serialization, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gkd_jax.checkpoints import t5x
from gkd_jax.checkpoints.t5x import is_t5x_checkpoint, read_t5x_params
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config

ARRAYS = {
    "encoder/layers_0/mlp/wo/kernel": np.arange(32, dtype=np.float32).reshape(8, 4) / 3,
    "encoder/encoder_norm/scale": np.linspace(0.5, 1.5, 4, dtype=np.float32),
    "token_embedder/embedding": np.arange(64, dtype=np.float32).reshape(16, 4) - 7.3,
}
KINDS = pytest.mark.parametrize("kind", ["native", "orbax"])


def abstract(dtype=jnp.float32, **changes):
    leaves = {k: jax.ShapeDtypeStruct(v.shape, dtype) for k, v in ARRAYS.items()}
    leaves.update(changes)
    return traverse_util.unflatten_dict(leaves, sep="/")


def write_array(kvstore, array, *, chunks):
    import tensorstore

    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "metadata": {"chunks": chunks, "compressor": {"id": "gzip", "level": 1}},
        "store_data_equal_to_fill_value": True,
    }
    store = tensorstore.open(
        spec, create=True, dtype=jnp.dtype(array.dtype).name, shape=array.shape
    ).result()
    store.write(array).result()


def write_native(folder, arrays, *, inline=(), old_style=()):
    """T5X's native format, as its `checkpoints.py` describes it."""
    folder.mkdir(parents=True)
    target = {}
    for name, array in arrays.items():
        stored = f"target.{name.replace('/', '.')}"
        if name in inline:
            target[name] = array
            continue
        chunks = [max(1, array.shape[0] // 2), *array.shape[1:]]
        write_array({"driver": "file", "path": f"{folder}/{stored}/"}, array, chunks=chunks)
        metadata = {"chunks": chunks, "shape": list(array.shape)}
        spec = {"driver": "zarr", "dtype": str(array.dtype), "metadata": metadata}
        if name in old_style:
            # Written on a bucket, by a TensorStore before 0.1.14.
            kvstore = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
            target[name] = {**spec, "kvstore": kvstore, "path": stored}
        else:
            target[name] = {**spec, "kvstore": {"driver": "file", "path": f"{stored}/"}}
    contents = {
        "version": 3,
        "optimizer": {
            "target": traverse_util.unflatten_dict(target, sep="/"),
            "state": {"step": np.int32(7), "param_states": {"lost": {"driver": "zarr"}}},
        },
    }
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


def write_orbax(folder, arrays, *, root="target"):
    """T5X's Orbax format: one OCDBT database and its description."""
    state = folder / "state"
    state.mkdir(parents=True)
    base = {"driver": "file", "path": f"{state}/"}
    tree = {}
    for name, array in arrays.items():
        parts = (root, *name.split("/"))
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(parts) + "/"}
        write_array(kvstore, array, chunks=[max(1, array.shape[0] // 2), *array.shape[1:]])
        tree[str(parts)] = {"key_metadata": [{"key": key, "key_type": 2} for key in parts]}
    tree["('state', 'step')"] = {"key_metadata": [{"key": "state"}, {"key": "step"}]}
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    (state / "_METADATA").write_text(json.dumps(metadata))


def write(kind, folder, arrays=ARRAYS, **kwargs):
    (write_native if kind == "native" else write_orbax)(folder, arrays, **kwargs)
    return folder


def assert_equals(params, arrays=ARRAYS, dtype=jnp.float32):
    flat = traverse_util.flatten_dict(params, sep="/")
    assert flat.keys() == arrays.keys()
    for name, array in arrays.items():
        assert flat[name].dtype == dtype
        np.testing.assert_array_equal(flat[name], array.astype(dtype))


@KINDS
def test_reads_what_was_written(kind, tmp_path):
    folder = write(kind, tmp_path / "checkpoint_7")
    assert is_t5x_checkpoint(folder) == kind
    assert_equals(read_t5x_params(folder, abstract()))
    assert_equals(read_t5x_params(str(folder), abstract(jnp.bfloat16)), dtype=jnp.bfloat16)


def test_reads_inline_arrays_and_old_specs(tmp_path):
    folder = tmp_path / "checkpoint_7"
    inline, old_style = ["encoder/encoder_norm/scale"], ["token_embedder/embedding"]
    write_native(folder, ARRAYS, inline=inline, old_style=old_style)
    assert not (folder / "target.encoder.encoder_norm.scale").exists()
    assert_equals(read_t5x_params(folder, abstract()))


@KINDS
def test_reads_bfloat16_into_float32(kind, tmp_path):
    arrays = {name: array.astype(jnp.bfloat16) for name, array in ARRAYS.items()}
    folder = write(kind, tmp_path / "checkpoint_7", arrays)
    expected = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert_equals(read_t5x_params(folder, abstract()), expected)


@KINDS
def test_reads_into_the_sharding_wanted(kind, tmp_path):
    folder = write(kind, tmp_path / "checkpoint_7")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    specs = {
        "encoder/layers_0/mlp/wo/kernel": PartitionSpec("data", "model"),
        "encoder/encoder_norm/scale": PartitionSpec(),
        "token_embedder/embedding": PartitionSpec(("data", "model"), None),
    }
    wanted = {
        name: jax.ShapeDtypeStruct(
            ARRAYS[name].shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for name, spec in specs.items()
    }
    params = read_t5x_params(folder, abstract(**wanted))
    assert_equals(params, dtype=jnp.bfloat16)
    for name, leaf in traverse_util.flatten_dict(params, sep="/").items():
        assert leaf.sharding == wanted[name].sharding
        for shard in leaf.addressable_shards:
            expected = ARRAYS[name][shard.index].astype(jnp.bfloat16)
            np.testing.assert_array_equal(shard.data, expected)


@KINDS
def test_parent_folder_gives_the_latest_complete_step(kind, tmp_path):
    write(kind, tmp_path / "checkpoint_900", {k: v + 1 for k, v in ARRAYS.items()})
    write(kind, tmp_path / "checkpoint_1000")
    write(kind, tmp_path / "checkpoint_2000.orbax-checkpoint-tmp-3")
    (tmp_path / "checkpoint_3000").mkdir()
    assert is_t5x_checkpoint(tmp_path) == kind
    assert_equals(read_t5x_params(tmp_path, abstract()))


def test_other_folders_are_no_t5x_checkpoints(tmp_path):
    assert is_t5x_checkpoint(tmp_path / "nothing") is None
    assert is_t5x_checkpoint(tmp_path) is None
    (tmp_path / "model.ckpt").write_text("another program's")
    assert is_t5x_checkpoint(tmp_path) is None
    # Another Orbax checkpoint with an item of the same name.
    other = tmp_path / "other"
    write_orbax(other, ARRAYS, root="params")
    assert is_t5x_checkpoint(other) is None
    with pytest.raises(ValueError, match=r"path must hold a T5X checkpoint; got .*other"):
        read_t5x_params(other, abstract())
    with pytest.raises(FileNotFoundError, match=r"must exist; got .*nothing"):
        read_t5x_params(tmp_path / "nothing", abstract())


@KINDS
def test_missing_parameter_is_named(kind, tmp_path):
    arrays = {k: v for k, v in ARRAYS.items() if "encoder_norm" not in k}
    folder = write(kind, tmp_path / "checkpoint_7", arrays)
    with pytest.raises(ValueError, match=r"lacks encoder/encoder_norm/scale\. Check that"):
        read_t5x_params(folder, abstract())


@KINDS
def test_parameter_that_the_model_lacks_is_named(kind, tmp_path):
    """A model with fewer layers must not load the first of a larger one's."""
    more = {"encoder/layers_1/mlp/wo/kernel": np.ones((8, 4), np.float32)}
    folder = write(kind, tmp_path / "checkpoint_7", ARRAYS | more)
    with pytest.raises(ValueError, match="has encoder/layers_1/mlp/wo/kernel besides"):
        read_t5x_params(folder, abstract())


@KINDS
def test_another_shape_is_named_with_both(kind, tmp_path):
    folder = write(kind, tmp_path / "checkpoint_7")
    wanted = {"token_embedder/embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    with pytest.raises(ValueError, match=r"token_embedder/embedding .*\(16, 8\).*\(16, 4\).*sizes"):
        read_t5x_params(folder, abstract(**wanted))
    # A scalar fits no array, nor the reverse: shapes are compared, not broadcast.
    wanted = {"encoder/encoder_norm/scale": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(ValueError, match=r"encoder_norm/scale .*\(\).*\(4,\)"):
        read_t5x_params(folder, abstract(**wanted))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_msgpack_is_an_error(keep, tmp_path):
    folder = write("native", tmp_path / "checkpoint_7")
    file = folder / "checkpoint"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint must be T5X's msgpack file.*copy the"):
        read_t5x_params(folder, abstract())


def test_msgpack_of_something_else_is_an_error(tmp_path):
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"params": {}}))
    with pytest.raises(ValueError, match="must be T5X's msgpack file with optimizer/target"):
        read_t5x_params(tmp_path, abstract())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "lost", "no_metadata"])
def test_damaged_native_array_is_an_error(damage, tmp_path):
    """A lost chunk above all: TensorStore alone would read it as zeros."""
    folder = write("native", tmp_path / "checkpoint_7")
    array = folder / "target.token_embedder.embedding"
    chunk = array / "1.0"
    content = chunk.read_bytes()
    if damage == "truncated":
        chunk.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 16])
        chunk.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    elif damage == "lost":
        chunk.unlink()
    else:
        (array / ".zarray").unlink()
    with pytest.raises(ValueError, match=r"token_embedder/embedding could not be read.*copy the"):
        read_t5x_params(folder, abstract())


@pytest.mark.parametrize("damage", ["truncated", "lost"])
def test_damaged_orbax_database_is_an_error(damage, tmp_path):
    folder = write("orbax", tmp_path / "checkpoint_7")
    # Small databases keep values in the manifest's tree nodes: damage whatever there is.
    for file in (folder / "state" / "d").iterdir():
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()
    with pytest.raises(ValueError, match=r"could not be read from .*checkpoint_7.*copy the"):
        read_t5x_params(folder, abstract())


def test_damaged_orbax_description_is_an_error(tmp_path):
    folder = write("orbax", tmp_path / "checkpoint_7")
    file = folder / "state" / "_METADATA"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"_METADATA must be Orbax's JSON.*copy the"):
        is_t5x_checkpoint(folder)


@KINDS
def test_integers_are_no_parameters(kind, tmp_path):
    """T5X before version 3 stored bfloat16 as uint16, whose values mean nothing."""
    arrays = ARRAYS | {"token_embedder/embedding": np.ones((16, 4), np.uint16)}
    folder = write(kind, tmp_path / "checkpoint_7", arrays)
    with pytest.raises(ValueError, match=r"token_embedder/embedding .*floating-point.*uint16"):
        read_t5x_params(folder, abstract())


def test_paths_in_buckets():
    path = epath.Path("gs://bucket/models/checkpoint_7/state")
    expected = {"driver": "gcs", "bucket": "bucket", "path": "models/checkpoint_7/state/"}
    assert t5x._kvstore(path) == expected


# Written by T5X itself. Their values are checked in tests/models/test_t5x_parity.py.


def make_model(folder, **changes):
    return T5(T5Config(**(json.loads((folder / "meta.json").read_text())["config"] | changes)))


@KINDS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 32}, r"must have the shape of the model, \(32,\); .* has \(28,\)"),
        ({"vocab_size": 128}, r"decoder/logits_dense/kernel .*\(28, 128\).*\(28, 96\)"),
        ({"num_encoder_layers": 3}, "lacks encoder/layers_2/attention/key/kernel.* and 4 more"),
        ({"num_decoder_layers": 2}, "has decoder/layers_2/encoder_decoder_attention/key/kernel"),
        ({"logits_via_embedding": True}, "has decoder/logits_dense/kernel besides"),
        ({"mlp_activations": ("relu",)}, "lacks decoder/layers_0/mlp/wi/kernel"),
    ],
)
def test_a_model_of_other_sizes_is_refused(external_data, kind, changes, message):
    folder = external_data / "t5x_tiny" / "v1_1"
    with pytest.raises(ValueError, match=message):
        read_t5x_params(folder / kind, make_model(folder, **changes).abstract_params())


@KINDS
def test_t5x_checkpoints_are_recognised(external_data, kind):
    for variant in ("v1_1", "v1_0"):
        folder = external_data / "t5x_tiny" / variant
        assert is_t5x_checkpoint(folder / kind) == kind
        assert is_t5x_checkpoint(folder / kind / "checkpoint_2000") == kind
        assert is_t5x_checkpoint(folder) is None


def test_truncated_t5x_orbax_checkpoint_is_an_error(external_data, tmp_path):
    folder = external_data / "t5x_tiny" / "v1_1"
    copy = tmp_path / "checkpoint_2000"
    shutil.copytree(folder / "orbax" / "checkpoint_2000", copy, copy_function=shutil.copyfile)
    for file in copy.rglob("*"):
        file.chmod(0o755)
    for file in (copy / "state" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="could not be read"):
        read_t5x_params(copy, make_model(folder).abstract_params())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_byte_for_byte(dtype, tmp_path, monkeypatch):
    """In several chunks of rows too, and zeros as well."""
    monkeypatch.setattr(t5x, "_CHUNK_BYTES", 12)
    arrays = {**ARRAYS, "decoder/logits_dense/kernel": np.zeros((5, 3), np.float32)}
    folder = epath.Path(tmp_path / "student" / "checkpoint_12")
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(arrays, sep="/"))
    t5x.write_t5x_checkpoint(folder, params, step=12, dtype=dtype)
    assert is_t5x_checkpoint(folder) == is_t5x_checkpoint(folder.parent) == "native"
    leaves = {k: jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype)) for k, v in arrays.items()}
    wanted = traverse_util.unflatten_dict(leaves, sep="/")
    read = traverse_util.flatten_dict(read_t5x_params(folder.parent, wanted), sep="/")
    for name, array in arrays.items():
        expected = array.astype(jnp.dtype(dtype))
        assert np.asarray(read[name]).tobytes() == expected.tobytes(), name
    chunk = next((folder / "target.decoder.logits_dense.kernel").glob("1.*"))
    chunk.unlink()
    with pytest.raises(ValueError, match=r"decoder/logits_dense/kernel could not be read"):
        read_t5x_params(folder, wanted)


def test_what_is_written_is_what_t5x_itself_wrote(external_data, tmp_path):
    """Names, shapes and dtypes of the arrays of a checkpoint of T5X's, and its file."""
    there = external_data / "t5x_tiny" / "v1_1" / "native" / "checkpoint_2000"
    config = json.loads((there.parents[1] / "meta.json").read_text())["config"]
    params = read_t5x_params(there, T5(T5Config(**config)).abstract_params())
    folder = epath.Path(tmp_path / "checkpoint_2000")
    t5x.write_t5x_checkpoint(folder, params, step=2000, dtype="float32")
    left, right = (
        serialization.msgpack_restore((one / "checkpoint").read_bytes()) for one in (there, folder)
    )
    assert left["version"] == right["version"]
    assert left["optimizer"]["state"]["step"] == right["optimizer"]["state"]["step"]
    specs = [
        {
            name: spec
            for name, spec in traverse_util.flatten_dict(one["optimizer"]["target"]).items()
            if name[-1] != "chunks"
        }
        for one in (left, right)
    ]
    assert specs[0] == specs[1]
