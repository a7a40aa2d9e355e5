"""Two small language models whose distributions tests know exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.common.batch import Batch
from gkd_jax.models.t5 import T5
from gkd_jax.models.t5_config import T5Config


@dataclasses.dataclass(frozen=True)
class ScriptedModel:
    """Logits are read from a table [rows, T, V] by the prompt's first token and the position.

    `params` is the table; hidden states are the logits themselves.
    """

    vocab_size: int

    @property
    def config(self):
        return self

    def prefill(self, params, inputs, inputs_mask, *, max_length):
        script = params[inputs[:, 0]]
        return script[:, 0], script

    def decode_step(self, params, state, tokens, index):
        return state[:, index + 1], state

    def unembed(self, params, hidden):
        return hidden.astype(jnp.float32)


def write_script(rows, *, vocab_size, length, strength=30.0):
    """A table by which greedy decoding writes `rows`; after a row's end, its last token."""
    table = np.zeros((len(rows), length, vocab_size), np.float32)
    for number, row in enumerate(rows):
        for position in range(length):
            table[number, position, row[min(position, len(row) - 1)]] = strength
    return jnp.asarray(table)


@dataclasses.dataclass(frozen=True)
class HistoryModel:
    """The next logits depend on the prompt and on every output token and its place.

    h_t = tanh(mean of the prompt's embeddings + sum over i < t of 0.8**(t - i) E[y_i]). The
    state keeps the embeddings of the output, as a cache of keys does.
    """

    vocab_size: int
    dim: int = 16

    @property
    def config(self):
        return self

    def init(self, key):
        keys = jax.random.split(key, 2)
        return {
            "embed": jax.random.normal(keys[0], (self.vocab_size, self.dim)),
            "head": jax.random.normal(keys[1], (self.dim, self.vocab_size)),
        }

    def _hidden(self, prompt, history, length):
        place = jnp.arange(history.shape[1])
        decay = jnp.where(place < length, 0.8 ** (length - place), 0.0)
        return jnp.tanh(prompt + jnp.einsum("btd,t->bd", history, decay))

    def _prompt(self, params, inputs, inputs_mask):
        mask = inputs_mask[:, :, None].astype(jnp.float32)
        return (params["embed"][inputs] * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)

    def hidden_states(self, params, batch: Batch, *, dropout_key=None):
        prompt = self._prompt(params, batch.inputs, batch.inputs_mask)
        history = params["embed"][batch.targets]
        length = batch.targets.shape[1]
        states = [self._hidden(prompt, history, t) for t in range(length)]
        return jnp.stack(states, axis=1)

    def unembed(self, params, hidden):
        return (hidden @ params["head"]).astype(jnp.float32)

    def prefill(self, params, inputs, inputs_mask, *, max_length):
        prompt = self._prompt(params, inputs, inputs_mask)
        state = {
            "prompt": prompt,
            "history": jnp.zeros((inputs.shape[0], max_length, self.dim)),
        }
        return self._hidden(prompt, state["history"], 0), state

    def decode_step(self, params, state, tokens, index):
        history = state["history"].at[:, index].set(params["embed"][tokens])
        hidden = self._hidden(state["prompt"], history, index + 1)
        return hidden, {"prompt": state["prompt"], "history": history}


def prompts(rows, *, length=None):
    """Pads prompts on the right; returns inputs and their mask."""
    length = length or max(map(len, rows))
    inputs = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        inputs[number, : len(row)] = row
        mask[number, : len(row)] = True
    return jnp.asarray(inputs), jnp.asarray(mask)


def random_batch(key, *, batch_size, source, target, vocab_size, first_id=0):
    """Prompts of different lengths, empty outputs, running example ids."""
    ids = jax.random.randint(key, (batch_size, source), 1, vocab_size)
    lengths = 1 + jnp.arange(batch_size) % source
    mask = jnp.arange(source)[None] < lengths[:, None]
    return Batch(
        inputs=jnp.where(mask, ids, 0),
        inputs_mask=mask,
        targets=jnp.zeros((batch_size, target), jnp.int32),
        loss_weights=jnp.zeros((batch_size, target)),
        example_id=first_id + jnp.arange(batch_size, dtype=jnp.int32),
    )


@functools.cache
def tiny_t5(*, first_version=False, dtype="float32"):
    """A T5 of well-conditioned layers whose logits, of deviation 3, make outputs vary."""
    config = T5Config(
        vocab_size=40,
        emb_dim=16,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=8,
        mlp_dim=24,
        mlp_activations=("relu",) if first_version else ("gelu", "linear"),
        logits_via_embedding=first_version,
        dtype=dtype,
    )
    model = T5(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.normal(size=leaf.shape)
        if "kernel" in name:
            values /= np.sqrt(leaf.shape[0])
        elif "scale" in name:
            values = (3 if "decoder_norm" in name else 1) + 0.1 * values
        return jnp.asarray(values, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())
