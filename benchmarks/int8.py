"""What weights of 8 bits cost: held-out loss of a model, as it is and quantized.

    python benchmarks/int8.py MODEL TEXT [--windows 64] [--json]

Both read the same windows of n_ctx tokens from the end of TEXT with the decoder that
writes texts, in the compute dtype of this machine. Prints one table.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax
from gpt2_jax import int8, model
from gpt2_jax.config import ModelConfig


@functools.partial(jax.jit, static_argnums=0)
def read(config: ModelConfig, unstacked: Any, tokens: Any) -> Any:
    """Return log-probabilities (T, V) of what follows each token of one window."""
    positions = jnp.arange(tokens.shape[1])[None]
    cache = model.init_cache(config, 1, tokens.shape[1])
    hidden, _ = model.decode(config, unstacked, tokens, positions, cache)
    return jax.nn.log_softmax(model.project(config, unstacked, hidden)[0])


def main() -> None:
    """Print nats per token of both, and how far they are apart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    lm = gpt2_jax.load(asked.model)
    if lm.tokenizer is None:
        raise SystemExit(f"{asked.model} has no tokenizer")
    ids = np.asarray(lm.tokenizer.encode(asked.text.read_text(encoding="utf-8")))
    length = lm.config.n_ctx
    wanted = min(asked.windows, (len(ids) - 1) // length)
    if wanted < 1:
        raise SystemExit(f"{asked.text} has less than {length + 1} tokens")
    ids = ids[-(wanted * length + 1) :].astype(np.int32)
    losses, apart, same = {"as it is": [], "int8": []}, [], []
    quantized = int8.quantize(lm.unstacked)
    for first in range(0, wanted * length, length):
        window, targets = ids[first : first + length], ids[first + 1 :][:length]
        exact = read(lm.config, lm.unstacked, window[None])
        rounded = read(lm.config, quantized, window[None])
        for name, found in zip(losses, (exact, rounded), strict=True):
            losses[name].append(-np.asarray(found)[np.arange(length), targets])
        apart.append(jnp.sum(jnp.exp(exact) * (exact - rounded), axis=-1))
        same.append(jnp.argmax(exact, axis=-1) == jnp.argmax(rounded, axis=-1))
    found = dict(
        tokens=wanted * length,
        nats={name: float(np.mean(parts)) for name, parts in losses.items()},
        kl_nats=float(np.mean(apart)),
        same_likeliest=float(np.mean(same)),
    )
    if asked.json:
        print(json.dumps(found))
        return
    for name, nats in found["nats"].items():
        print(f"{name:10} {nats:.4f} nats per token over {found['tokens']:,} tokens")
    print(f"divergence {found['kl_nats']:.2e} nats; ", end="")
    print(f"the likeliest token is the same for {found['same_likeliest']:.1%}")


if __name__ == "__main__":
    main()
