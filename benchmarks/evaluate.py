"""Zero-shot scoring of LAMBADA and WikiText-2 beside transformers on one CPU.

Both score the same token rows in float32: LAMBADA's last words, and WikiText-2 in
windows of 1024 without overlap. transformers runs as in lm-evaluation-harness: rows
sorted by length, padded batches, logits of every position. Ours and theirs alternate;
medians and the ratio of each pair's times. Random weights of GPT-2 124M's shape.

    pip install torch==2.13.0 && pip install -e ".[peers]"
    python benchmarks/evaluate.py DATA_DIR [--items 5153 --windows 270 --pairs 3]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import GPT2LMHeadModel

from gpt2_jax import load, model
from gpt2_jax.config import ModelConfig
from gpt2_jax.evaluate import files, lambada, texts
from gpt2_jax.evaluate.scoring import Request, score, window_requests
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer

BATCH = 16  # rows of transformers at once; of 4, 8, 16 and 32 none was faster


def last_words(data: Path, tokenizer: Tokenizer, count: int) -> list[Request]:
    """Return the first items of LAMBADA."""
    path = files.find(data, files.FILES["lambada"])
    assert path is not None, f"no LAMBADA in {data}"
    requests = []
    for item in lambada.read_items(path, "none")[:count]:
        before, after = (tokenizer.encode(part) for part in item)
        requests.append(Request(np.concatenate([before, after]), len(before)))
    return requests


def windows(data: Path, tokenizer: Tokenizer, count: int) -> list[Request]:
    """Return the first windows of WikiText-2."""
    path = files.find(data, files.FILES["wikitext2"])
    assert path is not None, f"no WikiText-2 in {data}"
    text = texts.wikitext2(path).documents[0].text
    return window_requests(texts.encode(tokenizer, text), 1024, 1024)[:count]


def score_with_torch(peer: GPT2LMHeadModel, requests: Sequence[Request]) -> list[float]:
    """Return the nll of each request."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    found = [0.0] * len(requests)
    size = 1 if len(requests[order[0]].tokens) > 512 else BATCH
    with torch.inference_mode():
        for start in range(0, len(order), size):
            taken = order[start : start + size]
            longest = max(len(requests[i].tokens) for i in taken) - 1
            ids = torch.zeros(len(taken), longest, dtype=torch.long)
            for row, i in enumerate(taken):
                tokens = torch.from_numpy(requests[i].tokens[:-1].astype(np.int64))
                ids[row, : len(tokens)] = tokens
            logits = peer(ids).logits
            for row, i in enumerate(taken):
                tokens, first = requests[i]
                wanted = torch.from_numpy(tokens[first:].astype(np.int64))
                part = logits[row, first - 1 : len(tokens) - 1].log_softmax(-1)
                found[i] = -part.gather(1, wanted[:, None]).double().sum().item()
    return found


def pairs(ours: Callable, theirs: Callable, count: int) -> dict[str, object]:
    """Return medians and ratios of `count` alternating runs."""
    times: list[tuple[float, float]] = []
    for number in range(count):
        pair = []
        for run in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            began = time.perf_counter()
            run()
            pair.append(time.perf_counter() - began)
        times.append((pair[0], pair[1]) if number % 2 == 0 else (pair[1], pair[0]))
    ratios = [a / b for a, b in times]
    return dict(
        ours_seconds=round(statistics.median(a for a, _ in times), 2),
        transformers_seconds=round(statistics.median(b for _, b in times), 2),
        ratio=round(statistics.median(ratios), 3),
        ratios=[round(ratio, 3) for ratio in ratios],
    )


def main() -> None:
    """Export random weights, compare the sums, time both, print one JSON line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=5153)
    parser.add_argument("--windows", type=int, default=270)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    tokenizer, shape = load_tokenizer("gpt2"), ModelConfig()
    with tempfile.TemporaryDirectory() as folder:
        made = GPT2(shape, model.init(shape, jax.random.key(0)), tokenizer)
        made.save(Path(folder, "model"))
        lm = load(Path(folder, "model"))
        peer = GPT2LMHeadModel.from_pretrained(Path(folder, "model")).eval()
    sets = dict(
        lambada=last_words(asked.data, tokenizer, asked.items),
        wikitext2=windows(asked.data, tokenizer, asked.windows),
    )
    for name, requests in sets.items():
        hits = name == "lambada"  # a text's perplexity asks for none
        few = requests[:32]  # compiles, warms up and compares
        mine = [answer.nll for answer in score(lm, few)]
        np.testing.assert_allclose(mine, score_with_torch(peer, few), rtol=1e-4)
        score(lm, requests, hits=hits)
        found = pairs(
            lambda requests=requests, hits=hits: score(lm, requests, hits=hits),
            lambda requests=requests: score_with_torch(peer, requests),
            asked.pairs,
        )
        tokens = sum(len(one.tokens) - 1 for one in requests)
        result = dict(task=name, rows=len(requests), tokens=tokens) | found
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
