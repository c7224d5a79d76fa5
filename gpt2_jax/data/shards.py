"""Token shards on disk: the format, its manifest, and other people's `.bin` files.

A directory made by `prepare` holds raw little-endian uint16 files, every one but a
split's last `shard_tokens` long, and `manifest.json`, written last:

    train_00000.bin train_00001.bin val_00000.bin manifest.json

A directory without a manifest is unfinished or not ours. nanoGPT's headless uint16
files and llm.c's files with a header of 256 int32 open as well.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt16

from gpt2_jax.config import ConfigError, spell

VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
TOKEN = np.dtype("<u2")

HEADER_BYTES = 256 * 4  # karpathy/llm.c dev/data/data_common.py, write_datafile
HEADER_MAGIC = 20240520  # same file: GPT-2 tokens, uint16
HEADER_MAGIC_LLAMA = 20240801  # same file: Llama 3 tokens, uint32
PROBED_TOKENS = 2**20  # of each file, looked at for uint32
BLOCK_BYTES = 2**20  # of a file that is hashed, read at once
MANIFEST_BYTES = 2_000_000  # 10,000 shards; 25 times as much in memory at most
NAME = re.compile(r"(?!.{256})\w+([.-]\w+)*", re.ASCII)  # of a split or a shard
HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One file of a split."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split: how much it holds and where."""

    tokens: int
    documents: int
    bytes: int  # of its text in UTF-8, <|endoftext|> not counted
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a directory of shards holds and how it was made."""

    version: int
    tokenizer: str
    fingerprint: str  # of the tokenizer
    n_vocab: int
    source: tuple[str, ...]
    settings: dict[str, Any]
    splits: dict[str, SplitManifest]

    @property
    def digest(self) -> str:
        """Return a sha256 over all that fixes the tokens, not where they came from."""
        shards = {
            name: [(s.tokens, s.sha256) for s in split.shards]
            for name, split in self.splits.items()
        }
        fixed = json.dumps([self.fingerprint, shards], sort_keys=True)
        return hashlib.sha256(fixed.encode()).hexdigest()

    def check_tokenizer(self, name: str, fingerprint: str) -> None:
        """Raise `ConfigError` unless this tokenizer made the shards."""
        if (self.tokenizer, self.fingerprint) != (name, fingerprint):
            found = f"{spell(self.tokenizer)} ({self.fingerprint[:12]})"
            wanted = f"{name!r} ({fingerprint[:12]})"
            raise ConfigError(
                f"tokenizer of the shards is {found}; allowed: data.tokenizer = "
                f"{wanted}; prepare the source again or set --data.tokenizer"
            )


@dataclass(frozen=True)
class _File:
    path: Path
    tokens: int
    skipped_bytes: int = 0  # of a header

    @property
    def size(self) -> int:
        return self.skipped_bytes + self.tokens * TOKEN.itemsize


class TokenShards:
    """One split, memory-mapped, seen as one long array. It pickles without its maps."""

    def __init__(self, files: Sequence[_File], n_vocab: int):
        self.n_vocab = n_vocab
        self._files = tuple(files)
        self._starts = np.cumsum([0] + [file.tokens for file in files])
        self.n_tokens = int(self._starts[-1])
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, start: int, count: int) -> Int32[np.ndarray, " count"]:
        """Return `count` tokens from `start` on, across borders of shards.

        Raises
        ------
        ValueError
            If the range leaves the split.
        ConfigError
            If a token lies beyond the vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise ValueError(f"tokens {start} + {count} leave 0..{self.n_tokens}")
        tokens = np.empty(count, np.int32)
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            first = start + done - int(self._starts[index])
            part = self._map(index)[first : first + count - done]
            fault = _find_alien(part, self._files[index].path, first, self.n_vocab)
            if fault:
                raise ConfigError(fault)
            tokens[done : done + len(part)] = part
            done += len(part)
            index += 1
        return tokens

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            file = self._files[index]
            skipped, shape = file.skipped_bytes, (file.tokens,)
            self._maps[index] = np.memmap(file.path, TOKEN, "r", skipped, shape)
        return self._maps[index]


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a directory made by `prepare`.

    Raises
    ------
    ConfigError
        If it is missing, malformed, of a newer version, or shares a shard between
        splits.
    """
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = (directory / PROGRESS).is_file()
        why = "prepare did not finish: run it again" if unfinished else "run prepare"
        raise ConfigError(f"{directory} holds no {MANIFEST}; {why}")
    size = path.stat().st_size
    if size > MANIFEST_BYTES:
        wrong = f"{path} has {size} bytes; allowed: at most {MANIFEST_BYTES}"
        raise ConfigError(f"{wrong}; prepare the source again")
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_distinct)
        version = _whole(values, "version", 0)
        manifest = _parse(values) if version == VERSION else None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        wrong = f"{path} is malformed ({type(error).__name__}: {error})"
        raise ConfigError(f"{wrong}; prepare the source again") from None
    if manifest is None:
        allowed = f"{VERSION}; update gpt2_jax or prepare the source again"
        raise ConfigError(f"{path} has version {version}; allowed: {allowed}")
    _check_apart(manifest, path)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all."""
    write_json(directory / MANIFEST, dataclasses.asdict(manifest))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file; a reader finds the old one or the new one whole."""
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def open_split(
    directory: Path, split: str, *, n_vocab: int, verify: bool
) -> TokenShards:
    """Return a split of a directory made by `prepare`, its sizes checked.

    With `verify` every shard is read once and compared with its sha256.

    Raises
    ------
    ConfigError
        If manifest and shards disagree, a shard is a link that leads out, or ids exceed
        `n_vocab`, the model's.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        known = ", ".join(manifest.splits)
        raise ConfigError(f"{directory} has no split {split!r}; allowed: {known}")
    if manifest.n_vocab > n_vocab:
        raise ConfigError(
            f"{directory} was made by tokenizer {manifest.tokenizer!r} of "
            f"{manifest.n_vocab} tokens; allowed: at most model.n_vocab = {n_vocab}"
        )
    shards = manifest.splits[split].shards
    files = [_File(directory / shard.file, shard.tokens) for shard in shards]
    for file in files:
        _check_inside(file.path)
        _check_file(file)
    if verify:
        _digest_all(files, n_vocab, wanted=[shard.sha256 for shard in shards])
    return TokenShards(files, n_vocab)


