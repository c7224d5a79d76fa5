"""What a GPU gives: correctness, training, torch beside it, decoding, a profile.

    pip install -e ".[cuda,peers,offline]"
    python benchmarks/gpu.py --out gpu [--minutes 8] [--rehearse]

Writes gpu/figures.json as it goes, so that nothing measured is lost, and a profile
trace to gpu/profile. What no minutes are left for is named and left out. `--rehearse`
runs everything on a tiny model, on any device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cpu

CLOSE = {"float32": 1e-3, "bfloat16": 0.05}  # of a loss near 11 nats
FULL = {"gpt2_124m": [16, 32, 64, 128], "gpt2_1558m": [4, 8, 16, 32]}
TINY = ["--model.n-embd=32", "--model.n-layer=2", "--model.n-head=2"]


class Session:
    """The figures so far, and the minutes left."""

    def __init__(self, out: Path, minutes: float, rehearse: bool):
        self.out, self.rehearse = out, rehearse
        self.until = time.monotonic() + 60 * minutes
        self.figures: dict[str, Any] = {}

    def bench(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """Run `gpt2-jax bench`, tiny in a rehearsal."""
        tiny = [*TINY, "--model.n-ctx=128"] if self.rehearse else []
        command = ["-m", "gpt2_jax.start", "bench", *arguments, *tiny, "--json"]
        return self.run(command, **environment)

    def run(self, arguments: list[str], **environment: str) -> dict[str, Any]:
        """Return the JSON that a program printed, or why there is none."""
        left = self.until - time.monotonic()
        if left < 5:
            return dict(left_out="no minutes were left")
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            return dict(left_out=f"took more than the {left:.0f} s that were left")
        lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
        last = lines[-1] if lines else f"status {done.returncode}"
        return json.loads(last) if done.returncode == 0 else dict(failed=last[:500])

    def keep(self, name: str, value: Any) -> Any:
        """Print a figure and write all of them."""
        self.figures[name] = value
        shown = {k: v for k, v in value.items() if k not in ("config", "tokens")}
        print(f"{name}: {json.dumps(shown)}", flush=True)
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1))
        return value


def compare_with_cpu(session: Session) -> None:
    """Take three steps on the CPU in float32, and here in both types."""
    shape = ["--model.n-ctx=128", "--sequences=1", "--repeats=2", "--train.steps=10"]
    how = ["train", "gpt2_124m", *shape]
    exact = dict(JAX_DEFAULT_MATMUL_PRECISION="highest")  # no TF32
    base = session.bench(*how, "--model.dtype=float32", JAX_PLATFORMS="cpu")
    for dtype, close in CLOSE.items():
        environment = exact if dtype == "float32" else {}
        found = session.bench(*how, f"--model.dtype={dtype}", **environment)
        if "losses" not in found or "losses" not in base:
            session.keep(f"correct_{dtype}", dict(cpu=base, here=found))
            continue
        pairs = zip(base["losses"], found["losses"], strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        good = worst < close
        session.keep(f"correct_{dtype}", dict(good=good, differ_by=worst))


def train(session: Session, name: str, sizes: list[int]) -> None:
    """Find the batch that trains fastest; one too large ends the search."""
    unroll = "12" if name == "gpt2_124m" else "1"
    best: dict[str, Any] = {}
    for size in sizes:
        how = ["train", name, f"--sequences={size}", f"--model.unroll={unroll}"]
        found = session.bench(*how)
        session.keep(f"train_{name}_{size}", found)
        if found.get("tokens_per_second", 0) <= best.get("tokens_per_second", 0):
            break
        best = found
    session.keep(f"train_{name}", best)


def train_in_torch(session: Session, model: Path, sizes: list[int]) -> None:
    """Step the same 124M in torch: SDPA, bfloat16, torch.compile, fused AdamW."""
    best: dict[str, Any] = {}
    for size in sizes:
        asked = dict(task="train", model=str(model), dtype="bfloat16", rows=size)
        more = dict(compile=True, device="cuda", repeats=10)
        if session.rehearse:
            more = dict(compile=False, device="cpu", repeats=1, length=128)
        side = str(Path(__file__).with_name("sides.py"))
        found = session.run([side, "transformers", json.dumps(asked | more)])
        if "seconds" in found:
            middle = sorted(found["seconds"])[len(found["seconds"]) // 2]
            found["tokens_per_second"] = size * more.get("length", 1024) / middle
        session.keep(f"torch_{size}", found)
        if found.get("tokens_per_second", 0) <= best.get("tokens_per_second", 0):
            break
        best = found
    ours = session.figures["train_gpt2_124m"].get("tokens_per_second")
    theirs = best.get("tokens_per_second")
    if ours and theirs:
        session.keep("train_vs_torch_compile", dict(ratio=ours / theirs))


def profile(folder: str, *arguments: str) -> None:
    """Record three steps, in a process of its own."""
    import jax

    from gpt2_jax import cli

    with jax.profiler.trace(folder):
        sys.exit(cli.run(["bench", "train", *arguments, "--repeats=3", "--json"]))


def main() -> None:
    """Measure everything that the minutes allow."""
    if sys.argv[1:2] == ["--profile"]:
        profile(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    session = Session(asked.out, asked.minutes, asked.rehearse)
    session.keep("about", cpu.about())
    sizes = {name: [1, 2] for name in FULL} if asked.rehearse else FULL
    compare_with_cpu(session)
    train(session, "gpt2_124m", sizes["gpt2_124m"])
    with tempfile.TemporaryDirectory() as folder:
        cpu.make_model(Path(folder), "tiny" if asked.rehearse else "124M")
        train_in_torch(session, Path(folder), sizes["gpt2_124m"])
    train(session, "gpt2_1558m", sizes["gpt2_1558m"])
    for rows in (1, 8, 64):
        tokens = ["--prompt-tokens=32", f"--new-tokens={64 if asked.rehearse else 256}"]
        how = ["generate", "gpt2_124m", f"--rows={rows}", *tokens]
        session.keep(f"decode_{rows}", session.bench(*how))
    best = session.figures["train_gpt2_124m"].get("batch", [1])[0]
    how = ["gpt2_124m", f"--sequences={best}", *(TINY if asked.rehearse else [])]
    recorded = session.run([__file__, "--profile", str(asked.out / "profile"), *how])
    session.keep("profile", recorded)


if __name__ == "__main__":
    main()
