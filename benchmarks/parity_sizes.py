"""Compare logits, gradients and greedy text with transformers at the four full sizes.

    python benchmarks/parity_sizes.py [124M 355M 774M 1558M]

Random weights, float32, all layers. transformers saves its model, we load and convert
it, transformers loads what we wrote. Each side runs in a process of its own, so that
1558M needs 16 GB of memory, and 25 GB of disk in the temporary folder.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
LENGTH = 64  # tokens of the compared batch
NEW_TOKENS = 32  # of greedy text
PROMPT = [464, 3290]
STD = 0.03  # wide enough that greedy choices are decided


def tokens() -> np.ndarray:
    """Return the one sequence that both sides read."""
    return np.random.default_rng(0).integers(0, 50_257, (1, LENGTH))


def reference(folder: Path, size: str) -> None:
    """Make transformers' model, save it with its logits, gradients and text."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd = SHAPES[size]
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    shape["attn_implementation"] = "eager"
    network = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(float(is_scale), STD)
    network.save_pretrained(folder / "theirs")
    ids = torch.from_numpy(tokens())
    output = network(ids, labels=ids, use_cache=False)
    np.save(folder / "logits.npy", output.logits.detach().numpy())
    output.loss.backward()
    found = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    gradients = {k: gradient.contiguous() for k, gradient in found.items()}
    save_file(gradients, folder / "gradients.safetensors")
    del gradients, found, output
    network.zero_grad()
    np.save(folder / "greedy.npy", greedy(network))


def greedy(network) -> np.ndarray:
    """Return transformers' greedy text after the prompt."""
    import torch

    ids = torch.tensor([PROMPT])
    how = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    mask = torch.ones_like(ids)
    return network.generate(ids, attention_mask=mask, pad_token_id=0, **how)[0].numpy()


def ours(folder: Path) -> dict[str, float]:
    """Load, compare, convert; return the largest absolute differences."""
    import gpt2_jax
    from gpt2_jax.convert import convert

    lm = gpt2_jax.load(folder / "theirs", dtype="float32")
    logits = np.asarray(lm.logits(tokens()))
    gaps = {"load, logits": gap(logits, np.load(folder / "logits.npy"))}
    new = lm.generate(
        PROMPT, temperature=0.0, eos=False, max_new_tokens=NEW_TOKENS, details=True
    )[0]["token_ids"]
    wanted = np.load(folder / "greedy.npy")[len(PROMPT) :]
    gaps["greedy tokens that differ"] = float(np.sum(new != wanted))
    convert(folder / "theirs", folder / "ours", say=lambda line: None)
    return gaps


def our_gradients(folder: Path) -> dict[str, float]:
    """Load and return the largest absolute difference of the loss's gradients."""
    import jax
    import jax.numpy as jnp
    from safetensors import safe_open

    import gpt2_jax
    from gpt2_jax import model
    from gpt2_jax.hf import params_to_hf
    from gpt2_jax.loss import IGNORED, chunked_loss

    lm = gpt2_jax.load(folder / "theirs", dtype="float32")
    ids = jnp.asarray(tokens(), jnp.int32)
    targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)

    def mean_loss(params):
        hidden = model.hidden_states(lm.config, params, ids)
        head = model.output_matrix(params)
        total, count = chunked_loss(hidden, head, targets, n_vocab=lm.config.n_vocab)
        return total / count

    gradients = params_to_hf(lm.config, jax.jit(jax.grad(mean_loss))(lm.params))
    with safe_open(folder / "gradients.safetensors", "numpy") as theirs:
        gaps, sizes = [], []
        for name, found in gradients.items():
            wanted = theirs.get_tensor(name)
            gaps.append(gap(wanted, found))
            sizes.append(float(np.abs(wanted).max()))
    return {"load, gradients": max(gaps), "largest gradient": max(sizes)}


def theirs_again(folder: Path) -> dict[str, float]:
    """Load what we wrote in transformers and compare with what it computed first."""
    import torch
    from transformers import GPT2LMHeadModel

    network = GPT2LMHeadModel.from_pretrained(
        folder / "ours", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(tokens())).logits.numpy()
    return {"convert, logits": gap(logits, np.load(folder / "logits.npy"))}


def gap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest absolute difference."""
    return float(np.max(np.abs(one - other)))


def main() -> None:
    """Print the differences of the sizes named on the command line, or of all."""
    if sys.argv[1:2] == ["--stage"]:
        stage, folder, size = sys.argv[2:]
        stages = dict(
            reference=lambda: reference(Path(folder), size),
            gradients=lambda: our_gradients(Path(folder)),
            ours=lambda: ours(Path(folder)),
            again=lambda: theirs_again(Path(folder)),
        )
        print("RESULT", json.dumps(stages[stage]() or {}))
        return
    for size in sys.argv[1:] or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            gaps: dict[str, float] = {}
            for stage in ("reference", "gradients", "ours", "again"):
                command = [sys.executable, __file__, "--stage", stage, folder, size]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{size}, {stage}: {done.returncode} {done.stderr}")
                gaps |= json.loads(done.stdout.rpartition("RESULT ")[2])
        print(size, {name: f"{value:.2e}" for name, value in gaps.items()}, flush=True)


if __name__ == "__main__":
    main()
