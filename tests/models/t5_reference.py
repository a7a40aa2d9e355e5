"""T5 in float64 NumPy, written from the paper's equations: the reference of the model tests."""

import math

import numpy as np


def bucket(distance, *, bidirectional, num_buckets=32, max_distance=128):
    """Bucket of one distance (key minus query), in exact integer arithmetic."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    steps = num_buckets - exact
    # The largest j below `steps` with distance >= exact * (max_distance / exact) ** (j / steps).
    j = 0
    while (
        j + 1 < steps
        and distance**steps * exact ** (j + 1) >= max_distance ** (j + 1) * exact**steps
    ):
        j += 1
    return offset + exact + j


def _position_bias(table, length, *, bidirectional):
    buckets = [
        [bucket(key - query, bidirectional=bidirectional) for key in range(length)]
        for query in range(length)
    ]
    return table[:, buckets]  # [H, T, T]


def _norm(scale, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def _attention(params, x, memory, bias, num_heads):
    def heads(kernel, y):
        return (y @ kernel).reshape(*y.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)

    queries = heads(params["query"]["kernel"], x)
    keys = heads(params["key"]["kernel"], memory)
    values = heads(params["value"]["kernel"], memory)
    logits = queries @ keys.transpose(0, 1, 3, 2) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = (weights @ values).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return context @ params["out"]["kernel"]


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mlp(params, x):
    if "wi" in params:
        return np.maximum(x @ params["wi"]["kernel"], 0) @ params["wo"]["kernel"]
    gated = _gelu(x @ params["wi_0"]["kernel"]) * (x @ params["wi_1"]["kernel"])
    return gated @ params["wo"]["kernel"]


def _layers(params):
    return [params[f"layers_{i}"] for i in range(sum(k.startswith("layers_") for k in params))]


def encode(params, config, inputs, inputs_mask):
    """Encoder output [B, S, D]."""
    encoder = params["encoder"]
    x = params["token_embedder"]["embedding"][inputs]
    seen = inputs_mask[:, None, :, None] & inputs_mask[:, None, None, :]
    bias = _position_bias(
        encoder["relpos_bias"]["rel_embedding"], inputs.shape[1], bidirectional=True
    )
    bias = bias + np.where(seen, 0, -1e10)
    for layer in _layers(encoder):
        y = _norm(layer["pre_attention_layer_norm"]["scale"], x)
        x = x + _attention(layer["attention"], y, y, bias, config.num_heads)
        x = x + _mlp(layer["mlp"], _norm(layer["pre_mlp_layer_norm"]["scale"], x))
    return _norm(encoder["encoder_norm"]["scale"], x)


def logits(params, config, inputs, inputs_mask, targets):
    """Logits [B, T, V]."""
    decoder, length = params["decoder"], targets.shape[1]
    encoded = encode(params, config, inputs, inputs_mask)
    start = np.full_like(targets[:, :1], config.decoder_start_id)
    embedding = params["token_embedder"]["embedding"]
    x = embedding[np.concatenate([start, targets[:, :-1]], axis=1)]
    causal = np.where(np.tril(np.ones((length, length))) > 0, 0, -1e10)
    table = decoder["relpos_bias"]["rel_embedding"]
    self_bias = _position_bias(table, length, bidirectional=False) + causal
    cross_bias = np.where(inputs_mask, 0, -1e10)[:, None, None, :]
    for layer in _layers(decoder):
        y = _norm(layer["pre_self_attention_layer_norm"]["scale"], x)
        x = x + _attention(layer["self_attention"], y, y, self_bias, config.num_heads)
        y = _norm(layer["pre_cross_attention_layer_norm"]["scale"], x)
        cross = layer["encoder_decoder_attention"]
        x = x + _attention(cross, y, encoded, cross_bias, config.num_heads)
        x = x + _mlp(layer["mlp"], _norm(layer["pre_mlp_layer_norm"]["scale"], x))
    x = _norm(decoder["decoder_norm"]["scale"], x)
    if config.logits_via_embedding:
        return x @ embedding.T / math.sqrt(config.emb_dim)
    return x @ decoder["logits_dense"]["kernel"]