def find_bin_shards(path: Path) -> dict[str, tuple[Path, ...]]:
    """Return split -> files for a nanoGPT or llm.c folder, or one `.bin` file.

    A folder holds `train.bin` and `val.bin`, or `*_train_*.bin` and `*_val_*.bin`;
    a single file is the train split. A split without files is left out, so the
    answer is empty where there are none. `meta.pkl` is never opened.

    Raises
    ------
    ConfigError
        If the folder is an unfinished one of `prepare`.
    """
    if path.is_file():
        return {"train": (path,)} if path.suffix == ".bin" else {}
    if (path / PROGRESS).is_file():
        raise ConfigError(f"{path} is unfinished; run the same prepare again")
    found = {
        split: tuple(
            sorted([*path.glob(f"{split}.bin"), *path.glob(f"*_{split}_*.bin")])
        )
        for split in ("train", "val")
    }
    return {split: files for split, files in found.items() if files}


def open_bin(files: Sequence[Path], *, n_vocab: int) -> TokenShards:
    """Return nanoGPT's or llm.c's files as one split.

    Raises
    ------
    ConfigError
        If a file is empty, cut short, of odd length, or of another type than uint16.
    """
    opened = [_read_header(path) for path in files]
    for file in opened:
        _check_file(file)
    return TokenShards(opened, n_vocab)


