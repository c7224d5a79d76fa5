"""The plan without libtpu: host devices stand in for the cores of a slice."""

import dataclasses
import importlib.util
import json
import types
from typing import Any

import jax
import pytest

from gpt2_jax import hlo, model, plan, step
from gpt2_jax.config import Config, ConfigError, MeshConfig, ModelConfig, TrainConfig
from gpt2_jax.hardware import mfu

JSON_KEYS = {
    "topology",
    "devices",
    "mesh",
    "fits",
    "bytes_per_core",
    "hbm_bytes_per_core",
    "step_seconds_estimate",
    "tokens_per_second_estimate",
    "mfu_estimate",
    "flops_per_step",
    "collectives",
}
CYCLES = 1_000_000
FULL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (59.02G) exceeds available HBM (15.48G)."
)

MODEL = ModelConfig(
    n_vocab=61, n_ctx=16, n_embd=32, n_layer=3, n_head=4, vocab_multiple=8
)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(batch_tokens=32 * 16, micro_batch=2, steps=10),
    mesh=MeshConfig(fsdp=2),
)


@pytest.fixture
def on_hosts(monkeypatch):
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def parted() -> plan.Plan:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        return plan.plan(CONFIG, "v3-8")


@pytest.fixture(scope="module")
def whole() -> plan.Plan:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        return plan.plan(dataclasses.replace(CONFIG, mesh=MeshConfig()), "v3-8")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for the 8 host devices, whose program states no cycles."""

    def cost(text: str, kernels: dict[str, int]) -> hlo.Cost:
        return hlo.Cost(CYCLES, found(text, kernels).collectives)

    def settle(config: Config, devices: Any) -> Any:
        v3 = types.SimpleNamespace(platform="tpu", device_kind="TPU v3")
        shape = model.resolve(config.model, v3)
        return step.settle(dataclasses.replace(config, model=shape), devices)

    found = hlo.program_cost
    monkeypatch.setattr(plan, "settle", settle)
    monkeypatch.setattr(plan, "_open_slice", lambda where: jax.devices())
    monkeypatch.setattr(hlo, "program_cost", cost)


def test_json_has_what_was_promised(parted):
    values = json.loads(json.dumps(parted.to_json()))
    assert set(values) >= JSON_KEYS
    assert values["topology"] == "v3-8" and values["devices"] == 8
    assert values["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert values["fits"] is True
    assert values["bytes_per_core"] == sum(values["bytes_per_core_by_use"].values())
    assert values["hbm_bytes_per_core"] == 16 * 2**30
    assert values["accumulation"] == 2 and values["micro_batch_per_core"] == 2


def test_the_estimates_follow_from_the_cycles(parted):
    values = parted.to_json()
    token_flops = MODEL.flops_per_token
    seconds = CYCLES / parted.topology.clock_hz
    rate = 32 * 16 / seconds
    assert values["step_seconds_estimate"] == pytest.approx(seconds)
    assert values["tokens_per_second_estimate"] == pytest.approx(rate)
    assert values["flops_per_step"] == token_flops * 32 * 16
    assert values["mfu_estimate"] == pytest.approx(mfu(rate, token_flops, "TPU v3", 8))
    assert values["days_estimate"] == pytest.approx(10 * seconds / 86_400)
    hours = values["core_hours_estimate"]
    assert hours == pytest.approx(10 * seconds / 3600 * 8)


def test_memory_is_split_as_the_shardings_say(parted, whole):
    vocab = MODEL.n_vocab_padded - MODEL.n_vocab
    count = MODEL.n_params + vocab * MODEL.n_embd
    assert whole.memory.parameters == 4 * count
    # Two moments of every parameter, and counters.
    assert 8 * count <= whole.memory.optimizer < 8 * count + 100
    ratio = parted.memory.parameters / whole.memory.parameters
    assert 0.5 < ratio < 0.6  # norms and biases stay whole
    assert whole.memory.batch < 10_000 and whole.memory.temporaries > 0


def test_fsdp_gathers_and_copies_do_not(parted, whole):
    assert "all-gather" in parted.estimate.collectives
    assert set(whole.estimate.collectives) == {"all-reduce"}
    assert whole.estimate.collective_seconds > 0


def test_the_lines_name_an_estimate(parted):
    text = "\n".join(parted.lines())
    for word in ("v3-8", "fsdp 2", "2 x 2 sequences", "estimate", "core-hours", "MFU"):
        assert word in text


def test_dtype_and_mesh_are_those_of_the_slice(whole):
    assert whole.config.model.dtype == "bfloat16"
    assert whole.config.model.attention == "xla"
    assert whole.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert "mesh chosen" in whole.notes[0]


def test_what_does_not_fit_says_what_to_change(on_hosts, monkeypatch):
    def compile(lowered):
        raise jax.errors.JaxRuntimeError(FULL)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    found = plan.plan(CONFIG, "v3-8")
    assert not found.fits and found.to_json()["bytes_per_core"] is None
    assert found.to_json()["collectives"] == {}
    for word in ("(59.02G)", "(15.48G)", "--train.micro-batch", "--model.remat"):
        assert word in found.remedy
    assert "--mesh.fsdp" in found.remedy and "--topology" in found.remedy
    assert "\n" not in found.remedy
    assert found.lines()


def test_other_errors_of_the_compiler_are_not_hidden(on_hosts, monkeypatch):
    def compile(lowered):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan.plan(CONFIG, "v3-8")


@pytest.mark.parametrize("most, expected", [(0, 1), (1, 1), (2, 2), (3, 2), (99, 4)])
def test_batch_auto_takes_the_largest_that_fits(
    parted, on_hosts, monkeypatch, most, expected
):
    def step(config, where, mesh, notes, say):
        size = config.train.micro_batch
        memory = parted.memory if size <= most else None
        return dataclasses.replace(parted, micro_batch=size, memory=memory)

    told = []
    monkeypatch.setattr(plan, "_plan_step", step)
    found = plan.plan(CONFIG, "v3-8", batch="auto", say=told.append)
    assert found.micro_batch == expected
    assert found.fits is (most > 0)
    assert 2 <= len(told) <= 3  # it halves the sizes that are left


def refused(config: Config, topology: str = "v3-8", **how) -> str:
    with pytest.raises(ConfigError) as error:
        plan.plan(config, topology, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_slice_lists_the_known_ones():
    assert "v3-8, v3-32" in refused(CONFIG, "v3-7")


def test_a_batch_is_auto_or_nothing():
    assert "--train.micro-batch" in refused(CONFIG, batch="4")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "gpt2_jax[tpu]"' in refused(CONFIG)


def test_a_mesh_of_another_size_is_refused(on_hosts):
    asked = dataclasses.replace(CONFIG, mesh=MeshConfig(data=3, fsdp=2))
    assert "not the 8 devices" in refused(asked)


def test_less_than_one_sequence_per_core_is_refused(on_hosts):
    train = dataclasses.replace(CONFIG.train, batch_tokens=4 * 16)
    asked = dataclasses.replace(CONFIG, train=train)
    assert "multiple of data x fsdp = 8" in refused(asked)


def test_bundles_are_counted_once_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_bundles_directory", lambda: tmp_path)
    counts = {"1-jvp_flash_forward_.1": 3712, "2-flash_backward.7": 5302, "3-fusion": 9}
    for name, count in counts.items():
        text = f"Schedule analysis:\n\ttotal scheduled bundles:    {count}\n"
        tmp_path.joinpath(f"{name}-70-schedule-analysis_final_bundles.txt").write_text(
            text
        )
        tmp_path.joinpath(f"{name}-71-final_bundles.txt").write_text("0 : vnop")
    assert plan._take_bundles() == {"flash_forward": 3712, "flash_backward": 5302}
    assert plan._take_bundles() == {} and not list(tmp_path.iterdir())
