"""Our models of Hugging Face's architectures against transformers itself."""

import dataclasses
import json

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.checkpoints import hf, load
from gkd_jax.common import hub
from gkd_jax.models import families
from gkd_jax.models.decoder_config import DecoderConfig, Rope
from gkd_jax.models.decoder_only import DecoderOnly
from gkd_jax.models.t5 import T5
from gkd_jax.objectives.divergences import GeneralizedJSD
from gkd_jax.objectives.fused import fused_weighted_loss
from gkd_jax.objectives.objective import Objective, Predictions, final_weights, weighted_loss
from gkd_jax.sampling.decode import decode
from gkd_jax.sampling.methods import Greedy

NAMES = sorted(hf_models.CASES)
DECODERS = [name for name in NAMES if not hf_models.is_t5(name)]
MAX_LENGTH = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_models.save(name, root / name) for name in NAMES}


def loaded(folder):
    model = hf.hf_model(str(folder), dtype="float32")
    return model, load.load_params(folder, model.abstract_params())


def our_logits(model, params, batch):
    run = jax.jit(lambda p, b: model.unembed(p, model.hidden_states(p, b)))
    return np.asarray(run(params, batch))


@pytest.mark.pitfall(21)
@pytest.mark.pitfall(53)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(folders, name):
    """With prompts of different length, padded; windows and stretched positions are crossed."""
    model, params = loaded(folders[name])
    batch = hf_models.random_batch(inputs=20, targets=MAX_LENGTH)
    expected = hf_models.torch_logits(name, batch)
    assert expected.std() > 0.15
    got = our_logits(model, params, batch)
    assert np.abs(got - expected).max() < 1e-4


