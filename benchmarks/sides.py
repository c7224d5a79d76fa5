"""One side of a comparison in a process of its own: python sides.py SIDE ASKED-JSON.

All sides read the same weights, from a directory in Hugging Face layout, and the same
tokens. Each prints one JSON object: seconds of the repeats, and losses or tokens, so
that the comparison can tell that the same was computed.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Asked(NamedTuple):
    """What a side is to do."""

    task: str  # train or decode
    model: str  # directory in Hugging Face layout
    dtype: str = "float32"
    rows: int = 1  # sequences or texts at once
    length: int = 1024  # tokens of a training sequence
    prompt_tokens: int = 32
    new_tokens: int = 128
    repeats: int = 3
    n_vocab: int = 50_257
    compile: bool = False  # torch.compile, for training
    device: str = "cpu"  # of torch


def tokens(asked: Asked, rows: int, length: int) -> np.ndarray:
    """Return what every side reads; `gpt2_jax.bench` draws the same."""
    drawn = np.random.default_rng(0).integers(0, asked.n_vocab, (rows, length))
    return drawn.astype(np.int32)


def repeat(run: Callable[[], Any], asked: Asked) -> dict[str, Any]:
    """Return the seconds of each repeat after one that warms up, and the results."""
    results, seconds = [], []
    for _ in range(asked.repeats + 1):
        began = time.perf_counter()
        results.append(run())
        seconds.append(time.perf_counter() - began)
    return dict(first_seconds=seconds[0], seconds=seconds[1:], results=results)


def ours(asked: Asked) -> dict[str, Any]:
    """Run `gpt2_jax.bench`, on the weights of the directory."""
    import gpt2_jax
    from gpt2_jax import bench
    from gpt2_jax.config import load_config
    from gpt2_jax.pretrained import keep_compiled

    if asked.task == "decode":
        keep_compiled()
    quantize = "int8" if asked.dtype == "int8" else None
    lm = gpt2_jax.load(asked.model, dtype="float32" if quantize else asked.dtype)
    base = load_config("gpt2_124m")
    shape = replace(lm.config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    how: dict[str, Any] = dict(repeats=asked.repeats, params=lm.params)
    if asked.task == "decode":
        found = bench.bench_generate(
            replace(base, model=shape),
            rows=asked.rows,
            prompt_tokens=asked.prompt_tokens,
            new_tokens=asked.new_tokens,
            quantize=quantize,
            **how,
        )
        return dict(first_seconds=None, **spread(found.seconds), results=[found.tokens])
    del lm
    shape = replace(shape, n_ctx=asked.length)
    batch = tokens(asked, asked.rows, asked.length + 1)
    optimizer = replace(base.optimizer, warmup_steps=0, schedule="constant")
    config = replace(base, model=shape, optimizer=optimizer)
    trained = bench.bench_train(config, sequences=asked.rows, batch=batch, **how)
    return dict(
        first_seconds=trained.compile_seconds,
        **spread(trained.step_seconds),
        results=trained.losses,
        step_bytes=trained.step_bytes,
    )


def spread(seconds: Any) -> dict[str, list[float]]:
    """Return the median between the fastest and the slowest."""
    return dict(seconds=[seconds.fastest, seconds.median, seconds.slowest])


def transformers(asked: Asked) -> dict[str, Any]:
    """Run GPT2LMHeadModel in torch, with SDPA and a fused AdamW, as nanoGPT steps."""
    import torch
    from transformers import GPT2LMHeadModel

    how: dict[str, Any] = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    network: Any = GPT2LMHeadModel.from_pretrained(asked.model, **how)
    network = network.to(asked.device)
    low = asked.dtype == "bfloat16"
    if asked.task == "decode":
        network = network.to(getattr(torch, asked.dtype)).eval()
        ids = torch.tensor(prompts(asked), device=asked.device)
        rule: dict[str, Any] = dict(
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

        def write() -> list[int]:
            with torch.no_grad():
                return network.generate(ids, **rule)[0, asked.prompt_tokens :].tolist()

        return repeat(write, asked)
    drawn = tokens(asked, asked.rows, asked.length + 1)
    window = torch.tensor(drawn, device=asked.device).long()
    if asked.device == "cuda":
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(network) if asked.compile else network

    def step() -> float:
        mixed = (
            torch.autocast(asked.device, torch.bfloat16)
            if low
            else contextlib.nullcontext()
        )
        with mixed:
            logits: Any = forward(window[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), window[:, 1:].flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return repeat(step, asked)


def ctranslate2(asked: Asked) -> dict[str, Any]:
    """Run CTranslate2's generator; `dtype` is its compute type."""
    import ctranslate2

    vocabulary = json.loads((Path(asked.model) / "vocab.json").read_text())
    by_id = {i: token for token, i in vocabulary.items()}
    generator = ctranslate2.Generator(
        f"{asked.model}/ct2_{asked.dtype}", compute_type=asked.dtype, intra_threads=2
    )
    texts = [[by_id[i] for i in row] for row in prompts(asked)]

    def write() -> list[int]:
        found = generator.generate_batch(
            texts,
            max_length=asked.new_tokens,
            min_length=asked.new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return found[0].sequences_ids[0]

    return repeat(write, asked)


def keras_hub(asked: Asked) -> dict[str, Any]:
    """Run keras-hub's GPT2CausalLM on JAX; its weights are random, for time alone."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras_hub import models

    config = json.loads((Path(asked.model) / "config.json").read_text())
    longest = asked.length if asked.task == "train" else config["n_positions"]
    backbone = models.GPT2Backbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        hidden_dim=config["n_embd"],
        intermediate_dim=4 * config["n_embd"],
        dropout=0.0,
        max_sequence_length=longest,
    )
    network: Any = models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    if asked.task == "decode":
        total = asked.prompt_tokens + asked.new_tokens
        ids = np.zeros((asked.rows, total), np.int32)
        ids[:, : asked.prompt_tokens] = prompts(asked)
        mask = np.arange(total)[None] < asked.prompt_tokens
        given = dict(token_ids=ids, padding_mask=np.repeat(mask, asked.rows, axis=0))
        network.compile(sampler="greedy")

        def write() -> None:
            network.generate(given, max_length=total, stop_token_ids=None)

        return repeat(write, asked) | dict(results=[])
    window = tokens(asked, asked.rows, asked.length + 1)
    given = dict(token_ids=window[:, :-1], padding_mask=np.ones_like(window[:, :-1]))
    rule = keras.optimizers.AdamW(6e-4, weight_decay=0.1, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer=rule, loss=loss)
    found = repeat(lambda: network.train_on_batch(given, window[:, 1:]), asked)
    return found | dict(results=[])


def prompts(asked: Asked) -> list[list[int]]:
    """Return one prompt as many times as rows are asked for."""
    return tokens(asked, 1, asked.prompt_tokens).tolist() * asked.rows


def main() -> None:
    """Run one side and print what it took."""
    sides = dict(
        ours=ours,
        transformers=transformers,
        ctranslate2=ctranslate2,
        keras_hub=keras_hub,
    )
    asked = Asked(**json.loads(sys.argv[2]))
    found = sides[sys.argv[1]](asked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found | dict(peak_bytes=peak), default=float))


if __name__ == "__main__":
    main()
