"""The timing program: what it times is what runs, and its figures belong together."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from gpt2_jax import bench, cli, decode, model, sharding
from gpt2_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from gpt2_jax.step import make_program

MODEL = ModelConfig(n_vocab=257, n_ctx=32, n_embd=16, n_layer=2, n_head=2)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(tokenizer="bytes"),
    mesh=MeshConfig(data=4, fsdp=2),
    train=TrainConfig(batch_tokens=64 * 32, micro_batch=2),
)
SMALL = [
    "--model.n-vocab=257",
    "--model.n-ctx=32",
    "--model.n-embd=16",
    "--model.n-layer=1",
    "--model.n-head=2",
]


@pytest.fixture
def clock(monkeypatch):
    """Let each look at the clock be a second after the one before."""
    ticks = iter(range(100_000))
    fake = SimpleNamespace(
        perf_counter=lambda: float(next(ticks)), process_time=lambda: 2.0 * next(ticks)
    )
    monkeypatch.setattr(bench, "time", fake)


def test_the_step_is_the_one_that_trains():
    found = bench.bench_train(CONFIG, repeats=2)
    assert found.batch == (16, 32)  # two on each of eight devices
    program = make_program(
        replace(CONFIG, train=replace(CONFIG.train, batch_tokens=16 * 32)),
        sharding.make_mesh(CONFIG.mesh),
    )
    state = program.start()
    batch = bench.random_tokens(257, 16, 33).reshape(1, 16, 33)
    losses = []
    for _ in range(3):
        tokens = sharding.to_global(batch, program.batch_sharding)
        state, metrics = program.train_step(state, tokens)
        losses.append(float(metrics.loss))
    assert list(found.losses) == losses


def test_given_parameters_and_tokens_are_used():
    params = jax.tree.map(np.zeros_like, model.init(MODEL, jax.random.key(0)))
    batch = np.full((8, 33), 7, np.int32)
    how: dict[str, Any] = dict(repeats=1, sequences=8)
    found = bench.bench_train(CONFIG, params=params, batch=batch, **how)
    assert found.losses[0] == pytest.approx(np.log(257))  # nothing is known
    params["wte"]["embedding"][:, 0] = 1  # and so the last layer norm's bias counts
    params["ln_f"]["bias"][0] = -1.0
    params["wte"]["embedding"][7, 0] = -8
    found = bench.bench_train(CONFIG, params=params, batch=batch, **how)
    assert found.losses[0] < 0.1  # only 7 is likely


def test_rates_follow_from_the_seconds(clock):
    found = bench.bench_train(CONFIG, repeats=3, sequences=8)
    assert found.step_seconds == (1.0, 1.0, 1.0) and found.compile_seconds == 1.0
    assert found.tokens_per_second == 8 * 32 and found.mfu is None
    wrote = bench.bench_generate(CONFIG, rows=3, prompt_tokens=4, new_tokens=13)
    assert wrote.seconds == (1.0, 1.0, 1.0)
    assert wrote.tokens_per_second == 3 * 13
    assert wrote.first_token_ms == 1000
    assert wrote.early_token_ms == wrote.late_token_ms == pytest.approx(1000 / 3)


def test_the_step_is_at_least_as_large_as_its_state():
    found = bench.bench_train(CONFIG, repeats=1, sequences=8)
    state = 3 * 4 * MODEL.n_params  # parameters and two moments, float32, over fsdp 2
    assert state / 2 < found.step_bytes < found.peak_bytes


def test_a_text_is_written_as_generate_does(monkeypatch):
    """Greedy, from the same prompt, and nothing more than asked for."""
    rows = []
    original = decode.Decoder.advance

    def advance(self, most=None):
        tokens, log_probs = original(self, most)
        rows.append((most, tokens))
        return tokens, log_probs

    monkeypatch.setattr(decode.Decoder, "advance", advance)
    how = dict(rows=2, prompt_tokens=4, new_tokens=9, repeats=1)
    found = bench.bench_generate(CONFIG, **how)
    whole = [tokens for most, tokens in rows if most is None]
    parts = np.concatenate([tokens for most, tokens in rows if most], axis=1)
    assert [most for most, _ in rows] == [None, None, 1, 2, 4, 2]
    assert whole[0].shape == (2, 9)
    np.testing.assert_array_equal(whole[0], parts)
    np.testing.assert_array_equal(whole[0], [found.tokens] * 2)


def test_weights_of_8_bits_are_timed_on_request():
    how = dict(rows=1, prompt_tokens=4, new_tokens=9, repeats=1)
    found = bench.bench_generate(CONFIG, quantize="int8", **how)
    assert "weights in int8" in found.lines()[0]
    assert found.to_json()["quantize"] == "int8"


def test_reading_tells_the_bytes_of_the_text(tmp_path, clock):
    text = tmp_path / "text.txt"
    text.write_text("ring around the rosie\n" * 500)
    data = replace(CONFIG.data, source=(str(text),))
    found = bench.bench_data(replace(CONFIG, data=data), batches=5, repeats=2)
    assert found.prepare_mb_per_second == pytest.approx(22 * 500 / 1e6, rel=0.01)
    assert found.load_tokens_per_second == pytest.approx(5 * 64 * 32)
    assert found.load_tokens_per_cpu_second == pytest.approx(5 * 64 * 32 / 6)
    assert any("prepare" in line for line in found.lines())


def test_shards_are_not_prepared_again(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("ring around the rosie\n" * 500)
    ready = ["prepare", str(text), "--out", str(tmp_path / "out"), "--tokenizer=bytes"]
    assert cli.run(ready) == 0
    data = replace(CONFIG.data, source=(str(tmp_path / "out"),))
    found = bench.bench_data(replace(CONFIG, data=data), batches=2, repeats=1)
    assert found.prepare_seconds is None and found.load_tokens_per_second > 0
    assert not any("prepare" in line for line in found.lines())


@pytest.mark.parametrize("what", ["train", "generate"])
def test_the_command_prints_one_object(capsys, what):
    more = {"train": ["--sequences=8"], "generate": ["--new-tokens=8"]}[what]
    arguments = ["bench", what, "quickstart", "--repeats=1", "--json", *more, *SMALL]
    assert cli.run([*arguments, *(["--prompt-tokens=4"] * (what == "generate"))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["n_embd"] == 16 and found["tokens_per_second"] > 0
    assert found["jax"] == jax.__version__ and found["peak_bytes"] > 1e7


def test_the_command_prints_lines(capsys):
    assert cli.run(["bench", "train", "--repeats=1", "--sequences=8", *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("training step of 8 x 32 tokens on 8 x cpu: ")
    assert " tokens/s; compiled in " in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "'trian'; did you mean 'train'"),
        (["train", "--sequences=3"], "--sequences is 3; allowed: a multiple of"),
        (["train", "--sequences=0"], "--sequences is 0; allowed: a multiple of"),
        (["train", "--repeats=0"], "--repeats is 0; allowed: at least 1"),
        (["train", "--sequence=3"], "did you mean 'sequences'?"),
        (["generate", "--rows=0"], "--rows is 0; allowed: at least 1"),
        (["generate", "--new-tokens=4"], "--new-tokens is 4; allowed: at least 5"),
        (["generate", "--new-tokens=400"], "is 432; allowed: at most model.n_ctx = 32"),
        (["generate", "--prompt-tokens=0"], "--prompt-tokens is 0"),
        (["data", "--batches=0"], "--batches is 0; allowed: at least 1"),
        (["data", "--data.source=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, line):
    assert cli.run(["bench", *arguments, *SMALL[: 5 * (len(arguments) > 1)]]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_an_unknown_config_is_named():
    with pytest.raises(ConfigError, match="quickstart"):
        cli._parse_beside(cli.BenchTrain, "bench train", ["quickstrat"])