def digest_bin(files: Sequence[Path], *, n_vocab: int) -> str:
    """Return a sha256 over the contents of nanoGPT's or llm.c's files, in order.

    Raises
    ------
    ConfigError
        If an id in them is not below `n_vocab`.
    """
    digests = _digest_all([_read_header(path) for path in files], n_vocab)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Appends tokens to a split, in shards of one length.

    The number of tokens alone says where the next one goes, so a writer made for
    `tokens` continues a split that was cut off, and drops what lies behind.

    Raises
    ------
    ConfigError
        If the directory holds less than `tokens`.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int, tokens: int = 0):
        self.tokens = tokens
        self._directory, self._split = directory, split
        self._shard_tokens = shard_tokens
        self._unsynced: set[Path] = set()
        kept = self._layout()
        for path in directory.glob(f"{split}_*.bin"):
            if path not in kept:
                path.unlink()
        for path, count in kept.items():
            size = count * TOKEN.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise ConfigError(f"{path} lost tokens; delete {directory} and restart")
            os.truncate(path, size)

    def write(self, tokens: UInt16[np.ndarray, " n"]) -> None:
        """Append tokens, starting new shards where one is full."""
        while tokens.size:
            index, used = divmod(self.tokens, self._shard_tokens)
            room = self._shard_tokens - used
            part, tokens = tokens[:room], tokens[room:]
            with self._path(index).open("ab") as file:
                file.write(part.astype(TOKEN).tobytes())
            self._unsynced.add(self._path(index))
            self.tokens += part.size

    def sync(self) -> None:
        """Return when everything written lies on the disk."""
        for path in self._unsynced:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def finish(self) -> tuple[Shard, ...]:
        """Return all shards with their checksums, once they lie on the disk."""
        self.sync()
        layout = self._layout()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(sha256, layout))
        shards = zip(layout.items(), digests, strict=True)
        return tuple(
            Shard(path.name, count, digest) for (path, count), digest in shards
        )

    def _path(self, index: int) -> Path:
        return self._directory / f"{self._split}_{index:05d}.bin"

    def _layout(self) -> dict[Path, int]:
        starts = range(0, self.tokens, self._shard_tokens)
        return {
            self._path(i): min(self._shard_tokens, self.tokens - start)
            for i, start in enumerate(starts)
        }


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an entry stands there twice")
    return values


def _whole(values: dict[str, Any], name: str, least: int) -> int:
    value = values[name]
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{name} is {spell(value)}; allowed: an integer >= {least}")
    return value


def _text(
    values: dict[str, Any], name: str, form: re.Pattern[str] | None = None
) -> str:
    value = values[name]
    good = isinstance(value, str) and (form is None or form.fullmatch(value))
    if not good:
        allowed = "text" if form is None else f"text like {form.pattern}"
        raise ValueError(f"{name} is {spell(value)}; allowed: {allowed}")
    return value


def _parse(values: dict[str, Any]) -> Manifest:
    splits = {name: _parse_split(split) for name, split in values["splits"].items()}
    if strange := [name for name in splits if not NAME.fullmatch(name)]:
        raise ValueError(f"a split is called {spell(strange[0])}")
    return Manifest(
        version=VERSION,
        tokenizer=_text(values, "tokenizer"),
        fingerprint=_text(values, "fingerprint", HEX),
        n_vocab=_whole(values, "n_vocab", 1),
        source=tuple(str(source) for source in values["source"]),
        settings=dict(values["settings"]),
        splits=splits,
    )


def _parse_split(values: dict[str, Any]) -> SplitManifest:
    shards = tuple(
        Shard(_text(v, "file", NAME), _whole(v, "tokens", 1), _text(v, "sha256", HEX))
        for v in values["shards"]
    )
    split = SplitManifest(
        tokens=_whole(values, "tokens", 1),
        documents=_whole(values, "documents", 0),
        bytes=_whole(values, "bytes", 0),
        shards=shards,
    )
    if split.tokens != sum(shard.tokens for shard in shards):
        raise ValueError(f"{split.tokens} tokens are not the sum over shards")
    return split


