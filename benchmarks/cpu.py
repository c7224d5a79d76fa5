"""Ours beside its peers on a CPU: training steps and greedy decoding of GPT-2.

    pip install -e ".[peers,offline]"
    python benchmarks/cpu.py [TASK ..] [--rounds 3] [--json FILE] [--size tiny]

Every side reads the same random weights and the same tokens, in a process of its own;
the sides alternate, round after round. A ratio is ours over theirs in tokens a second,
the median over rounds, with its range. Peers run in their default environment, and
where it says "huge pages" under the setting that `gpt2-jax` gives itself.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HUGE_PAGES = "glibc.malloc.hugetlb=1"
STD = 0.03  # of weights: wide enough that greedy choices are decided
SIZES: dict[str, dict[str, Any]] = {
    "124M": dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024),
    "tiny": dict(n_layer=2, n_head=2, n_embd=32, n_positions=1024),  # a rehearsal
}


@dataclass(frozen=True)
class Side:
    """A program, in one environment."""

    key: str  # of the JSON
    name: str
    program: str = "ours"
    dtype: str = "float32"
    huge: bool = False
    compile: bool = False


OURS = Side("ours", "gpt2_jax float32", huge=True)
OURS_BF16 = Side("ours", "gpt2_jax bfloat16", dtype="bfloat16", huge=True)
OURS_INT8 = Side("ours", "gpt2_jax int8", dtype="int8", huge=True)
TORCH = Side("torch_fp32", "transformers float32", "transformers")
TORCH_HUGE = dataclasses.replace(
    TORCH, key="torch_fp32_huge_pages", name=f"{TORCH.name}, huge pages", huge=True
)
BF16 = Side("torch_bf16", "transformers bfloat16", "transformers", "bfloat16")
BF16_HUGE = dataclasses.replace(
    BF16, key="torch_bf16_huge_pages", name=f"{BF16.name}, huge pages", huge=True
)
COMPILED = Side(
    "torch_compile", "transformers float32, torch.compile", "transformers", compile=True
)
KERAS = Side("keras_hub", "keras-hub float32 on JAX", "keras_hub")
CT2 = Side("ct2_fp32", "CTranslate2 float32", "ctranslate2")
CT2_HUGE = dataclasses.replace(
    CT2, key="ct2_fp32_huge_pages", name=f"{CT2.name}, huge pages", huge=True
)
CT2_INT8 = Side("ct2_int8", "CTranslate2 int8", "ctranslate2", "int8")
CT2_INT8_HUGE = dataclasses.replace(
    CT2_INT8, key="ct2_int8_huge_pages", name=f"{CT2_INT8.name}, huge pages", huge=True
)
TRAIN = [OURS, TORCH, TORCH_HUGE, BF16, BF16_HUGE]
DECODE = [OURS, TORCH, CT2, CT2_HUGE]
INT8 = [OURS_INT8, CT2_INT8, CT2_INT8_HUGE]
TASKS: dict[str, tuple[list[Side], dict[str, Any]]] = {
    "train": (TRAIN, {}),
    "train_bf16": ([OURS_BF16, BF16, BF16_HUGE], {}),
    "train_others": ([OURS, COMPILED, KERAS], {}),
    "decode": ([*DECODE, BF16, CT2_INT8], {}),
    "decode_int8": (INT8, {}),
    "decode_int8_batch_8": (INT8, dict(rows=8)),
    "decode_others": ([OURS, KERAS], {}),
    "decode_batch_8": (DECODE, dict(rows=8)),
    "decode_prompt_512": (DECODE, dict(prompt_tokens=512)),
}


def make_model(folder: Path, size: str) -> None:
    """Save random weights, with GPT-2's vocabulary, for every side to read."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2_jax.tokenizer import load_tokenizer, tokenizer_files

    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(**SIZES[size]))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(float(is_scale), STD)
    network.save_pretrained(folder)
    for name, text in tokenizer_files(load_tokenizer("gpt2"), 1024).items():
        (folder / name).write_text(text, encoding="utf-8")


def convert_for_ctranslate2(folder: Path) -> None:
    """Write the model as CTranslate2 reads it, in float32 and int8."""
    from ctranslate2.converters import TransformersConverter

    for dtype in ("float32", "int8"):
        converter = TransformersConverter(str(folder))
        converter.convert(f"{folder}/ct2_{dtype}", quantization=dtype)


