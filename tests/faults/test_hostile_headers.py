"""Headers, indexes, manifests and configs altered at random: refused, or read right.

Whatever the bytes say, the answer is a `ConfigError` of one line or tensors that lie
in the file and are those that `safetensors` reads; it comes in milliseconds.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

SEED = 0
MOST_SECONDS = 2.0  # of one case; the median takes 0.1 ms
SAFE, INDEX, MANIFEST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "manifest.json",
)
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ALPHABET = b'0123456789[]{},":-.eE tfnu\\\x00\x7f\x80\xc3\xff'
NUMBERS = [
    0, 1, -1, 2, 7, 8, 2**31, 2**32, 2**53, 2**63, 2**64 - 1, 2**64, -(2**63), 10**40,
    10**4000, 0.0, 1.5, 1e400, float("nan"), True, None, "", "1", [], {},
]  # fmt: skip
WORDS = [
    "", ".", "..", "../w", "/etc/passwd", "C:\\w", "w\0", "w\n", "\x1b[2J", "\ud800",
    "F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "U128", "__metadata__", "dtype",
    "shape", "data_offsets", "w" * 1000, "größe", "a.safetensors", "file://w",
]  # fmt: skip
DEPTHS = [50, 600, 900, 950, 970, 980, 985, 990, 995, 1000, 5000]

Draw = random.Random


class Case(NamedTuple):
    """What one altered file came to."""

    kind: str  # refused or read
    fault: str  # what was wrong with the answer, if anything


def flip(data: bytes, draw: Draw) -> bytes:
    """Return the bytes with a few of them altered, inserted, dropped or doubled."""
    altered = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        i = draw.randrange(len(altered) + 1)
        match draw.randrange(5):
            case 0 if i < len(altered):
                altered[i] ^= 1 << draw.randrange(8)
            case 1 if i < len(altered):
                altered[i] = draw.choice(ALPHABET)
            case 2:
                altered[i:i] = bytes([draw.choice(ALPHABET)])
            case 3:
                del altered[i : i + draw.choice([1, 1, 3, 50])]
            case _:
                part = altered[i : i + draw.randrange(1, 60)]
                altered[i:i] = part
    return bytes(altered)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value inside of `value`."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    return [path] * bool(path) + [p for k, v in pairs for p in places(v, (*path, k))]


def nest(depth: int, draw: Draw) -> Any:
    value: Any = draw.choice([[], {}, 0])
    for _ in range(depth):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


def change(values: Any, draw: Draw) -> Any:
    """Return JSON values with one value or name replaced, moved, dropped or added."""
    path = draw.choice(places(values))
    *parents, last = path
    inner = values
    for part in parents:
        inner = inner[part]
    match draw.randrange(7):
        case 0:
            inner[last] = draw.choice(NUMBERS)
        case 1:
            inner[last] = draw.choice(WORDS)
        case 2 if isinstance(inner[last], int | float):
            inner[last] += draw.choice([-1, 1, 4, -4, 100, 10**9, -(10**9)])
        case 3:
            del inner[last]
        case 4 if isinstance(inner, dict):
            inner[draw.choice(WORDS)] = inner.pop(last)
        case 5:
            other = draw.choice(places(values))
            found = values
            for part in other:
                found = found[part]
            inner[last] = json.loads(json.dumps(found))
        case _:
            if isinstance(inner, dict):
                inner[draw.choice(WORDS)] = json.loads(json.dumps(inner[last]))
            else:
                inner.append(draw.choice(NUMBERS))
    return values


def write(values: Any, draw: Draw) -> bytes:
    """Return JSON as bytes, now and then with a name twice or nested deep."""
    text = json.dumps(values)
    chance = draw.random()
    if chance < 0.05 and text.startswith("{") and len(text) > 2:
        name = json.dumps(draw.choice(list(values) + WORDS[:1]))
        text = f"{{{name}: {draw.choice(['1', '{}', '[]'])}, {text[1:]}"
    elif chance < 0.08:
        depth = draw.choice(DEPTHS)
        deep = draw.choice(["[" * depth + "]" * depth, "[" * depth, '{"a":' * depth])
        spot = draw.choice(["0", "4", "32"])
        text = text.replace(spot, deep, 1)
    elif chance < 0.1:
        text = text.replace("4", "9" * draw.choice([30, 400, 5000]), 1)
    elif chance < 0.12:
        return text.encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"]))
    return text.encode()


def alter(text: bytes, draw: Draw) -> bytes:
    """Return JSON text altered as bytes or as values, once or a few times."""
    if draw.random() < 0.4:
        return flip(text, draw)
    values = json.loads(text)
    for _ in range(draw.choice([1, 1, 2, 3])):
        if places(values):
            values = change(values, draw)
    return write(values, draw)


def alter_weights(data: bytes, draw: Draw) -> bytes:
    """Return a safetensors file with header, length, data or all of it altered."""
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    match draw.randrange(10):
        case 0:
            return flip(data, draw)
        case 1:
            return data[: draw.randrange(len(data))]
        case 2:
            length = draw.choice([size - 1, size + 1, 0, 2**63, 2**64 - 1, len(data)])
            return length.to_bytes(8, "little") + data[8:]
        case 3:
            return data + bytes(draw.randrange(1, 9))
    text = alter(text, draw)
    if draw.random() < 0.2:
        text += b" " * draw.randrange(9)
    return len(text).to_bytes(8, "little") + text + rest


def good_weights() -> bytes:
    tensors = {
        "wte.weight": np.ones((4, 3), "<f4"),
        "h.0.ln_1.bias": np.arange(3, dtype="<f2"),
        "mask": np.ones((2, 2), "?"),
        "empty": np.ones((0, 2), "<f8"),
        "scalar": np.full((), 3, "<f4"),
    }
    return safetensors.numpy.save(tensors, metadata={"format": "pt"})


def read_weights(directory: Path, data: bytes) -> str:
    """Say what is wrong with what is read of a file that is not refused."""
    from gpt2_jax.weights import StoredTensor, open_tensors

    tensors = open_tensors(directory)
    for name, tensor in tensors.items():
        assert isinstance(tensor, StoredTensor)
        if tensor.offset < 10 or tensor.offset + tensor.nbytes > len(data):
            return f"{name!r} lies outside of the file"
    try:
        theirs = safetensors.numpy.load(data)
    except SafetensorError as error:
        return f"safetensors refuses it: {error}"
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""  # a dtype that it does not hand to numpy
    if tensors.keys() != theirs.keys():
        return f"names differ: {sorted(tensors)}, {sorted(theirs)}"
    for name, tensor in theirs.items():
        found = np.asarray(tensors[name])
        if found.shape != tensor.shape or found.tobytes() != tensor.tobytes():
            return f"{name!r} differs"
    return ""


def read_index(directory: Path, data: bytes) -> str:
    from gpt2_jax.weights import open_tensors

    tensors = open_tensors(directory)
    found = json.loads(data)["weight_map"]
    return "" if tensors.keys() == found.keys() else "other tensors than the index says"


def read_manifest(directory: Path, data: bytes) -> str:
    from gpt2_jax.data.shards import open_split, read_manifest

    splits = read_manifest(directory).splits
    for name, split in splits.items():
        for verify in (False, True):
            found = open_split(directory, name, n_vocab=257, verify=verify)
            if found.n_tokens != split.tokens:
                return f"{name} has {found.n_tokens} tokens"
        found.read(0, found.n_tokens)
    return ""


def read_config(directory: Path, data: bytes) -> str:
    from gpt2_jax.pretrained import read_hf_config

    config, eot = read_hf_config(directory)
    good = eot is None or 0 <= eot < config.n_vocab
    return "" if good else f"end of text is {eot}"


def read_tokenizer(directory: Path, data: bytes) -> str:
    from gpt2_jax.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    ids = tokenizer.encode("hello")
    good = tokenizer.decode(ids) == "hello" and max(ids) < tokenizer.n_vocab
    return "" if good else f"hello is {ids}"


def lay_out(kind: str, directory: Path) -> tuple[str, bytes]:
    """Write a good directory; return the file to alter and what it holds."""
    import hostile  # noqa: F401  its folder is where these modules are
    from test_hostile_checkpoints import make_good, shard

    from gpt2_jax.data.prepare import prepare
    from gpt2_jax.tokenizer import load_tokenizer

    if kind == "weights":
        directory.mkdir()
        (directory / SAFE).write_bytes(good_weights())
        return SAFE, good_weights()
    if kind == "manifest":
        text = directory.with_suffix(".txt")
        text.write_text("to be or not to be\n" * 40)
        tokenizer = load_tokenizer("bytes")
        quiet: Callable[[str], None] = lambda line: None  # noqa: E731
        prepare([str(text)], directory, tokenizer, shard_tokens=300, report=quiet)
        return MANIFEST, (directory / MANIFEST).read_bytes()
    make_good(directory)
    if kind == "index":
        shard()(directory)
    if kind == "tokenizer":
        (directory / "vocab.json").unlink()
    name = {"index": INDEX, "config": CONFIG, "tokenizer": TOKENIZER}[kind]
    return name, (directory / name).read_bytes()


READERS: dict[str, Callable[[Path, bytes], str]] = {
    "weights": read_weights,
    "index": read_index,
    "manifest": read_manifest,
    "config": read_config,
    "tokenizer": read_tokenizer,
}


def run_cases(kind: str, directory: Path, first: int, count: int) -> dict[str, int]:
    """Print every fault among the cases; return how many were refused and read."""
    from gpt2_jax.config import ConfigError

    name, good = lay_out(kind, directory)
    assert READERS[kind](directory, good) == ""  # imports what it needs
    counts = {"refused": 0, "read": 0}
    for case in range(first, first + count):
        draw = Draw(f"{SEED} {kind} {case}")
        data = (alter_weights if kind == "weights" else alter)(good, draw)
        (directory / name).unlink()  # file systems flush a file that is overwritten
        (directory / name).write_bytes(data)
        began = time.monotonic()
        try:
            fault, outcome = READERS[kind](directory, data), "read"
        except ConfigError as error:
            text, outcome = str(error), "refused"
            good_line = text.isprintable() and len(text) < 7000
            fault = (
                "" if good_line else f"message {text[:200]!r} of {len(text)} letters"
            )
        except BaseException as error:  # noqa: BLE001  what comes through is the finding
            fault, outcome = f"raised {error!r}"[:300], "read"
        counts[outcome] += 1
        seconds = time.monotonic() - began
        if not fault and seconds > MOST_SECONDS:
            fault = f"took {seconds:.1f} s"
        if fault:
            print(f"{kind} {case}: {fault}")
    return counts


def fuzz(kind: str, directory: Path, first: int, count: int) -> dict[str, int]:
    """Run the cases in a process without the tests' hook, as users have none."""
    command = [sys.executable, __file__, kind, str(directory), str(first), str(count)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    *faults, last = run.stdout.splitlines()
    assert not faults, "\n".join(faults[:20])
    return json.loads(last)


@pytest.mark.parametrize("kind", READERS)
def test_some_altered_files_are_refused_or_read_right(kind, tmp_path):
    counts = fuzz(kind, tmp_path / "in", 0, 500 if kind == "weights" else 100)
    assert counts["refused"] > counts["read"] > 0


@pytest.mark.faults
@pytest.mark.parametrize("first", range(0, 10_000, 5000))
def test_ten_thousand_altered_headers_are_refused_or_read_right(first, tmp_path):
    counts = fuzz("weights", tmp_path / "in", first, 5000)
    assert counts["refused"] > 3000 and counts["read"] > 100


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["index", "manifest", "config", "tokenizer"])
def test_two_thousand_altered_files_are_refused_or_read_right(kind, tmp_path):
    counts = fuzz(kind, tmp_path / "in", 0, 2000)
    assert counts["refused"] > 500 and counts["read"] > 10


if __name__ == "__main__":
    kind, directory, first, count = sys.argv[1:]
    print(json.dumps(run_cases(kind, Path(directory), int(first), int(count))))
