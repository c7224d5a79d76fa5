"""Time this machine: training steps, writing tokens, reading data.

What is timed is what `train`, `generate` and `prepare` run, on random weights and
tokens. Every figure is the median of repeats in one process, with the fastest and the
slowest beside it; on a shared machine trust the ratio of two runs that alternate.
"""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from gpt2_jax import model, sharding
from gpt2_jax.config import Config, Quantize, check
from gpt2_jax.data.dataset import open_dataset
from gpt2_jax.data.loader import BatchShape, train_batches
from gpt2_jax.data.shards import MANIFEST, read_manifest
from gpt2_jax.decode import Decoder, Row, Sampling
from gpt2_jax.hardware import mfu
from gpt2_jax.pretrained import GPT2
from gpt2_jax.step import make_program, micro_batch, settle
from gpt2_jax.tokenizer import load_tokenizer


class Spread(NamedTuple):
    """Seconds of repeats."""

    median: float
    fastest: float
    slowest: float

    @staticmethod
    def of(seconds: list[float]) -> "Spread":
        """Return the spread of some measurements."""
        return Spread(statistics.median(seconds), min(seconds), max(seconds))

    def __str__(self):
        return f"{self.median:.4g} s ({self.fastest:.4g} to {self.slowest:.4g})"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What every benchmark tells."""

    config: dict[str, Any]  # the shape, and what was chosen for the devices
    devices: str
    jax: str = jax.__version__
    peak_bytes: int  # of the process: resident memory, not that of a device

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a `Spread` is [median, fastest, slowest]."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Training(Figures):
    """One training step: forward, backward, update."""

    batch: tuple[int, int]  # sequences, tokens of each
    step_seconds: Spread
    tokens_per_second: float
    mfu: float | None  # None: the device's peak is not known
    compile_seconds: float
    step_bytes: int  # XLA's own count for one device: arguments and temporaries
    losses: tuple[float, ...]  # of the first steps, to compare runs by

    def lines(self) -> list[str]:
        """Return the figures in words."""
        share = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        sequences, length = self.batch
        return [
            f"training step of {sequences} x {length} tokens on {self.devices}: "
            f"{self.step_seconds}",
            f"{self.tokens_per_second:,.0f} tokens/s{share}; compiled in "
            f"{self.compile_seconds:.1f} s",
            f"memory of the step, as XLA counts it: {self.step_bytes / 1e9:.2f} GB a "
            f"device; peak of the process: {self.peak_bytes / 1e9:.2f} GB",
        ]


@dataclass(frozen=True, kw_only=True)
class Generating(Figures):
    """Greedy tokens after a prompt."""

    quantize: Quantize | None
    rows: int
    prompt_tokens: int
    new_tokens: int
    seconds: Spread  # prompt and all tokens
    tokens_per_second: float  # of all rows together
    first_token_ms: float  # the prompt read and one token drawn
    early_token_ms: float  # of one step for all rows, in the first quarter
    late_token_ms: float  # in the last quarter, where the cache is longest
    tokens: tuple[int, ...]  # of one text, to compare runs by

    def lines(self) -> list[str]:
        """Return the figures in words."""
        weights = f", weights in {self.quantize}" if self.quantize else ""
        return [
            f"{self.rows} x {self.new_tokens} tokens after {self.prompt_tokens}, "
            f"greedy{weights}, on {self.devices}: {self.seconds}",
            f"{self.tokens_per_second:,.1f} tokens/s; first token after "
            f"{self.first_token_ms:.1f} ms, then {self.early_token_ms:.2f} ms each in "
            f"the first quarter and {self.late_token_ms:.2f} in the last",
            f"peak of the process: {self.peak_bytes / 1e9:.2f} GB",
        ]


@dataclass(frozen=True, kw_only=True)
class Reading(Figures):
    """Text to shards, shards to batches."""

    tokenizer: str
    prepare_seconds: Spread | None  # None: the source held shards
    prepare_mb_per_second: float | None
    load_seconds: Spread  # of `batches` batches
    batches: int
    load_tokens_per_second: float
    load_tokens_per_cpu_second: float

    def lines(self) -> list[str]:
        """Return the figures in words."""
        prepared = []
        if self.prepare_mb_per_second is not None:
            rate = f"{self.prepare_mb_per_second:.1f} MB/s, {self.prepare_seconds}"
            prepared = [f"prepare with tokenizer {self.tokenizer}: {rate}"]
        return [
            *prepared,
            f"loader: {self.load_tokens_per_second / 1e6:.1f} million tokens/s, "
            f"{self.load_tokens_per_cpu_second / 1e6:.1f} per second of one core",
            f"peak of the process: {self.peak_bytes / 1e6:.0f} MB",
        ]


def bench_train(
    config: Config,
    *,
    sequences: int | None = None,
    repeats: int = 5,
    params: Any = None,
    batch: np.ndarray | None = None,
) -> Training:
    """Time the step that `train` compiles for this config, accumulation left out.

    `sequences` is the micro-batch of all devices together, by default
    `train.micro_batch` on each. `params` (as `model.init` gives them) and `batch` (of
    shape (sequences, n_ctx + 1)) are random unless given.

    Raises
    ------
    ConfigError
        If the mesh or the batch does not suit the devices.
    """
    check(repeats > 0, "--repeats", repeats, "at least 1")
    config, mesh, _ = settle(config, jax.devices())
    parts = sharding.batch_parts(mesh)
    total = (config.train.micro_batch or 1) * parts if sequences is None else sequences
    good = total > 0 and total % parts == 0
    check(good, "--sequences", total, f"a multiple of data x fsdp = {parts}, over 0")
    length = config.model.n_ctx
    train = replace(config.train, batch_tokens=total * length, micro_batch=None)
    config = replace(config, train=train)
    program = make_program(config, mesh)
    state = program.start() if params is None else program.start_from(params)
    if batch is None:
        batch = random_tokens(config.model.n_vocab, total, length + 1)
    window = batch.reshape(*micro_batch(config, mesh), length + 1)
    tokens = sharding.to_global(window, program.batch_sharding)
    began = time.perf_counter()
    compiled = program.train_step.lower(program.abstract_state, tokens).compile()
    compile_seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    seconds, losses = [], []
    for _ in range(repeats + 1):  # the first one warms up
        began = time.perf_counter()
        state, metrics = compiled(state, tokens)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - began)
    spread = Spread.of(seconds[1:])
    rate = total * length / spread.median
    kind, count = jax.devices()[0].device_kind, mesh.size
    return Training(
        **_about(config, mesh.size),
        batch=(total, length),
        step_seconds=spread,
        tokens_per_second=rate,
        mfu=mfu(rate, config.model.flops_per_token, kind, count),
        compile_seconds=compile_seconds,
        step_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        losses=tuple(losses),
    )


def bench_generate(
    config: Config,
    *,
    rows: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    quantize: Quantize | None = None,
    repeats: int = 5,
    params: Any = None,
) -> Generating:
    """Time greedy decoding of `rows` equal prompts on one device.

    Raises
    ------
    ConfigError
        If prompt and new tokens exceed the context, or a number is below its least.
    """
    check(repeats > 0, "--repeats", repeats, "at least 1")
    check(rows > 0, "--rows", rows, "at least 1")
    check(prompt_tokens > 0, "--prompt-tokens", prompt_tokens, "at least 1")
    check(new_tokens > 4, "--new-tokens", new_tokens, "at least 5, for its quarters")
    shape = model.resolve(config.model)
    whole = prompt_tokens + new_tokens
    allowed = f"at most model.n_ctx = {shape.n_ctx}"
    check(whole <= shape.n_ctx, "--prompt-tokens + --new-tokens", whole, allowed)
    if params is None:
        params = jax.jit(model.init, static_argnums=0)(shape, jax.random.key(0))
    unstacked = GPT2(shape, params, None, quantize).unstacked
    del params
    prompt = random_tokens(shape.n_vocab, 1, prompt_tokens)[0]
    asked = [Row(prompt, new_tokens) for _ in range(rows)]

    def decoder() -> Decoder:
        return Decoder(shape, unstacked, asked, sampling=Sampling(0.0), eot=None)

    tokens, _ = decoder().advance()  # compiles
    seconds, first, early, late = [], [], [], []
    quarter = (new_tokens - 1) // 4
    for _ in range(repeats):
        seconds.append(_seconds(decoder().advance))
        writer = decoder()
        first.append(_seconds(lambda writer=writer: writer.advance(1)))
        early.append(_seconds(lambda writer=writer: writer.advance(quarter)))
        writer.advance(new_tokens - 1 - 2 * quarter)
        late.append(_seconds(lambda writer=writer: writer.advance(quarter)))
    spread = Spread.of(seconds)
    return Generating(
        **_about(config, 1),
        quantize=quantize,
        rows=rows,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seconds=spread,
        tokens_per_second=rows * new_tokens / spread.median,
        first_token_ms=1e3 * statistics.median(first),
        early_token_ms=1e3 * statistics.median(early) / quarter,
        late_token_ms=1e3 * statistics.median(late) / quarter,
        tokens=tuple(tokens[0].tolist()),
    )


def bench_data(config: Config, *, batches: int = 200, repeats: int = 5) -> Reading:
    """Time `prepare` on the config's source and its loader on what that made.

    Raises
    ------
    ConfigError
        If the source cannot be read, or holds fewer tokens than one sequence.
    """
    check(repeats > 0, "--repeats", repeats, "at least 1")
    check(batches > 0, "--batches", batches, "at least 1")
    tokenizer = load_tokenizer(config.data.tokenizer)
    length, sequences = config.model.n_ctx, config.batch_sequences
    preparing, loading, cpu = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / str(i) for i in range(repeats)]
        for cache in caches:
            began = time.perf_counter()
            open_dataset(config.data, tokenizer, cache, _say_nothing)
            preparing.append(time.perf_counter() - began)
        made = (caches[0] / MANIFEST).is_file()  # else the source held shards
        data = open_dataset(config.data, tokenizer, caches[0], _say_nothing)
        for seed in range(repeats + 1):  # the first one warms up
            shape = BatchShape(1, sequences, length)
            how: dict[str, Any] = dict(seed=seed, start=0, stop=batches, ahead=2)
            used, began = time.process_time(), time.perf_counter()
            for _ in train_batches(data.train, shape, **how):
                pass
            loading.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
        splits = read_manifest(caches[0]).splits.values() if made else ()
        size = sum(split.bytes for split in splits)
    count = batches * sequences * length
    spread = Spread.of(preparing)
    return Reading(
        **_about(config, 1),
        tokenizer=config.data.tokenizer,
        prepare_seconds=spread if made else None,
        prepare_mb_per_second=size / spread.median / 1e6 if made else None,
        load_seconds=Spread.of(loading[1:]),
        batches=batches,
        load_tokens_per_second=count / statistics.median(loading[1:]),
        load_tokens_per_cpu_second=count / statistics.median(cpu[1:]),
    )


def random_tokens(n_vocab: int, rows: int, length: int) -> Int32[np.ndarray, "B T"]:
    """Return the same tokens every time, all of the vocabulary equally likely."""
    drawn = np.random.default_rng(0).integers(0, n_vocab, (rows, length))
    return drawn.astype(np.int32)


def _say_nothing(line: str) -> None:
    pass


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _about(config: Config, count: int) -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    kind = jax.devices()[0].device_kind
    shape = dataclasses.asdict(model.resolve(config.model))
    return dict(config=shape, devices=f"{count} x {kind}", peak_bytes=peak)
