"""How cost grows: with length, batch, width, depth, and the position of a token.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/scaling.py OUT.png

One axis is varied at a time around 4 layers, width 256, 4 x 512 tokens, vocabulary
8,192; decoding is of 124M. Every point is a median of 5 in this process; the points are
visited in a random order, so that a slow minute of the machine bends no curve.
"""

import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from gpt2_jax import bench, model
from gpt2_jax.config import ModelConfig, load_config
from gpt2_jax.decode import Decoder, Row, Sampling

BASE = dict(n_ctx=512, sequences=4, n_embd=256, n_layer=4)
AXES = {
    "n_ctx": [128, 256, 512, 1024],
    "sequences": [1, 2, 4, 8, 16],
    "n_embd": [64, 128, 256, 512, 1024],
    "n_layer": [1, 2, 4, 8, 16],
}
LABELS = {
    "n_ctx": "tokens of a sequence",
    "sequences": "sequences of a batch",
    "n_embd": "width",
    "n_layer": "layers",
}
RATE = "tokens_per_second", "tokens/s"
SPAN = 64  # tokens decoded at once


def train_point(**shape: Any) -> dict[str, float]:
    """Return the rate, its share of the work done, and compile time of one shape."""
    base = load_config("gpt2_124m")
    sequences = shape.pop("sequences")
    heads = max(1, shape["n_embd"] // 64)
    network = ModelConfig(n_vocab=8192, n_head=heads, dtype="float32", **shape)
    jax.clear_caches()
    found = bench.bench_train(replace(base, model=network), sequences=sequences)
    return dict(
        tokens_per_second=found.tokens_per_second,
        gflops=found.tokens_per_second * network.flops_per_token / 1e9,
        compile_seconds=found.compile_seconds,
    )


def train_curves() -> dict[str, dict[int, dict[str, float]]]:
    """Measure every axis, its points in a random order."""
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    random.Random(0).shuffle(points)
    found: dict[str, dict[int, dict[str, float]]] = {axis: {} for axis in AXES}
    for axis, value in points:
        found[axis][value] = train_point(**BASE | {axis: value})
        print(axis, value, json.dumps(found[axis][value]), flush=True)
    return {axis: dict(sorted(values.items())) for axis, values in found.items()}


def decode_curve(repeats: int = 3) -> dict[int, float]:
    """Return position -> milliseconds per token of 124M, one text, greedy."""
    shape = model.resolve(replace(load_config("gpt2_124m").model, dtype="float32"))
    params = jax.jit(model.init, static_argnums=0)(shape, jax.random.key(0))
    unstacked = model.unstack(shape, params)
    prompt = bench.random_tokens(shape.n_vocab, 1, 32)[0]
    total = (shape.n_ctx - len(prompt)) // SPAN * SPAN
    runs = []
    for _ in range(repeats + 1):
        rows = [Row(prompt, total)]
        how: dict[str, Any] = dict(sampling=Sampling(0.0), eot=None)
        writer, times = Decoder(shape, unstacked, rows, **how), []
        for _ in range(total // SPAN):
            began = time.perf_counter()
            writer.advance(SPAN)
            times.append(1e3 * (time.perf_counter() - began) / SPAN)
        runs.append(times)
    middles = np.median(np.array(runs[1:]), axis=0)
    starts = range(len(prompt), len(prompt) + total, SPAN)
    return dict(zip(starts, middles.tolist(), strict=True))


def plot(found: dict[str, Any], out: Path) -> None:
    """Draw six panels."""
    figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
    panels: Any = figure.subplots(2, 3).flat
    for axis, points in found["train"].items():
        by_work = axis in ("n_embd", "n_layer")  # a token's work grows with these
        key, label = ("gflops", "GFLOP/s") if by_work else RATE
        rates = [point[key] for point in points.values()]
        panel = next(panels)
        panel.set(xscale="log", xlabel=LABELS[axis], ylabel=label)
        panel.plot(list(points), rates, "o-", color="#4c78a8")
        panel.set_xticks(list(points), list(map(str, points)))
        panel.minorticks_off()
        panel.set_ylim(0, 1.15 * max(rates))
    depths = found["train"]["n_layer"]
    seconds = [point["compile_seconds"] for point in depths.values()]
    panel = next(panels)
    panel.set(xlabel="layers", ylabel="seconds to compile a step")
    panel.plot(list(depths), seconds, "o-", color="#e4572e")
    panel.set_xticks(list(depths))
    panel.set_ylim(0, 1.15 * max(seconds))
    times = found["decode"]
    panel = next(panels)
    panel.set(xlabel="position", ylabel="ms a token, 124M")
    panel.plot(list(times), list(times.values()), "o-", color="#72b7b2")
    panel.set_ylim(0, 1.15 * max(times.values()))
    figure.savefig(out)


def main() -> None:
    """Measure, draw, print."""
    out = Path(sys.argv[1])
    found: dict[str, Any] = dict(train=train_curves(), decode=decode_curve())
    times = list(found["decode"].values())
    quarter = len(times) // 4
    first, last = times[:quarter], times[-quarter:]
    ratio = statistics.median(last) / statistics.median(first)
    found |= dict(late_over_early=ratio)
    print(json.dumps(found))
    plot(found, out)


if __name__ == "__main__":
    main()
