"""Attention against a plain softmax in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax import attention
from gpt2_jax.attention import (
    QUERY_BLOCK,
    attention_weights,
    causal_attention,
    choose_attention,
    drop,
)
from gpt2_jax.config import ConfigError, MeshConfig
from gpt2_jax.flash import LONGEST, SAVED
from gpt2_jax.hlo import KINDS
from gpt2_jax.sharding import BATCH, make_mesh

# float32 rounding of sums over a few hundred terms of size 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def random_qkv(length, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 3)
    return [jax.random.normal(key, (2, length, 2, 4), dtype) for key in keys]


def causal(q, k, v, **how):
    return causal_attention(jnp.stack([q, k, v], axis=2), **how)


def plain_weights(q, k, scale):
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def plain_attention(q, k, v, scale):
    weights = plain_weights(q, k, scale)
    return np.einsum("bnts,bsnh->btnh", weights, np.asarray(v, np.float64))


@pytest.mark.parametrize(
    "length, upcast",
    [
        (1, False),
        (5, True),
        (QUERY_BLOCK, False),
        (QUERY_BLOCK + 1, True),
        (2 * QUERY_BLOCK + 9, False),
    ],
)
def test_causal_attention_is_the_plain_softmax(length, upcast):
    q, k, v = random_qkv(length)
    run = functools.partial(causal, scale=0.7, upcast=upcast)
    ours = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(ours, plain_attention(q, k, v, 0.7), **CLOSE)


@pytest.mark.parametrize("upcast", [False, True])
def test_weights_are_the_plain_softmax(upcast):
    q, k, _ = random_qkv(9)
    seen = jnp.tril(jnp.ones((9, 9), bool))[None, None]
    ours = attention_weights(q, k, seen, scale=0.7, upcast=upcast)
    np.testing.assert_allclose(ours, plain_weights(q, k, 0.7), **CLOSE)
    np.testing.assert_array_equal(ours, jnp.tril(ours))
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)


def test_weights_of_half_precision_are_float32_and_finer_with_upcast():
    q, k, _ = random_qkv(64, jnp.bfloat16)
    seen = jnp.tril(jnp.ones((64, 64), bool))[None, None]
    exact = plain_weights(q, k, 1.0)

    def error(upcast):
        ours = attention_weights(q, k, seen, scale=1.0, upcast=upcast)
        assert ours.dtype == jnp.float32
        return np.abs(ours - exact).max()

    assert error(upcast=True) < 1e-5 < 1e-3 < error(upcast=False)


def test_weights_of_each_row_follow_what_it_has_seen():
    q, k, _ = random_qkv(4)
    seen = jnp.ones((2, 1, 4, 4), bool).at[1, :, :, 2:].set(False)
    ours = attention_weights(q, k, seen, scale=0.5)
    assert ours[0].all()
    assert not ours[1, :, :, 2:].any()
    np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-6)


def test_scale_may_be_traced():
    q, k, v = random_qkv(5)
    ours = causal(q, k, v, scale=jnp.float32(0.3), kernel="cudnn")
    np.testing.assert_allclose(ours, plain_attention(q, k, v, 0.3), **CLOSE)


def square(q, k, v, scale):
    """Attention in one square, differentiated by JAX."""
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
    weights = attention_weights(q, k, seen, scale=scale)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("heads_apart", [False, True], ids=["one axis", "two axes"])
def test_blocks_have_the_gradients_of_one_square(heads_apart):
    q, k, v = random_qkv(QUERY_BLOCK + 3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if heads_apart else None
    weights = jax.random.normal(jax.random.key(0), v.shape)

    def total(kind, q, k, v, scale):
        return jnp.sum(weights * kind(q, k, v, scale=scale))

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(total, kind), (0, 1, 2, 3)))(q, k, v, 0.5)
        for kind in (functools.partial(causal, mesh=mesh), square)
    )
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-3)  # a sum that cancels


@pytest.mark.parametrize("upcast", [False, True])
def test_gradients_in_half_precision_stay_near_those_of_float32(upcast):
    exact = random_qkv(QUERY_BLOCK + 3)
    weights = jax.random.normal(jax.random.key(0), exact[0].shape)

    def total(kind, *qkv):
        return jnp.sum(weights * kind(*qkv, scale=0.5).astype(jnp.float32))

    half = [x.astype(jnp.bfloat16) for x in exact]
    kind = functools.partial(causal, upcast=upcast)
    ours = jax.jit(jax.grad(functools.partial(total, kind), (0, 1, 2)))(*half)
    theirs = jax.jit(jax.grad(functools.partial(total, square), (0, 1, 2)))(*exact)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.abs(np.asarray(one, np.float32) - other)
        # bfloat16 rounds to 1 in 256, a few times on the way.
        assert error.mean() < 0.01 * np.abs(other).mean()


@pytest.mark.parametrize("length", [9, QUERY_BLOCK + 3])
def test_gradients_under_dropout_are_of_what_was_kept(length):
    q, k, v = random_qkv(length)
    weights = jax.random.normal(jax.random.key(0), v.shape)
    key = jax.random.key(1)

    @jax.jit
    def total(q, k, v):
        out = causal(q, k, v, scale=0.5, dropout=0.5, key=key)
        return jnp.sum(weights * out)

    value, found = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    # It is linear in the values, and along any line a difference tells the rest.
    np.testing.assert_allclose(jnp.sum(v * found[2]), value, rtol=1e-4)
    step = 1e-2
    ways = [jax.random.normal(jax.random.key(2 + i), q.shape) for i in (0, 1)]
    q_way, k_way = (way / jnp.linalg.norm(way) for way in ways)
    slope = jnp.sum(found[0] * q_way) + jnp.sum(found[1] * k_way)
    ends = [total(q + s * q_way, k + s * k_way, v) for s in (step, -step)]
    # The step leaves an error of its square, rounding one of 1e-7 totals over 2 steps.
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, atol=5e-3)


def test_what_the_backward_pass_needs_is_named():
    """Policies that save by name keep one output, and two norms a block."""

    def total(qkv):
        return jnp.sum(causal_attention(qkv, scale=0.5))

    shape = jax.ShapeDtypeStruct((1, QUERY_BLOCK + 1, 3, 2, 4), jnp.float32)
    named = str(jax.make_jaxpr(jax.grad(total))(shape))
    assert named.count(f"name[name={SAVED}]") == 1 + 2 * 2


def test_no_query_depends_on_a_later_key():
    q, k, v = random_qkv(QUERY_BLOCK + 20)
    row = QUERY_BLOCK + 5

    def one_row(k, v):
        return jnp.sum(causal(q, k, v, scale=0.5)[:, row])

    for gradient in jax.jit(jax.grad(one_row, (0, 1)))(k, v):
        assert not gradient[:, row + 1 :].any()
        assert jnp.abs(gradient[:, : row + 1]).max(axis=(0, 2, 3)).all()


def test_row_that_sees_nothing_is_finite():
    q, k, _ = random_qkv(4)
    seen = jnp.ones((1, 1, 4, 4), bool).at[:, :, 2].set(False)
    assert jnp.isfinite(attention_weights(q, k, seen, scale=0.5)).all()


def test_upcast_forms_scores_in_float32():
    q, k, v = random_qkv(64, jnp.bfloat16)
    exact = plain_attention(q, k, v, 1.0)

    def error(upcast):
        ours = causal(q, k, v, scale=1.0, upcast=upcast)
        assert ours.dtype == jnp.bfloat16
        return np.abs(np.asarray(ours, np.float64) - exact).mean()

    assert error(upcast=True) < error(upcast=False)


@pytest.mark.parametrize("length", [8, QUERY_BLOCK + 8])
def test_dropout_is_decided_by_the_key(length):
    q, k, v = random_qkv(length)
    run = jax.jit(functools.partial(causal, q, k, v, scale=0.5, dropout=0.5))
    one, other = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(key=one), run(key=one))
    assert (run(key=one) != run(key=other)).any()
    np.testing.assert_allclose(run(), plain_attention(q, k, v, 0.5), **CLOSE)


def test_no_two_rows_drop_the_same_keys():
    """Tell rows apart by dropout alone: keys are alike, values stop at key 100."""
    length = 2 * QUERY_BLOCK
    q = jnp.zeros((1, length, 1, 4))
    v = jax.random.normal(jax.random.key(0), q.shape).at[:, 100:].set(0)
    run = jax.jit(functools.partial(causal, scale=1.0, dropout=0.5))
    out = np.asarray(run(q, q, v, key=jax.random.key(1)))[0, :, 0]
    sums = (out * np.arange(1, length + 1)[:, None])[100:]  # of the values kept
    gaps = np.abs(sums[:, None] - sums[None]).max(axis=-1)
    assert gaps[~np.eye(len(sums), dtype=bool)].min() > 1e-2


def test_drop_zeroes_its_share_and_keeps_the_mean():
    rate, size = 0.1, 100_000
    dropped = drop(jnp.ones(size), rate, jax.random.key(0))
    five_sigma = 5 * (rate * (1 - rate) / size) ** 0.5
    assert abs(float(jnp.mean(dropped == 0)) - rate) < five_sigma
    assert abs(float(jnp.mean(dropped)) - 1) < five_sigma / (1 - rate)
    kept = dropped[dropped != 0]
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)


def test_drop_without_key_or_rate_is_the_identity():
    x = jnp.arange(3.0)
    assert drop(x, 0.5, None) is x
    assert drop(x, 0.0, jax.random.key(0)) is x


class Device(NamedTuple):
    platform: str
    device_kind: str = ""


CPU, GPU = Device("cpu"), Device("gpu", "NVIDIA H100 80GB HBM3")
V2, V3, V4 = (Device("tpu", f"TPU v{n}") for n in (2, 3, 4))
V5E = Device("tpu", "TPU v5 lite")


def choose(name, device, dtype="bfloat16", width=64):
    return choose_attention(name, device, dtype, length=8, heads=2, head_width=width)


@pytest.fixture
def compilers_that_work(monkeypatch):
    monkeypatch.setattr(attention, "_compiles", lambda *shape: True)


@pytest.mark.usefixtures("compilers_that_work")
@pytest.mark.parametrize(
    "name, device, dtype, width, kernel",
    [
        ("auto", CPU, "float32", 64, "xla"),
        ("auto", CPU, "bfloat16", 64, "xla"),
        ("auto", V2, "bfloat16", 64, "xla"),
        ("auto", V3, "bfloat16", 64, "xla"),
        ("auto", V4, "bfloat16", 64, "flash"),
        ("auto", V5E, "float32", 64, "flash"),
        ("auto", GPU, "bfloat16", 64, "cudnn"),
        ("auto", GPU, "bfloat16", 12, "xla"),
        ("auto", GPU, "bfloat16", 256, "xla"),
        ("auto", GPU, "float32", 64, "xla"),
        ("xla", GPU, "bfloat16", 64, "xla"),
        ("xla", V4, "bfloat16", 64, "xla"),
        ("cudnn", GPU, "bfloat16", 64, "cudnn"),
        ("flash", V3, "bfloat16", 64, "flash"),
        ("flash", CPU, "float32", 64, "flash"),
    ],
)
def test_auto_kernel_follows_the_device(name, device, dtype, width, kernel):
    assert choose(name, device, dtype, width) == kernel


@pytest.mark.parametrize(
    "name, device, dtype, width",
    [
        ("cudnn", CPU, "bfloat16", 64),
        ("cudnn", V4, "bfloat16", 64),
        ("cudnn", GPU, "float32", 64),
        ("cudnn", GPU, "bfloat16", 12),
        ("flash", GPU, "bfloat16", 64),
    ],
)
def test_a_kernel_is_refused_where_it_cannot_run(name, device, dtype, width):
    wanted = f"model.attention is '{name}'; .*auto.*xla"
    with pytest.raises(ConfigError, match=wanted):
        choose(name, device, dtype, width)


def test_a_kernel_that_does_not_compile_gives_way_with_one_warning(monkeypatch):
    def fail(lowered):
        raise RuntimeError("Mosaic failed\nand says more")

    attention._compiles.cache_clear()
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    # A host device passes for a TPU: what is lowered there is never compiled.
    host = jax.devices()[0]
    monkeypatch.setattr(attention, "_float32_only", lambda device: False)
    shape = "flash", host, "float32", 8, 2, 4
    line = "attention 'flash' does not compile for cpu, .*RuntimeError: Mosaic failed$"
    with pytest.warns(UserWarning, match=line) as told:
        assert not attention._compiles(*shape)
        assert not attention._compiles(*shape)
    assert len(told) == 1


def test_a_kernel_that_fails_is_replaced(monkeypatch):
    monkeypatch.setattr(attention, "_compiles", lambda *shape: False)
    assert choose("flash", V3) == choose("auto", V4) == choose("auto", GPU) == "xla"


def test_a_kernel_that_compiles_is_kept():
    attention._compiles.cache_clear()
    assert attention._compiles("flash", jax.devices()[0], "float32", 8, 2, 4)


@pytest.mark.parametrize("length", [5, 128, QUERY_BLOCK + 9])
def test_the_door_leads_to_flash(length):
    q, k, v = random_qkv(length)
    flash = functools.partial(causal, scale=0.7, kernel="flash")
    assert "flash_forward" in str(jax.make_jaxpr(flash)(q, k, v))
    ours = jax.jit(flash)
    xla = jax.jit(functools.partial(causal, scale=0.7))
    np.testing.assert_allclose(ours(q, k, v), xla(q, k, v), **CLOSE)


@pytest.mark.parametrize(
    "how",
    [
        dict(scale=jnp.float32(0.7)),
        dict(scale=0.7, upcast=True),
        dict(scale=0.7, dropout=0.5, key=jax.random.key(0)),
    ],
)
def test_what_flash_does_not_do_is_done_by_xla(how):
    q, k, v = random_qkv(9)
    given = functools.partial(causal, **how)
    assert "flash" not in str(
        jax.make_jaxpr(functools.partial(given, kernel="flash"))(q, k, v)
    )
    np.testing.assert_array_equal(given(q, k, v, kernel="flash"), given(q, k, v))


def test_rows_too_long_for_flash_are_left_to_xla():
    shape = [jax.ShapeDtypeStruct((1, LONGEST + 1, 1, 4), jnp.float32)] * 3
    jaxpr = jax.make_jaxpr(functools.partial(causal, scale=0.7, kernel="flash"))(*shape)
    assert "flash" not in str(jaxpr)


@pytest.mark.parametrize("heads", [4, 3])
def test_flash_is_computed_where_the_batch_and_the_heads_are(heads):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    qkv = jax.random.normal(jax.random.key(heads), (8, 9, 3, heads, 4))
    run = functools.partial(causal_attention, scale=0.7, kernel="flash", mesh=mesh)
    spread = NamedSharding(mesh, P(BATCH, None, None, None if heads % 2 else "tensor"))
    ours = jax.jit(run).lower(jax.device_put(qkv, spread)).compile()
    text = ours.as_text()
    assert not any(f" {kind}(" in text for kind in KINDS)
    np.testing.assert_allclose(
        ours(jax.device_put(qkv, spread)), causal_attention(qkv, scale=0.7), **CLOSE
    )
