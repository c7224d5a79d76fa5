"""GPT-2: described with Flax NNX inside, pure functions over plain dicts outside.

Parameters are one nested dict; every leaf under `blocks` has a leading layer axis:

    wte/embedding (V, D)   wpe/embedding (T, D)   ln_f/{scale,bias} (D,)
    blocks/ln_1/{scale,bias} (L, D)               blocks/ln_2 likewise
    blocks/attn/qkv/kernel (L, D, 3, D)           blocks/attn/out/kernel (L, D, D)
    blocks/mlp/up/kernel (L, D, F)                blocks/mlp/down/kernel (L, F, D)
    lm_head (V, D), only when the head is not tied

Axes: B batch, T query position, S cached position, D width, N heads, H head width,
F feed-forward width, V vocabulary (padded), L layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from gpt2_jax import flash, int8, layers
from gpt2_jax.attention import (
    attend_by_head,
    attention_weights,
    by_head,
    causal_attention,
    choose_attention,
    drop,
)
from gpt2_jax.config import ModelConfig, check
from gpt2_jax.hardware import resolve_dtype
from gpt2_jax.layers import gelu_tanh, layer_norm, linear
from gpt2_jax.loss import mask_padding
from gpt2_jax.sharding import pin_residual

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of one layer, (B N, S, H) each: heads as rows, one after another.

    As (B, S, N, H), XLA:CPU copies all of it for every token: 124M with 640 slots took
    52 ms a token, this way 36; 8 rows with 192 slots 150 ms, this way 110.
    """

    keys: Float[Array, "BN S H"]
    values: Float[Array, "BN S H"]

    def write(
        self,
        keys: Float[Array, "B T N H"],
        values: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
    ) -> "Cache":
        """Return the cache with each key and value in the slot of its position."""
        slots = jnp.repeat(positions, keys.shape[2], axis=0)
        rows = jnp.arange(len(slots))[:, None]
        pairs = zip(self, (by_head(keys), by_head(values)), strict=True)
        written = (
            old.at[rows, slots].set(new.astype(old.dtype), mode="drop")
            for old, new in pairs
        )
        return Cache(*written)

    def take(self, source: Int[Array, " R"], heads: int) -> "Cache":
        """Return the cache whose row i is a copy of row `source[i]`."""
        rows = source[:, None] * heads + jnp.arange(heads)[None]
        return Cache(*(held[rows.reshape(-1)] for held in self))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Linear(nnx.Module):
    """x kernel + bias, from D to one or more axes."""

    def __init__(self, shape: tuple[int, ...], std: float, rngs: nnx.Rngs):
        normal = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(normal)
        self.bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T ..."]:
        """Return the projection, in the dtype of `x`."""
        kernel, bias = self.kernel.get_value(), self.bias[...]
        if isinstance(kernel, int8.Matrix):
            out = kernel.multiply(x)
            return (out + jnp.broadcast_to(bias, out.shape)).astype(x.dtype)
        return linear(x, kernel, bias)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.n_embd, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.n_embd, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return the normalized stream, in the dtype of `x`."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class Attention(nnx.Module):
    """Causal self-attention with a fused query, key and value projection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.n_embd
        self.qkv = Linear((width, 3, width), config.initializer_range, rngs)
        self.out = Linear((width, width), _residual_std(config), rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        key: Key[Array, ""] | None,
        cache: Cache | None,
        positions: Int[Array, "B T"] | None,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the mixed stream and the cache with this call's keys and values."""
        config = self.config
        qkv = self._heads(x)
        key, out_key = _split(key)
        how: dict[str, Any] = dict(
            scale=self._scale(layer), upcast=config.reorder_and_upcast_attn
        )
        if cache is None or positions is None:
            how |= dict(dropout=config.attn_pdrop, key=key)
            mixed = causal_attention(qkv, kernel=config.attention, mesh=mesh, **how)
        else:
            q, k, v = jnp.unstack(qkv, axis=2)
            cache = cache.write(k, v, positions)
            slots = jnp.arange(cache.keys.shape[1])
            seen = slots[None, None] <= positions[..., None]
            mixed = attend_by_head(q, *cache, seen, **how)
        out = self.out(mixed.reshape(x.shape))
        return drop(out, config.resid_pdrop, out_key), cache

    def weights(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""]
    ) -> Float[Array, "B N T T"]:
        """Return how much every position attends to every other one, in float32."""
        q, k, _ = jnp.unstack(self._heads(x), axis=2)
        length = x.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        upcast = self.config.reorder_and_upcast_attn
        return attention_weights(q, k, seen, scale=self._scale(layer), upcast=upcast)

    def _heads(self, x):
        heads = (*x.shape[:2], 3, self.config.n_head, self.config.head_width)
        return self.qkv(x).reshape(heads)

    def _scale(self, layer):
        config = self.config
        scale = 1 / math.sqrt(config.head_width) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            return scale / (layer + 1).astype(jnp.float32)
        return scale