def _check_apart(manifest: Manifest, path: Path) -> None:
    seen: dict[str, str] = {}
    files: set[str] = set()
    for name, split in manifest.splits.items():
        for shard in split.shards:
            other = seen.setdefault(shard.sha256, name)
            if other != name:
                both = f"{other} and {name} share {shard.file}"
                raise ConfigError(f"{path}: {both}; allowed: splits apart")
            if shard.file in files:
                raise ConfigError(f"{path} names {shard.file} twice; allowed: once")
            files.add(shard.file)


def _digest_all(
    files: Sequence[_File], n_vocab: int, wanted: Sequence[str] | None = None
) -> list[str]:
    """Return the sha256 of each, equal to `wanted`, with all ids below `n_vocab`."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(functools.partial(_digest, n_vocab=n_vocab), files))
    known = [digest for digest, _ in found]
    for file, digest, expected in zip(files, known, wanted or known, strict=True):
        if digest != expected:
            wrong = f"{file.path} has sha256 {digest[:16]}.."
            wrong = f"{wrong}; its manifest says {expected[:16]}.."
            raise ConfigError(
                f"{wrong}; the file was altered: prepare the source again"
            )
    for _, fault in found:
        if fault is not None:
            raise ConfigError(fault)
    return known


def _digest(file: _File, n_vocab: int) -> tuple[str, str | None]:
    """Return the sha256 of a file, and which id in it no model of `n_vocab` has."""
    digest, fault, first = hashlib.sha256(), None, 0
    with file.path.open("rb") as stream:
        digest.update(stream.read(file.skipped_bytes))
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, TOKEN)
            fault = fault or _find_alien(tokens, file.path, first, n_vocab)
            first += len(tokens)
    return digest.hexdigest(), fault


def _find_alien(
    part: UInt16[np.ndarray, " n"], path: Path, first: int, n_vocab: int
) -> str | None:
    """Return which id of `part`, from token `first` on, is not in the vocabulary."""
    if part.max(initial=0) < n_vocab:
        return None
    offset = int(np.argmax(part >= n_vocab))
    return (
        f"{path} at token {first + offset} holds id {part[offset]}; allowed: "
        f"0 <= id < {n_vocab}, the model's vocabulary; prepare the source again with "
        "the model's tokenizer"
    )


def _check_inside(path: Path) -> None:
    found, home = path.resolve(), path.parent.resolve()
    if found.parent != home:
        wrong = f"{path} is a link to {found}; allowed: a file in {home}"
        raise ConfigError(f"{wrong}; copy the file there")


def _read_header(path: Path) -> _File:
    if not path.is_file():
        raise ConfigError(f"{path} is not there; allowed: a .bin file of tokens")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
    words = header[: header.size // 4 * 4].view("<i4")
    magic, version = words[:2] if words.size >= 2 else (0, 0)
    if magic == HEADER_MAGIC_LLAMA:
        raise ConfigError(f"{path} holds Llama 3 tokens in uint32; allowed: uint16")
    if magic == HEADER_MAGIC and words.size == HEADER_BYTES // 4:
        if version != 1:
            raise ConfigError(f"{path} has llm.c version {version}; allowed: 1")
        return _File(path, int(words[2]), HEADER_BYTES)
    if size % TOKEN.itemsize:
        raise ConfigError(f"{path} has odd length {size}; allowed: whole uint16 tokens")
    return _File(path, size // TOKEN.itemsize)


def _check_file(file: _File) -> None:
    if not file.path.is_file():
        raise ConfigError(f"{file.path} is missing; prepare the source again")
    size = file.path.stat().st_size
    if size != file.size:
        wrong = f"{file.path} has {size} bytes; {file.tokens} tokens take {file.size}"
        raise ConfigError(f"{wrong}; the file was cut or altered: make it again")
    if not file.tokens:
        raise ConfigError(f"{file.path} holds no tokens; make it again")
    count = min(file.tokens, PROBED_TOKENS)
    tokens = np.fromfile(file.path, TOKEN, count, offset=file.skipped_bytes)
    if count >= 4 and not tokens[1::2].any() and tokens.any():
        wrong = f"{file.path} holds uint32: every second uint16 is 0"
        raise ConfigError(f"{wrong}; allowed: uint16; convert it with astype")
