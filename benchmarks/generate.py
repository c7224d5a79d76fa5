"""Tokens a second of generating, beside transformers in torch, one after the other.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/generate.py DIRECTORY

DIRECTORY holds a GPT-2 in Hugging Face layout. Float32, a prompt of 8 tokens, 100 new
ones, median of 5 after one to warm up.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT = [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # Hello, I'm a language model,
NEW_TOKENS = 100
ROUNDS = 5


def report(name: str, run: Callable[[], Any]) -> None:
    """Print the steps a second of one way to generate."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    print(
        f"{name:32} {NEW_TOKENS / statistics.median(seconds):6.1f} steps/s", flush=True
    )


def ours(directory: str) -> None:
    """Time `GPT2.generate`."""
    import gpt2_jax

    lm = gpt2_jax.load(directory, dtype="float32")
    how: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, eos=False)
    warm = dict(temperature=1.0, top_k=50, top_p=0.95)
    ways: dict[str, dict[str, Any]] = {
        "greedy": dict(temperature=0.0),
        "greedy, five texts": dict(temperature=0.0, num_return_sequences=5),
        "sampled": warm,
        "greedy, streamed": dict(temperature=0.0, stream=lambda piece: None),
    }
    for name, way in ways.items():
        report(f"ours: {name}", lambda way=way: lm.generate(PROMPT, **how, **way))


def theirs(directory: str) -> None:
    """Time transformers' `generate`."""
    import torch
    from transformers import GPT2LMHeadModel

    network: Any = GPT2LMHeadModel.from_pretrained(directory).eval()
    how: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, eos_token_id=None)
    warm = dict(do_sample=True, top_k=50, top_p=0.95)
    ways = {
        "greedy": (1, dict(do_sample=False)),
        "greedy, five texts": (5, dict(do_sample=False)),
        "sampled": (1, warm),
    }
    for name, (count, way) in ways.items():
        ids = torch.tensor([PROMPT] * count)
        mask = torch.ones_like(ids)

        def run(ids=ids, mask=mask, way=way):
            with torch.no_grad():
                network.generate(ids, attention_mask=mask, pad_token_id=0, **how, **way)

        report(f"transformers: {name}", run)


def main() -> None:
    """Run each side in a process of its own."""
    if sys.argv[1] == "--side":
        {"ours": ours, "theirs": theirs}[sys.argv[2]](sys.argv[3])
        return
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--side", side, sys.argv[1]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