@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_is_teacher_forcing(folders, name):
    """Whatever the prompts' lengths; each step's hidden state is that of the whole output."""
    model, params = loaded(folders[name])
    batch = hf_models.random_batch(inputs=20, targets=MAX_LENGTH)

    @jax.jit
    def step_by_step(params, batch):
        hidden, state = model.prefill(
            params, batch.inputs, batch.inputs_mask, max_length=MAX_LENGTH
        )
        columns = [hidden]
        for index in range(MAX_LENGTH - 1):
            tokens = batch.targets[:, index]
            hidden, state = model.decode_step(params, state, tokens, jnp.int32(index))
            columns.append(hidden)
        return model.unembed(params, jnp.stack(columns, axis=1))

    difference = np.abs(step_by_step(params, batch) - our_logits(model, params, batch))
    assert difference.max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_greedy_outputs_are_those_of_transformers(folders, name):
    """Token for token, up to ties; several ends of sequence."""
    model, params = loaded(folders[name])
    batch = hf_models.random_batch(inputs=20)
    eos_ids = (2, 5, 11)
    decoded = jax.jit(
        lambda p, b: decode(
            model, p, b.inputs, b.inputs_mask, method=Greedy(), max_length=MAX_LENGTH,
            eos_ids=eos_ids, pad_id=0,
        )
    )(params, batch)  # fmt: skip
    for row, (inputs, mask) in enumerate(zip(batch.inputs, batch.inputs_mask, strict=True)):
        wanted = hf_models.greedy(name, inputs[mask], MAX_LENGTH, eos_ids)
        length = int(decoded.lengths[row])
        ours = np.asarray(decoded.tokens[row])[:length].tolist()
        if ours == wanted:
            continue
        first = next(i for i, (a, b) in enumerate(zip(ours, wanted, strict=False)) if a != b)
        alone = dataclasses.replace(
            hf_models.one_row(batch, row),
            targets=np.array([[*wanted[: first + 1]]], np.int32),
        )
        logits = hf_models.torch_logits(name, alone)[0, first]
        assert abs(logits[ours[first]] - logits[wanted[first]]) < 1e-4, (row, ours, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_byte_exact_and_transformers_loads_it(folders, name, tmp_path):
    model, params = loaded(folders[name])
    hf.write_hf_checkpoint(hub.find(tmp_path), model, params, dtype="float32")
    again, back = loaded(tmp_path)
    assert again == model
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    reloaded, missing, unexpected = hf_models.from_pretrained(tmp_path)
    assert not missing
    assert not unexpected
    batch = hf_models.random_batch(inputs=20, targets=MAX_LENGTH)
    expected = hf_models.torch_logits(name, batch)
    np.testing.assert_allclose(
        hf_models.torch_logits(name, batch, model=reloaded), expected, atol=1e-6
    )


@pytest.mark.pitfall(12)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_in_chunks_is_the_plain_one(folders, name):
    """Value and gradients, as student and as teacher, with its soft caps, scales and tied heads."""
    model, params = loaded(folders[name])
    batch = hf_models.random_batch(inputs=8, targets=6)
    objective = Objective(GeneralizedJSD(beta=0.3), teacher_temperature=0.8)
    other = jax.tree.map(lambda leaf: 0.7 * leaf, params)
    weights = final_weights(batch.loss_weights, reduction="per_sequence")

    def loss(function, own, theirs):
        predictions = [
            Predictions(model.hidden_states(one, batch), model.head(one), model.unembed)
            for one in (own, jax.lax.stop_gradient(theirs))
        ]
        return function(
            objective, student=predictions[0], teacher=predictions[1], targets=batch.targets,
            weights=weights,
        )[0]  # fmt: skip

    (plain, plain_grads), (fused, fused_grads) = (
        jax.jit(jax.value_and_grad(lambda own, f=function: loss(f, own, other)))(params)
        for function in (weighted_loss, fused_weighted_loss)
    )
    assert float(fused) == pytest.approx(float(plain), rel=1e-6)
    for left, right in zip(jax.tree.leaves(fused_grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6 * max(1e-2, np.abs(right).max()))


def test_shards_are_read_and_written(folders, tmp_path):
    """Several files with an index, of transformers and of ours; each in the dtype wanted."""
    sharded = hf_models.save("llama3", tmp_path / "theirs", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    model, params = loaded(folders["llama3"])
    _, theirs = loaded(sharded)
    files = hf.write_hf_checkpoint(
        hub.find(tmp_path / "ours"), model, params, dtype="float32", shard_bytes=40_000
    )
    assert len(files) > 3
    for file in (tmp_path / "ours").glob("*.safetensors"):
        assert file.stat().st_size < 44_000
    ours = loaded(tmp_path / "ours")[1]
    for leaves in zip(*map(jax.tree.leaves, (params, theirs, ours)), strict=True):
        assert len({np.asarray(leaf).tobytes() for leaf in leaves}) == 1
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.abstract_params()
    )
    for left, right in zip(
        jax.tree.leaves(load.load_params(sharded, half)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(left, np.asarray(right).astype(jnp.bfloat16))


def edited(folder, target, **changes):
    """A copy of a checkpoint whose config.json says something else."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", dict(model_type="mamba"), r"model_type 'mamba' .* supported are t5, llama"),
        ("llama2", dict(hidden_act="relu2"), r"hidden_act = 'relu2' of config\.json"),
        ("llama2", dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), r"'longrope'"),
        ("llama2", dict(partial_rotary_factor=0.5), r"partial_rotary_factor = 0\.5"),
        ("t5", dict(relative_attention_num_buckets=16), r"relative_attention_num_buckets = 16"),
        ("t5", dict(feed_forward_proj="gated-swish2"), r"feed_forward_proj = 'gated-swish2'"),
        ("llama2", dict(num_hidden_layers=4), r"lacks model\.layers\.3\..* and 6 more"),
        ("llama2", dict(num_hidden_layers=2), r"has, beside those of its architecture, model\.lay"),
        ("qwen2", dict(model_type="llama"), r"beside those .*self_attn\.k_proj\.bias"),
        (
            "llama2",
            dict(hidden_size=64),
            r"does not fit: decoder_norm/scale is \[32\], wanted \[64\]",
        ),
    ],
)
def test_what_is_not_understood_is_refused(folders, tmp_path, name, changes, message):
    folder = edited(folders[name], tmp_path / "edited", **changes)
    with pytest.raises(ValueError, match=message):
        loaded(folder)


def test_a_tied_head_that_differs_is_refused(folders, tmp_path):
    """A checkpoint of a model with a head of its own, called tied, would be another model."""
    folder = edited(folders["llama2"], tmp_path / "edited", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight\) that differs from its embedding"):
        loaded(folder)


def test_broken_files_are_refused(folders, tmp_path):
    folder = edited(folders["qwen3"], tmp_path / "edited")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for contents in (b"", whole[:4], b"\xff" * 8 + whole[8:], whole[:100], whole[:-1]):
        weights.write_bytes(contents)
        with pytest.raises(ValueError, match=r"is no whole safetensors file: .* Copy it again"):
            loaded(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"Pickled weights .* are never loaded"):
        loaded(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        loaded(folder)
    with pytest.raises(FileNotFoundError, match=r"the path does not exist"):
        load.describe_checkpoint(tmp_path / "nothing")


def test_a_missing_shard_is_refused(tmp_path):
    folder = hf_models.save("llama3", tmp_path / "model", max_shard_size="40KB")
    next(folder.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"names the file model-.*, which is missing"):
        loaded(folder)


def test_what_no_architecture_computes_is_not_written():
    plain = DecoderConfig(32, 16, 2, 2, 8, 16, ("full",))
    for changes, message in (
        (dict(post_norms=True), r"as llama, the nearest, .* post_norms = False in the place of Tr"),
        (dict(final_soft_cap=3.0), r"final_soft_cap = None"),
        (dict(norm_scale_offset=0.5), r"norm_scale_offset = 1\.0"),
    ):
        model = DecoderOnly(dataclasses.replace(plain, **changes))
        with pytest.raises(ValueError, match=message):
            families.model_to_hf(model)
    assert families.model_to_hf(DecoderOnly(plain))["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=3), r"num_heads must be a multiple of num_kv_heads; got 3 and 2"),
        (dict(head_dim=7), r"head_dim must be even"),
        (dict(layer_kinds=()), r"layer_kinds must name one of full, sliding, full_nope"),
        (dict(layer_kinds=("local",)), r"layer_kinds must name .* got \('local',\)"),
        (dict(layer_kinds=("sliding",)), r"DecoderConfig\.sliding_window"),
        (dict(mlp_activation="relu"), r"mlp_activation must be one of silu"),
        (dict(final_soft_cap=0.0), r"final_soft_cap must be positive"),
        (dict(emb_dim=0), r"emb_dim must be at least 1"),
        (dict(dropout_rate=1.0), r"dropout_rate must be at least 0 and below 1"),
    ],
)
def test_wrong_sizes_are_refused(changes, message):
    plain = DecoderConfig(32, 16, 2, 2, 8, 16, ("full",))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plain, **changes)
    with pytest.raises(ValueError, match=r"Rope\.kind must be one of"):
        Rope(kind="dynamic")


def test_released_configurations_are_understood():
    """The fields as the released checkpoints have them, older names included."""
    llama = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    config = families.model_from_hf(llama).config
    assert config.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.head_dim, config.num_layers, config.tie_embeddings) == (128, 32, False)
    gemma3 = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208, "query_pre_attn_scalar": 256, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    }  # fmt: skip
    config = families.model_from_hf(gemma3).config
    assert config.rope == Rope(1_000_000.0, "linear", 8.0)
    assert config.sliding_rope == Rope(10_000.0)
    assert config.layer_kinds[:7] == ("sliding",) * 5 + ("full", "sliding")
    assert config.tie_embeddings
    t5 = {
        "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "num_layers": 8,
        "num_decoder_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "vocab_size": 32128, "decoder_start_token_id": 0,
    }  # fmt: skip
    model = families.model_from_hf(t5)
    assert isinstance(model, T5)
    assert not model.config.logits_via_embedding