def run(side: Side, task: str, how: dict[str, Any], model: Path) -> dict[str, Any]:
    """Return what one side printed."""
    asked = dict(
        task="train" if task.startswith("train") else "decode",
        model=str(model),
        dtype=side.dtype,
        compile=side.compile,
        **how,
    )
    program = Path(__file__).with_name("sides.py")
    done = subprocess.run(
        [sys.executable, str(program), side.program, json.dumps(asked)],
        env=os.environ | {"GLIBC_TUNABLES": HUGE_PAGES if side.huge else ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(
    task: str, model: Path, rounds: int, repeats: int, keys: list[str] | None
) -> dict[str, Any]:
    """Run all sides of a task `rounds` times, alternating; print and return figures."""
    sides, how = TASKS[task]
    sides = [side for side in sides if side.key in (keys or [side.key])]
    found: dict[str, list[dict[str, Any]]] = {side.key: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            one = run(side, task, how | dict(repeats=repeats), model)
            found[side.key].append(one)
            middle = statistics.median(one["seconds"])
            print(f"  {task} {number + 1}: {side.name} {middle:.3f} s", file=sys.stderr)
    rows = how.get("rows", 1)
    count = rows * (1024 if task.startswith("train") else 128)
    rates = {
        key: [count / statistics.median(one["seconds"]) for one in runs]
        for key, runs in found.items()
    }
    lines = {}
    for side in sides:
        pairs = zip(rates["ours"], rates[side.key], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        lines[side.key] = dict(
            name=side.name,
            tokens_per_second=_spread(rates[side.key]),
            ratio=_spread(ratios),
            peak_bytes=max(one["peak_bytes"] for one in found[side.key]),
            differs=_differs(found["ours"][0], found[side.key][0]),
        )
        first = [one["first_seconds"] for one in found[side.key]]
        if None not in first:
            lines[side.key]["first_seconds"] = statistics.median(first)
    print_table(task, lines)
    return lines


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def _differs(ours: dict[str, Any], theirs: dict[str, Any]) -> float | None:
    """Return the largest difference of losses, or the number of other tokens."""
    mine, others = np.array(ours["results"]), np.array(theirs["results"])
    if not others.size:
        return None  # it has other weights
    if mine.ndim == 1:
        return float(np.max(np.abs(mine - others[: len(mine)])))
    return int(np.sum(mine[0] != others[0]))


def print_table(task: str, lines: dict[str, Any]) -> None:
    """Print one task as a table in Markdown."""
    what = "losses differ by" if task.startswith("train") else "tokens that differ"
    print(f"\n{task}\n\n| | tokens/s | ours / theirs | peak GB | {what} |")
    print("|---|---|---|---|---|")
    for line in lines.values():
        rate, ratio = line["tokens_per_second"], line["ratio"]
        differs = "" if line["differs"] is None else f"{line['differs']:.2g}"
        print(
            f"| {line['name']} | {rate[0]:.1f} ({rate[1]:.1f} to {rate[2]:.1f}) | "
            f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) | "
            f"{line['peak_bytes'] / 1e9:.2f} | {differs} |",
            flush=True,
        )


def ratios(tables: dict[str, Any]) -> dict[str, Any]:
    """Return each peer's ratio as `train_vs_torch_fp32`, with both sides' rates."""
    found = {}
    for task, lines in tables.items():
        for key, line in lines.items():
            other = key.replace("torch", "transformers") if "decode" in task else key
            found[f"{task}_vs_{other}"] = dict(
                ratio=line["ratio"],
                ours=lines["ours"]["tokens_per_second"],
                theirs=line["tokens_per_second"],
            )
    return {name: value for name, value in found.items() if not name.endswith("_ours")}


def about() -> dict[str, Any]:
    """Return the machine and the versions."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "flags"))
    ]
    packages = ("jax", "torch", "transformers", "ctranslate2", "keras-hub")
    return dict(
        cpu=cpu[0],
        avx512="avx512f" in cpu[1].split(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        versions={name: _version(name) for name in packages},
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Compare and print tables, ratios, and JSON where it is asked for."""
    if sys.argv[1:2] == ["--make"]:
        make_model(Path(sys.argv[2]), sys.argv[3])
        convert_for_ctranslate2(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="*", help="keys of sides, ours among them")
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(json.dumps(about()))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        # In a process of its own: a child inherits its parent's peak of memory.
        command = [sys.executable, __file__, "--make", folder, asked.size]
        subprocess.run(command, check=True)
        how = model, asked.rounds, asked.repeats, asked.sides
        tables = {task: compare(task, *how) for task in asked.tasks or TASKS}
    if asked.json:
        values = dict(about=about(), ratios=ratios(tables), tables=tables)
        asked.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
