"""Serving beside transformers: clients at once, tokens a second, time to the first.

    python benchmarks/serve.py MODEL [--rounds 3] [--quantize int8] [--json]

MODEL is a directory in Hugging Face layout with its tokenizer. `gpt2-jax serve` and a
server that calls transformers' `generate` for one request after the other (in torch,
float32) answer the same clients in turn: one client, then eight at once, each with a
prompt of 32 tokens and 128 new ones, greedy, taken as a whole, medians of three; times
to first tokens are of streams. The same model decodes without a server as well, as
`gpt2-jax bench generate` does. Needs the extras serve and peers.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

PROMPT, NEW, CLIENTS = 32, 128, 8
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def main() -> None:
    """Run the rounds and print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", choices=["int8"], help="of our side")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        serve_transformers(asked.model)
        return
    if asked.alone:
        generate_alone(asked.model, asked.quantize)
        return
    rows = []
    ours = [sys.executable, "-m", "gpt2_jax.start", "serve", asked.model, "--port", "0"]
    quantize = ["--quantize", asked.quantize] if asked.quantize else []
    theirs = [sys.executable, __file__, asked.model, "--peer"]
    lone = [sys.executable, __file__, asked.model, "--alone", *quantize]
    for _ in range(asked.rounds):
        row: dict[str, float] = {}
        env = os.environ | {"GLIBC_TUNABLES": HUGE_PAGES}
        done = subprocess.run(lone, check=True, env=env, stdout=subprocess.PIPE)
        row["generate"] = float(done.stdout)
        for name, command in (("ours", ours + quantize), ("theirs", theirs)):
            with running(command) as url:
                row |= {f"{name}_{k}": v for k, v in measure(url, asked.model).items()}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    ratios = {
        "eight_over_one": ("ours_eight", "ours_one"),
        "one_over_generate": ("ours_one", "generate"),
        "eight_over_transformers": ("ours_eight", "theirs_eight"),
        "one_over_transformers": ("ours_one", "theirs_one"),
    }
    for name, (a, b) in ratios.items():
        each = [row[a] / row[b] for row in rows]
        found[name] = statistics.median(each)
        found[f"{name}_range"] = [min(each), max(each)]
    if asked.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key}: {value if isinstance(value, list) else round(value, 3)}")


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[str]:
    """Give the address of a server that is a process of its own."""
    env = os.environ | {"GLIBC_TUNABLES": HUGE_PAGES}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert server.stdout is not None
    line = server.stdout.readline()
    try:
        yield line.split(" at ")[-1].split(";")[0].strip()
    finally:
        server.terminate()
        server.wait(60)


def measure(url: str, model: str) -> dict[str, float]:
    """Return tokens a second of one and eight clients, and times to first tokens."""
    prompts = [[100 + i] * PROMPT for i in range(CLIENTS)]
    found: dict[str, float] = {}
    with (
        httpx.Client(base_url=url, timeout=600) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):

        def tokens_per_second(some: list[list[int]]) -> float:
            began = time.perf_counter()
            list(pool.map(lambda prompt: ask(client, model, prompt), some))
            return len(some) * NEW / (time.perf_counter() - began)

        for some in (prompts[:1], prompts):
            tokens_per_second(some)  # compiled, or warm
        found["one"] = statistics.median(
            tokens_per_second(prompts[:1]) for _ in range(3)
        )
        found["eight"] = tokens_per_second(prompts)
        found["first_alone_seconds"] = first_token(client, model, prompts[0])
        firsts = pool.map(lambda prompt: first_token(client, model, prompt), prompts)
        ordered = sorted(firsts)
    found["first_p50_seconds"] = ordered[CLIENTS // 2]
    found["first_p95_seconds"] = ordered[-1]  # of eight
    return found


def ask(client: httpx.Client, model: str, prompt: list[int]) -> None:
    """Wait for a whole text."""
    body = dict(model=model, prompt=prompt, max_tokens=NEW, temperature=0)
    answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == NEW, answer


def first_token(client: httpx.Client, model: str, prompt: list[int]) -> float:
    """Return the seconds until a stream's first event; wait for its end too."""
    body = dict(model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=True)
    began, first = time.perf_counter(), 0.0
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
    return first


def generate_alone(path: str, quantize: Literal["int8"] | None) -> None:
    """Print tokens a second of `bench generate`'s loop with this model."""
    from gpt2_jax.decode import Decoder, Row, Sampling
    from gpt2_jax.pretrained import load

    lm = load(path, quantize=quantize)
    row = Row(np.full(PROMPT, 100), NEW)
    seconds = []
    for _ in range(4):  # the first one warms up
        decoder = Decoder(
            lm.config, lm.unstacked, [row], sampling=Sampling(0.0), eot=None
        )
        began = time.perf_counter()
        decoder.advance()
        seconds.append(time.perf_counter() - began)
    print(NEW / statistics.median(seconds[1:]))


def serve_transformers(path: str) -> None:
    """Answer completions with transformers' `generate`, one after the other."""
    import torch
    from transformers import GPT2LMHeadModel

    lm: Any = GPT2LMHeadModel.from_pretrained(path).eval()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = torch.tensor([asked["prompt"]])
            new = asked["max_tokens"]
            with lock, torch.inference_mode():
                made = lm.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=50256,
                )
            count = made.shape[1] - ids.shape[1]
            found = json.dumps({"usage": {"completion_tokens": count}})
            self.send_response(200)
            self.end_headers()
            text = f"data: {found}\n\n" if asked.get("stream") else found
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    name = Path(path).name
    print(f"serving {name} at http://127.0.0.1:{server.server_port};", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