class MLP(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.n_embd, config.inner_width
        self.up = Linear((width, inner), config.initializer_range, rngs)
        self.down = Linear((inner, width), _residual_std(config), rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        """Return the residual branch's output."""
        x = ACTIVATIONS[self.config.activation_function](self.up(x))
        return drop(self.down(x), self.config.resid_pdrop, key)


class Block(nnx.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        key: Key[Array, ""] | None = None,
        cache: Cache | None = None,
        positions: Int[Array, "B T"] | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return the residual stream after this block, and the cache written to."""
        attn_key, mlp_key = _split(key)
        mixed, cache = self.attn(self.ln_1(x), layer, attn_key, cache, positions, mesh)
        x = x + mixed
        return x + self.mlp(self.ln_2(x), mlp_key), cache


class Transformer(nnx.Module):
    """Embeddings, one stacked block, the last layer norm and perhaps a head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        rows, width = config.n_vocab_padded, config.n_embd
        dtype, padded = jnp.dtype(config.dtype), _padded_init(config)
        how: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.wte = nnx.Embed(rows, width, embedding_init=padded, **how)
        normal = nnx.initializers.normal(config.initializer_range)
        self.wpe = nnx.Embed(config.n_ctx, width, embedding_init=normal, **how)
        blocks = nnx.vmap(lambda layer_rngs: Block(config, layer_rngs))
        self.blocks = blocks(rngs.split(config.n_layer))
        self.ln_f = LayerNorm(config)
        if not config.tie_word_embeddings:
            head = padded(rngs.params(), (rows, width), jnp.float32)
            self.lm_head = nnx.Param(head)

    def __call__(
        self, tokens: Int[Array, "B T"], key: Key[Array, ""] | None, mesh: Mesh | None
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after `ln_f`."""
        config = self.config
        keys = jax.random.split(key, config.n_layer + 1) if key is not None else None
        x = self._embed(tokens)
        x = drop(x, config.embd_pdrop, None if keys is None else keys[0])
        x = x if mesh is None else pin_residual(x, mesh)

        def body(x, layer):
            block, index, layer_key = layer
            return block(x, index, layer_key, mesh=mesh)[0], None

        layers = jnp.arange(config.n_layer)
        stack = (self.blocks, layers, None if keys is None else keys[1:])
        x, _ = jax.lax.scan(_remat(config, body), x, stack, unroll=config.unroll)
        return self.ln_f(x)

    def by_layer(self, tokens: Int[Array, "B T"]) -> Float[Array, "K B T D"]:
        """Return what enters each of the L blocks, and last what `ln_f` gives."""

        def body(x, layer):
            block, index = layer
            return block(x, index)[0], x

        stack = self.blocks, jnp.arange(self.config.n_layer)
        x, entered = jax.lax.scan(body, self._embed(tokens), stack)
        return jnp.concatenate([entered, self.ln_f(x)[None]])

    def after(
        self, tokens: Int[Array, "B T"], layers: Int[Array, ""]
    ) -> Float[Array, "B T D"]:
        """Return what the first `layers` blocks give."""

        def body(i, x):
            block = jax.tree.map(lambda leaf: leaf[i], self.blocks)
            return block(x, i)[0]

        return jax.lax.fori_loop(0, layers, body, self._embed(tokens))

    def weights(self, entered: Float[Array, "L B T D"]) -> Float[Array, "L B N T T"]:
        """Return the attention weights of each block from what enters it."""

        def body(_, layer):
            block, index, x = layer
            return None, block.attn.weights(block.ln_1(x), index)

        stack = self.blocks, jnp.arange(self.config.n_layer), entered
        return jax.lax.scan(body, None, stack)[1]

    def _embed(self, tokens):
        return self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))[None]


def _residual_std(config):
    return config.initializer_range / math.sqrt(2 * config.n_layer)  # paper, 2.3


def _padded_init(config):
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        real = (config.n_vocab, *shape[1:])
        rows = config.initializer_range * jax.random.normal(key, real, dtype)
        return jnp.pad(rows, ((0, shape[0] - config.n_vocab), (0, 0)))

    return init


def _split(key):
    return (None, None) if key is None else tuple(jax.random.split(key))


def _remat(config, body):
    if config.remat == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        "dots": policies.save_only_these_names(flash.SAVED, layers.SAVED),
        "block": policies.nothing_saveable,
    }[config.remat]
    return jax.checkpoint(body, policy=saved, prevent_cse=config.unroll > 1)


def resolve(config: ModelConfig, device: Any = None) -> ModelConfig:
    """Return the config with `auto` replaced by what `device` runs best.

    The device is this process's first one unless it is given.
    """
    device = jax.local_devices()[0] if device is None else device
    dtype = resolve_dtype(config.dtype, device.platform)
    length, width = config.n_ctx, config.head_width
    shape = dict(length=length, heads=config.n_head, head_width=width)
    attention = choose_attention(config.attention, device, dtype, **shape)
    return dataclasses.replace(config, dtype=dtype, attention=attention)


@functools.lru_cache(maxsize=64)
def _describe(kind, config):
    return nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))


def _bind(kind, config, params):
    graphdef, abstract = _describe(kind, config)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def init(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Return new float32 parameters.

    Kernels and embeddings are N(0, `initializer_range`), residual projections
    divided by sqrt(2 L); biases are 0, scales 1, padded rows 0.
    """
    model = Transformer(resolve(config), nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    key: Key[Array, ""] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Return the last hidden states, after `ln_f`, in the compute dtype.

    Without `key` nothing is dropped. With a `mesh` the residual stream is kept parted
    by batch over it.

    Raises
    ------
    ConfigError
        If T exceeds `config.n_ctx`.
    """
    _check_length(config, tokens)
    return _bind(Transformer, resolve(config), params)(tokens, key, mesh)


def hidden_states_by_layer(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "K B T D"]:
    """Return K = L + 1 hidden states: the embedding's, each block's, the last normed.

    Index 0 is the sum of the embeddings, i what block i gives, L what `ln_f` makes of
    the last block, as transformers' `output_hidden_states`.
    """
    _check_length(config, tokens)
    return _bind(Transformer, resolve(config), params).by_layer(tokens)


def hidden_states_after(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    layers: Int[Array, ""],
) -> Float[Array, "B T D"]:
    """Return what the first `layers` blocks give, no layer norm after them."""
    _check_length(config, tokens)
    return _bind(Transformer, resolve(config), params).after(tokens, layers)


def attention_maps(
    config: ModelConfig, params: Params, by_layer: Float[Array, "K B T D"]
) -> Float[Array, "L B N T T"]:
    """Return every head's attention weights, float32, from `hidden_states_by_layer`.

    The last two axes are the query's position and the key's; rows sum to 1.
    """
    return _bind(Transformer, resolve(config), params).weights(by_layer[:-1])


def _check_length(config, tokens):
    length = tokens.shape[1]
    check(length <= config.n_ctx, "sequence length", length, f"<= {config.n_ctx}")


def output_matrix(params: Params) -> Float[Array, "V D"]:
    """Return the matrix that turns hidden states into logits."""
    return _head(params)


def n_logits(params: Params) -> int:
    """Return how many logits `project` gives, padding among them."""
    return _head(params).shape[0]


def _head(params: Params) -> Any:
    return params.get("lm_head", params["wte"]["embedding"])


def project(
    config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Return float32 logits of the padded vocabulary, padding at the lowest value."""
    head = _head(params)
    if isinstance(head, int8.Matrix):
        return mask_padding(head.multiply(hidden), config.n_vocab)
    head = head.astype(hidden.dtype)
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    return mask_padding(logits, config.n_vocab)


def apply(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T V"]:
    """Return float32 next-token logits, V = `config.n_vocab`, without padding."""
    hidden = hidden_states(config, params, tokens, key=key)
    return project(config, params, hidden)[..., : config.n_vocab]


def unstack(config: ModelConfig, params: Params) -> Params:
    """Return parameters whose `blocks` is a tuple of L dicts, for `decode`.

    A slice of a stack is a copy on every token: 124M on CPU decodes 23 tokens/s
    stacked, 60 unstacked. On one CPU device, where no cast is needed, the layers share
    the memory of the stack.
    """
    dtype = jnp.dtype(resolve(config).dtype)

    def compute(path: Any, leaf: Array) -> Array:  # layer norms stay in float32
        matrix = path[-1].key in ("kernel", "embedding", "lm_head")
        return leaf.astype(dtype) if matrix else leaf

    cast = jax.tree.map_with_path(compute, params)
    leaves, structure = jax.tree.flatten(cast["blocks"])
    by_layer = zip(*map(_layers, leaves), strict=True)
    blocks = tuple(jax.tree.unflatten(structure, layer) for layer in by_layer)
    return {**cast, "blocks": blocks}


def _layers(leaf):
    device = next(iter(leaf.devices()))
    if len(leaf.devices()) > 1 or device.platform != "cpu":
        return jnp.unstack(leaf)
    # An aligned row of memory is taken over as it is, any other one copied.
    where = device if leaf.committed else None
    return [jax.device_put(row, where) for row in np.asarray(leaf)]


def init_cache(config: ModelConfig, batch: int, length: int) -> tuple[Cache, ...]:
    """Return an empty cache of `length` slots for every layer."""
    shape = (batch * config.n_head, length, config.head_width)
    zeros = jnp.zeros(shape, jnp.dtype(resolve(config).dtype))
    return tuple(Cache(zeros, zeros) for _ in range(config.n_layer))


def decode(
    config: ModelConfig,
    unstacked: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: tuple[Cache, ...],
) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
    """Return hidden states after `ln_f` and the cache with `tokens` written to it.

    Each token goes to the slot of its position and sees the slots up to it, so rows
    of different lengths share a batch: slots beyond a row's length are overwritten
    before they are seen. A position beyond the cache is not written.
    """
    config = resolve(config)
    dtype = jnp.dtype(config.dtype)
    wte, wpe = (unstacked[name]["embedding"] for name in ("wte", "wpe"))
    embedded = wte.take(tokens) if isinstance(wte, int8.Matrix) else wte[tokens]
    x = (embedded + wpe[positions]).astype(dtype)
    written = []
    for i, (layer, slots) in enumerate(zip(unstacked["blocks"], cache, strict=True)):
        x, slots = _decode_block(config, layer, x, jnp.asarray(i), slots, positions)
        written.append(slots)
    last = unstacked["ln_f"]
    how = last["scale"], last["bias"], config.layer_norm_epsilon
    out: Array = layer_norm(x, *how)
    return out, tuple(written)


@functools.partial(jax.jit, static_argnames="config")  # traced once, not L times
def _decode_block(
    config: ModelConfig,
    layer: Params,
    x: Float[Array, "B T D"],
    index: Int[Array, ""],
    slots: Cache,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Cache | None]:
    block = _bind(Block, config, layer)
    return block(x, index, cache=slots, positions=positions)
