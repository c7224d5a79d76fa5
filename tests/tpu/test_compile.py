"""Every shipped recipe of a TPU slice, compiled for it. Needs libtpu and no TPU.

`pip install -e ".[test,tpu]"`, then `pytest -n0 tests/tpu`; CI adds `-m "not slow"` and
leaves out three recipes that take minutes each. The plain test command leaves this
folder out.
"""

import dataclasses
import importlib.util
import re

import jax
import pytest

from gpt2_jax import attention
from gpt2_jax.attention import choose_attention
from gpt2_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    config_directory,
    load_config,
)
from gpt2_jax.plan import Estimate, _open_slice, plan
from gpt2_jax.topology import find_topology, known_topologies

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs libtpu: pip install "gpt2_jax[tpu]"',
)
SLICE = re.compile(r"_(v\d+[a-z]*)_(\d+)$")  # gpt2_124m_v3_8 is for v3-8
RECIPES = {
    path.stem: "-".join(found.groups())
    for path in sorted(config_directory().glob("*.py"))
    if (found := SLICE.search(path.stem))
}


SLOW = ("gpt2_124m_v4_8", "gpt2_124m_v5p_8", "gpt2_124m_v6e_8")  # to compile
# The goals of the project, by the compiler's cycles, collectives not counted.
LEAST = {"gpt2_124m_v3_8": 0.65, "gpt2_1558m_v3_256": 0.60}
MODEL = ModelConfig(n_vocab=1024, n_ctx=256, n_embd=256, n_layer=2, n_head=4)


def test_every_generation_but_v2_has_a_recipe():
    families = {find_topology(name).family.libtpu for name in RECIPES.values()}
    assert families == {"v3", "v4", "v5e", "v5p", "v6e"}
    assert RECIPES.keys() > set(SLOW)


@pytest.mark.parametrize("name", known_topologies())
def test_libtpu_knows_every_slice(name):
    where = find_topology(name)
    devices = _open_slice(where)
    assert len(devices) == where.devices
    assert {device.device_kind for device in devices} == {where.family.device_kind}
    assert len({device.process_index for device in devices}) == where.hosts


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RECIPES],
)
def test_a_recipe_fits_its_slice(name, capsys):
    found = plan(load_config(name), RECIPES[name])
    with capsys.disabled():
        print(f"\n{name}", *found.lines(), sep="\n  ")
    assert found.fits, found.remedy
    assert found.memory is not None and found.estimate is not None
    assert found.memory.total <= found.topology.chip.hbm_bytes
    assert found.config.train.batch_tokens == 512 * 1024  # paper, 2.3
    assert found.estimate.mfu > LEAST.get(name, 0.25)
    assert found.config.model.attention == "flash"
    assert 0.02 < found.estimate.kernel_seconds / found.estimate.step_seconds < 0.4
    assert found.config.model.dtype == "bfloat16"


KERNELS = [
    (topology, dtype, length, 64)
    for topology in ("v2-8", "v3-8", "v4-8", "v5e-8", "v5p-8", "v6e-8")
    for dtype in ("bfloat16", "float32")
    for length in (1024, 1000, 64)
] + [
    ("v3-8", "bfloat16", 1024, 80),
    ("v5e-8", "bfloat16", 16, 24),
]


@pytest.mark.parametrize(("topology", "dtype", "length", "width"), KERNELS)
def test_flash_compiles_for_every_generation(topology, dtype, length, width):
    device = _open_slice(find_topology(topology))[0]
    shape = dict(length=length, heads=3, head_width=width)
    assert choose_attention("flash", device, dtype, **shape) == "flash"


def test_a_v3_refuses_bfloat16_operands(monkeypatch):
    """Deletes the reason of `FLOAT32_ONLY`, once it passes without a warning."""
    monkeypatch.setattr(attention, "FLOAT32_ONLY", ())
    device = _open_slice(find_topology("v3-8"))[0]
    with pytest.warns(UserWarning, match="'flash' does not compile for TPU v3"):
        shape = dict(length=1024, heads=5, head_width=64)
        assert choose_attention("flash", device, "bfloat16", **shape) == "xla"


def test_a_kernel_that_does_not_fit_gives_way_with_a_warning():
    device = _open_slice(find_topology("v3-8"))[0]
    shape = dict(length=1024, heads=3, head_width=128)
    with pytest.warns(UserWarning, match="'flash' does not compile.*vmem"):
        assert choose_attention("flash", device, "bfloat16", **shape) == "xla"


def small(sequences: int) -> Estimate:
    """Return what micro-batches of 32 cost a small model on a v3-8."""
    train = TrainConfig(batch_tokens=sequences * 8 * 256, micro_batch=32)
    found = plan(Config(model=MODEL, train=train), "v3-8")
    assert found.estimate is not None
    return found.estimate


def test_accumulation_costs_as_often_as_it_runs():
    # The update comes once, so it is a little less than four times.
    assert 3.5 < small(4 * 32).step_seconds / small(32).step_seconds < 4.1


def test_chunks_of_the_loss_exchange_no_more_than_the_whole():
    def exchanged(chunk: int) -> int:
        train = TrainConfig(batch_tokens=16 * 256, loss_chunk=chunk)
        found = plan(Config(model=MODEL, train=train, mesh=MeshConfig(fsdp=8)), "v3-8")
        assert found.estimate is not None
        return sum(one.bytes for one in found.estimate.collectives.values())

    assert exchanged(32) < 1.05 * exchanged(256)


def test_what_is_too_large_is_told():
    config = load_config("gpt2_124m")
    train = dataclasses.replace(config.train, micro_batch=64)
    found = plan(dataclasses.replace(config, train=train), "v3-8")
    assert not found.fits
    assert "exceeds available HBM (15.48G); lower" in found.remedy
    assert jax.default_backend() == "cpu"
