"""Token shards, manifests and texts of every kind of damage, through train and prepare.

Each is refused in one line before anything is compiled; nothing stays on the disk and
little memory is taken.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hostile import Outcome, check_refused, choose, run_all

from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizer import load_tokenizer

MANIFEST, TRAIN, VAL = "manifest.json", "train_00000.bin", "val_00000.bin"
TINY = [
    "--model.n-ctx=16",
    "--model.n-embd=16",
    "--model.n-layer=1",
    "--model.n-head=2",
    "--train.batch-tokens=128",
    "--train.steps=4",
    "--optimizer.warmup-steps=1",
]
TOKENS = np.arange(400, dtype="<u2") % 257

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """The files of a good directory of shards."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "text.txt").write_text("to be or not to be\n" * 40)
    prepare(
        [str(folder / "text.txt")],
        folder / "shards",
        load_tokenizer("bytes"),
        shard_tokens=300,
        report=lambda line: None,
    )
    return {p.name: p.read_bytes() for p in (folder / "shards").iterdir()}


def manifest(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Return what lets `change` loose on the manifest."""

    def damage(place: Path) -> None:
        path = place / "in" / MANIFEST
        values = json.loads(path.read_text())
        path.write_text(json.dumps(change(values) or values))

    return damage


def shard(**changes: Any) -> Damage:
    return manifest(lambda m: m["splits"]["train"]["shards"][0].update(changes))


def split(**changes: Any) -> Damage:
    return manifest(lambda m: m["splits"]["train"].update(changes))


def text(data: str | bytes) -> Damage:
    data = data if isinstance(data, bytes) else data.encode()
    return lambda place: (place / "in" / MANIFEST).write_bytes(data)


def flip(name: str, bit: int) -> Damage:
    def damage(place: Path) -> None:
        data = bytearray((place / "in" / name).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        (place / "in" / name).write_bytes(data)

    return damage


def alien(place: Path) -> None:
    """Put an id beyond the vocabulary into a shard, and its sha256 where it belongs."""
    path = place / "in" / TRAIN
    tokens = np.fromfile(path, "<u2")
    tokens[7] = 257
    tokens.tofile(path)
    shard(sha256=hashlib.sha256(path.read_bytes()).hexdigest())(place)


def link(name: str) -> Damage:
    def damage(place: Path) -> None:
        (place / "in" / name).rename(place / "elsewhere")
        (place / "in" / name).symlink_to("../elsewhere")

    return damage


def rename(old: str, new: str) -> Damage:
    return lambda place: (place / "in" / old).rename(place / "in" / new)


def grow(name: str, size: int) -> Damage:
    """Return what makes a file `size` bytes long, without a byte of disk."""
    return lambda place: os.truncate(place / "in" / name, size)


def unfinished(place: Path) -> None:
    rename(MANIFEST, "progress.json")(place)


def no_shards(place: Path) -> None:
    for path in (place / "in").iterdir():
        path.unlink()


def bins(train: bytes, val: bytes | None = TOKENS.tobytes()) -> Damage:
    """Return what puts nanoGPT's or llm.c's files in the place of the shards."""

    def damage(place: Path) -> None:
        no_shards(place)
        (place / "in" / "train.bin").write_bytes(train)
        if val is not None:
            (place / "in" / "val.bin").write_bytes(val)

    return damage


def llm_c(magic=20240520, version=1, count=len(TOKENS), tokens=TOKENS) -> bytes:
    words = np.zeros(256, "<i4")
    words[:3] = magic, version, count
    return words.tobytes() + tokens.tobytes()


def source(name: str, data: bytes) -> Damage:
    """Return what puts one file of text in the place of the shards."""

    def damage(place: Path) -> None:
        no_shards(place)
        (place / "in" / name).write_bytes(data)

    return damage


def lines(*records: str | bytes) -> Damage:
    parts = [r if isinstance(r, bytes) else r.encode() for r in records]
    return source("a.jsonl", b"\n".join(parts))


def bomb(name: str, start: bytes, byte: bytes) -> Damage:
    """Return what packs 128 MB of one byte into a file."""

    def damage(place: Path) -> None:
        no_shards(place)
        kind = zstandard.open if name.endswith(".zst") else gzip.open
        with kind(place / "in" / name, "wb") as file:
            file.write(start)
            for _ in range(8):
                file.write(byte * 2**24)

    return damage


GOOD = gzip.compress(b"to be or not to be\n" * 400, mtime=0)
ZST = zstandard.compress(b"to be or not to be\n" * 400)
WORD = '{"text": "to be"}'
SHARDS: dict[str, tuple[Damage, str]] = {
    # DA2 to DA5: the files.
    "bit flipped in train": (flip(TRAIN, 37), f"{TRAIN} has sha256"),
    "bit flipped in val": (flip(VAL, 16), f"{VAL} has sha256"),
    "top bit flipped": (flip(TRAIN, 15), f"{TRAIN} has sha256"),
    "shard cut": (grow(TRAIN, 599), f"{TRAIN} has 599 bytes; 300 tokens take 600"),
    "shard of no bytes": (grow(TRAIN, 0), f"{TRAIN} has 0 bytes"),
    "shard grown": (grow(TRAIN, 602), f"{TRAIN} has 602 bytes"),
    "shard of 5 GB": (grow(TRAIN, 5 * 10**9), f"{TRAIN} has 5000000000 bytes"),
    "shard deleted": (lambda p: (p / "in" / TRAIN).unlink(), f"{TRAIN} is missing"),
    "shard renamed": (rename(TRAIN, "train_00009.bin"), f"{TRAIN} is missing"),
    "shards exchanged": (
        lambda p: (p / "in" / TRAIN).write_bytes(
            (p / "in" / "train_00001.bin").read_bytes()
        ),
        f"{TRAIN} has sha256",
    ),
    "shard of uint32": (
        lambda p: TOKENS[:150].astype("<u4").tofile(p / "in" / TRAIN),
        f"{TRAIN} holds uint32",
    ),
    "shard linked from elsewhere": (link(TRAIN), f"{TRAIN} is a link to"),
    "shard a directory": (
        lambda p: [(p / "in" / TRAIN).unlink(), (p / "in" / TRAIN).mkdir()],
        f"{TRAIN} is missing",
    ),
    "id beyond the vocabulary": (alien, f"{TRAIN} at token 7 holds id 257"),
    "unfinished": (unfinished, "is unfinished; run the same prepare again"),
    # The manifest.
    "manifest of nothing": (text(b""), "is malformed (JSONDecodeError"),
    "manifest cut": (grow(MANIFEST, 200), "is malformed"),
    "manifest not UTF-8": (text(b'{"version": "\xff"}'), "is malformed"),
    "manifest a list": (text("[]"), "is malformed"),
    "manifest 100,000 deep": (text("[" * 10**5), "is malformed (RecursionError"),
    "manifest of 1 GB": (grow(MANIFEST, 10**9), "1000000000 bytes"),
    "manifest of a huge number": (text('{"version": ' + "9" * 5000), "is malformed"),
    "manifest of infinity": (text('{"version": 1e400}'), "version is inf"),
    "manifest with a key twice": (text('{"version": 1, "version": 1}'), "twice"),
    "version of the future": (manifest(lambda m: m.update(version=2)), "has version 2"),
    "version as text": (manifest(lambda m: m.update(version="1")), "version is '1'"),
    "no splits": (manifest(lambda m: m.pop("splits") and None), "KeyError: 'splits'"),
    "splits a list": (manifest(lambda m: m.update(splits=[])), "is malformed"),
    "only train": (
        manifest(lambda m: m["splits"].pop("val") and None),
        "no split 'val'",
    ),
    "split of a strange name": (
        manifest(lambda m: m["splits"].update({"a\nb": m["splits"].pop("val")})),
        "a split is called 'a\\nb'",
    ),
    "split without shards": (split(shards=[], tokens=0), "tokens is 0"),
    "shards a number": (split(shards=3), "is malformed"),
    "tokens not the sum": (split(tokens=1), "1 tokens are not the sum over shards"),
    "documents negative": (split(documents=-1), "documents is -1"),
    "tokens negative": (shard(tokens=-300), "tokens is -300"),
    "tokens a float": (shard(tokens=300.0), "tokens is 300.0"),
    "tokens true": (shard(tokens=True), "tokens is True"),
    "tokens huge": (shard(tokens=10**4000), "tokens is an integer of"),
    "file that climbs": (shard(file="../x"), "file is '../x'"),
    "file of an absolute path": (shard(file="/etc/passwd"), "file is '/etc/passwd'"),
    "file of dots": (shard(file=".."), "file is '..'"),
    "file with NUL": (shard(file="a\0b"), "file is 'a\\x00b'"),
    "file a number": (shard(file=3), "file is 3"),
    "file of 256 letters": (shard(file="w" * 256), "file is 'www"),
    "file a long name": (shard(file="/" * 10**6), "file is '///"),
    "file twice": (shard(file="train_00001.bin"), "train_00001.bin twice"),
    "sha256 of another file": (shard(sha256="0" * 64), f"{TRAIN} has sha256"),
    "sha256 no sha256": (shard(sha256="x"), "sha256 is 'x'"),
    "train is val": (
        manifest(lambda m: m["splits"].update(val=m["splits"]["train"])),
        "allowed: splits apart",
    ),
    "vocabulary negative": (manifest(lambda m: m.update(n_vocab=-1)), "n_vocab is -1"),
    "vocabulary larger": (
        manifest(lambda m: m.update(n_vocab=258)),
        "at most model.n_",
    ),
    # TK6.
    "another tokenizer": (
        manifest(lambda m: m.update(fingerprint="0" * 64)),
        "tokenizer of the shards is 'bytes' (000000000000)",
    ),
    "tokenizer of another name": (
        manifest(lambda m: m.update(tokenizer="a\nb" + "c" * 10**5)),
        "tokenizer of the shards is 'a\\nbccc",
    ),
    # nanoGPT's and llm.c's files.
    "bin of odd length": (bins(TOKENS.tobytes()[:-1]), "odd length 799"),
    "bin of no bytes": (bins(b""), "holds no tokens"),
    "bin of uint32": (bins(TOKENS.astype("<u4").tobytes()), "holds uint32"),
    "bin of uint32 as val": (
        bins(TOKENS.tobytes(), TOKENS.astype("<u4").tobytes()),
        "val.bin holds uint32",
    ),
    "bin of another endian": (bins(TOKENS.astype(">u2").tobytes()), "at token 2 holds"),
    "bin with an id too large": (
        bins(TOKENS.tobytes(), np.array([1, 2, 65535], "<u2").tobytes()),
        "val.bin at token 2 holds id 65535; allowed: 0 <= id < 257",
    ),
    "bin without val": (bins(TOKENS.tobytes(), None), "holds only a train split"),
    "bin too short": (bins(TOKENS[:9].tobytes()), "model.n_ctx + 1 = 17"),
    "llm.c of another version": (bins(llm_c(version=2)), "llm.c version 2; allowed: 1"),
    "llm.c of Llama": (bins(llm_c(magic=20240801)), "Llama 3 tokens in uint32"),
    "llm.c of another magic": (bins(llm_c(magic=20240521)), "holds id"),
    "llm.c of another count": (bins(llm_c(count=401)), "401 tokens take 1826"),
    "llm.c of a negative count": (bins(llm_c(count=-1)), "-1 tokens take 1022"),
    "llm.c of no tokens": (bins(llm_c(count=0, tokens=TOKENS[:0])), "holds no tokens"),
    "llm.c cut in its header": (bins(llm_c()[:700]), "holds id"),
}
TEXTS: dict[str, tuple[Damage, str]] = {
    "no text": (no_shards, "is empty; allowed: files with text"),
    "not UTF-8": (source("a.txt", b"ab\xff" * 99), "not UTF-8 at byte 2"),
    "UTF-16": (source("a.txt", "to be".encode("utf-16")), "not UTF-8 at byte 0"),
    "cut in a character": (source("a.txt", "ä".encode()[:1]), "not UTF-8 at byte 0"),
    "NUL": (source("a.txt", b"ab\0" * 99), "NUL at byte 2"),
    "a name of two lines": (source("a\n\x1b[2Jb.txt", b"\xff"), "a\\n\\x1b[2Jb.txt"),
    "too little": (source("a.txt", b"a"), "at least 2 tokens"),
    "gzip cut": (source("a.txt.gz", GOOD[:-9]), "cannot be unpacked"),
    "gzip altered": (source("a.txt.gz", GOOD[:30] + b"\xff" + GOOD[31:]), "unpacked"),
    "gzip of another kind": (source("a.txt.gz", b"to be"), "cannot be unpacked"),
    "gzip bomb": (bomb("a.txt.gz", b"", b"\0"), "NUL at byte 0"),
    "gzip bomb of a line": (bomb("a.jsonl.gz", b'{"text": "', b"a"), "is too long"),
    "gzip bomb of brackets": (bomb("a.jsonl.gz", b"", b"["), "is too long"),
    "zstd cut": (source("a.txt.zst", ZST[:-3]), "cannot be unpacked"),
    "zstd altered": (source("a.txt.zst", b"\0" + ZST[1:]), "cannot be unpacked"),
    "zstd bomb": (bomb("a.txt.zst", b"", b"\0"), "NUL at byte 0"),
    "zstd bomb late": (bomb("a.txt.zst", b"a" * 2**20, b"\0"), "NUL at byte 1048576"),
    "zstd bomb of a line": (bomb("a.jsonl.zst", b'{"text": "', b"a"), "is too long"),
    "line of no JSON": (lines(WORD, "{"), "line 2 is malformed"),
    "line not UTF-8": (lines(WORD, b'{"text": "\xff"}'), "line 2 is malformed"),
    "line of a list": (lines(WORD, '["to be"]'), "line 2 is a list"),
    "line without the field": (lines(WORD, '{"body": "x"}'), "field 'text' is missing"),
    "line of a number": (lines(WORD, '{"text": 3}'), "field 'text' is int"),
    "line with half a character": (lines(WORD, '{"text": "\\ud800"}'), "valid Unicode"),
    "line 100,000 deep": (lines(WORD, "[" * 10**5), "line 2 is malformed"),
    "line of a huge number": (lines(WORD, '{"a": ' + "9" * 5000 + "}"), "malformed"),
}


def lay_out(name: str, damage: Damage, root: Path, shards: dict[str, bytes]) -> Path:
    place = root / name.replace(" ", "_")
    (place / "in").mkdir(parents=True)
    (place / "run").mkdir()  # else the run makes it before it looks at its data
    for file, data in shards.items():
        (place / "in" / file).write_bytes(data)
    damage(place)
    return place


@pytest.fixture(scope="module")
def outcomes(request, shards, tmp_path_factory) -> dict[tuple[str, str], Outcome]:
    """All damages, one after the other in one process."""
    root = tmp_path_factory.mktemp("shards")
    train = ["train", "shakespeare", "--data.source", "in", "--run-dir", "run", *TINY]
    prepare = ["prepare", "in", "--out", "out", "--tokenizer", "bytes"]
    both = SHARDS | TEXTS
    chosen = choose(request, both)
    places = {name: lay_out(name, both[name][0], root, shards) for name in chosen}
    requests = {("train", name): (places[name], train) for name in chosen}
    texts = [name for name in chosen if name in TEXTS]
    requests |= {("prepare", name): (places[name], prepare) for name in texts}
    found = run_all(root / "home", list(requests.values()))
    return dict(zip(requests, found, strict=True))


@pytest.mark.parametrize("name", SHARDS | TEXTS)
def test_training_refuses_hostile_data(name, outcomes):
    check_refused(outcomes["train", name], (SHARDS | TEXTS)[name][1])


@pytest.mark.parametrize("name", TEXTS)
def test_preparing_refuses_hostile_text(name, outcomes):
    check_refused(outcomes["prepare", name], TEXTS[name][1])


PROGRAM = """
from pathlib import Path
from gpt2_jax.config import DataConfig
from gpt2_jax.data.dataset import open_dataset
from gpt2_jax.tokenizer import load_tokenizer
config = DataConfig(source=("in",), tokenizer="bytes")
found = open_dataset(config, load_tokenizer("bytes"), Path("cache"), print)
print(found.train.n_tokens + found.val.n_tokens)
"""


def test_a_file_that_no_manifest_names_is_not_read(shards, tmp_path):
    place = lay_out("extra", lambda place: None, tmp_path, shards)
    (place / "in" / "train_00009.bin").write_bytes(b"x")
    (place / "in" / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")  # kills who opens it
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=place, capture_output=True, text=True
    )
    splits = json.loads(shards[MANIFEST])["splits"].values()
    assert int(run.stdout) == sum(split["tokens"] for split in splits), run.stderr
