"""Turn text into token shards: in parallel, in bounded memory, continued when cut off.

What is written depends on the sources and settings alone: not on the number of
cores, nor on how often the work was killed and run again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt16

from gpt2_jax.config import ConfigError, check
from gpt2_jax.data.shards import (
    MANIFEST,
    PROGRESS,
    VERSION,
    Manifest,
    ShardWriter,
    SplitManifest,
    read_manifest,
    write_json,
    write_manifest,
)
from gpt2_jax.data.sources import (
    PIECE_CHARACTERS,
    Document,
    is_single_text,
    open_source,
    source_bytes,
)
from gpt2_jax.tokenizer import Tokenizer

SPLITS = ("train", "val")
PROGRESS_PARTIAL = str(Path(PROGRESS).with_suffix(".tmp"))  # of a run killed then
BATCH_CHARACTERS = 2**19  # encoded by one thread at once
SYNC_TOKENS = 2**22  # between two records of progress: what a kill costs
REPORT_SECONDS = 10.0
HASH_BYTES = 8  # of blake2b over a document's key: uniform in [0, 2**64)


class _Piece(NamedTuple):
    split: str
    text: str
    ends: bool  # the split's last piece of this document
    closes: bool  # <|endoftext|> follows


class _Encoded(NamedTuple):
    tokens: UInt16[np.ndarray, " n"]
    documents: int
    bytes: int


class _Batch(NamedTuple):
    pieces: int
    encoded: dict[str, _Encoded]  # what each split gets


@dataclass
class _Totals:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Recipe:
    """All that fixes the shards; a finished directory is reused only if it matches."""

    tokenizer: str
    fingerprint: str
    source: tuple[str, ...]
    val_source: tuple[str, ...]
    val_fraction: float | None
    text_field: str | None
    skip_binary: bool
    shard_tokens: int
    source_bytes: dict[str, int | None]

    def plain(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def check_same(self, out: Path, found: dict[str, Any]) -> None:
        wanted = self.plain()
        changed = [
            f"{name} was {found.get(name)!r}, now {wanted[name]!r}"
            for name in wanted
            if found.get(name) != wanted[name]
        ]
        if changed:
            remedy = "choose another directory or delete this one"
            raise ConfigError(f"{out} was prepared otherwise: {changed[0]}; {remedy}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: Tokenizer,
    *,
    val_sources: Sequence[str] = (),
    val_fraction: float = 0.1,
    text_field: str | None = None,
    skip_binary: bool = False,
    shard_tokens: int = 100_000_000,
    report: Callable[[str], None] = _to_stderr,
) -> Manifest:
    """Write the tokens of `sources` as shards under `out` and return the manifest.

    `<|endoftext|>` follows every document. The val split is `val_sources`; without
    them it is the last `val_fraction` of the characters of a source that is one text
    file (nanoGPT data/shakespeare/prepare.py), else the whole documents whose key
    hashes below `val_fraction`.

    A directory finished with the same sources and settings is returned as it is; an
    unfinished one is continued.

    Raises
    ------
    ConfigError
        If a source cannot be read, a token does not fit in uint16, a split gets fewer
        than two tokens, `out` holds something else or was prepared otherwise, or it
        cannot be written.
    """
    check(bool(sources), "data.source", tuple(sources), "at least one source")
    check(shard_tokens >= 1, "shard_tokens", shard_tokens, "at least 1")
    n_vocab, most = tokenizer.n_vocab, f"at most {2**16}, for shards hold uint16"
    check(n_vocab <= 2**16, f"n_vocab of tokenizer {tokenizer.name}", n_vocab, most)
    recipe = _Recipe(
        tokenizer=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        source=tuple(sources),
        val_source=tuple(val_sources),
        val_fraction=None if val_sources else val_fraction,
        text_field=text_field,
        skip_binary=skip_binary,
        shard_tokens=shard_tokens,
        source_bytes={s: source_bytes(s) for s in [*sources, *val_sources]},
    )
    good = bool(val_sources) or 0 < val_fraction < 1
    check(good, "val_fraction", val_fraction, "0 < fraction < 1")
    if (out / MANIFEST).is_file():
        return _reuse(recipe, out, report)
    try:
        pieces = _split_pieces(recipe)
        with _only_writer(out):
            return _write(recipe, out, tokenizer, pieces, report=report)
    except OSError as error:
        wrong = f"cannot write {error.filename or out}: {error.strerror}"
        raise ConfigError(f"{wrong}; make room and run the same again") from error


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        remedy = "wait for it or choose another directory"
        raise ConfigError(f"{out} is being written by another run; {remedy}") from None
    finally:
        os.close(folder)
        if is_new and not any(out.iterdir()):
            out.rmdir()


def _reuse(recipe: _Recipe, out: Path, report: Callable[[str], None]) -> Manifest:
    manifest = read_manifest(out)
    found = {name: getattr(manifest, name) for name in ("tokenizer", "fingerprint")}
    found |= {"source": list(manifest.source)} | manifest.settings
    recipe.check_same(out, found)
    report(f"{out} is prepared already; its shards are used")
    return manifest


def _write(
    recipe: _Recipe,
    out: Path,
    tokenizer: Tokenizer,
    pieces: Iterator[_Piece],
    *,
    report: Callable[[str], None],
) -> Manifest:
    done, totals = _load_progress(recipe, out)
    if done:
        report(f"{out} is unfinished: continuing after {done} pieces of text")
    writers = {
        split: ShardWriter(out, split, recipe.shard_tokens, totals[split].tokens)
        for split in SPLITS
    }
    work = _Work(recipe, out, report, writers, totals, done, recorded=done > 0)
    encode = functools.partial(_encode, tokenizer)
    try:
        for batch in _in_order(encode, _batches(itertools.islice(pieces, done, None))):
            work.add(batch)
        _check_enough(recipe, totals)
    except ConfigError:
        work.forget()
        raise
    manifest = _manifest(recipe, tokenizer, work)
    write_manifest(out, manifest)
    for leftover in (PROGRESS, PROGRESS_PARTIAL):
        (out / leftover).unlink(missing_ok=True)
    for name, split in manifest.splits.items():
        size = f"{split.tokens:,} tokens, {split.bytes:,} bytes of text"
        report(f"{out} {name}: {size}, {split.documents:,} documents")
    return manifest


def _manifest(recipe: _Recipe, tokenizer: Tokenizer, work: "_Work") -> Manifest:
    splits = {
        split: SplitManifest(
            **dataclasses.asdict(work.totals[split]), shards=writer.finish()
        )
        for split, writer in work.writers.items()
    }
    beside = ("tokenizer", "fingerprint", "source")
    settings = {k: v for k, v in recipe.plain().items() if k not in beside}
    return Manifest(
        version=VERSION,
        tokenizer=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        n_vocab=tokenizer.n_vocab,
        source=recipe.source,
        settings=settings,
        splits=splits,
    )


def _split_pieces(recipe: _Recipe) -> Iterator[_Piece]:
    """Return all text in order, each piece with the split it goes to.

    Every source is opened here, before the first is read.
    """

    def opened(specs: Sequence[str]) -> Iterator[Document]:
        field, skip = recipe.text_field, recipe.skip_binary
        each = [open_source(s, text_field=field, skip_binary=skip) for s in specs]
        return itertools.chain.from_iterable(each)

    documents = opened(recipe.source)
    if recipe.val_fraction is None:
        held_out = opened(recipe.val_source)
        parts = (("train", documents), ("val", held_out))
        return (
            _Piece(split, document.text, document.last, document.last)
            for split, part in parts
            for document in part
        )
    if len(recipe.source) == 1 and is_single_text(recipe.source[0]):
        characters = sum(len(document.text) for document in opened(recipe.source))
        train = int(characters * (1 - recipe.val_fraction))
        return _split_characters(documents, train)
    return _split_documents(documents, recipe.val_fraction)


def _split_characters(documents: Iterable[Document], train: int) -> Iterator[_Piece]:
    """Give the first `train` characters to one split, the rest to the other."""
    left = train
    for document in documents:
        head, tail = document.text[:left], document.text[left:]
        left -= len(head)
        if head:
            closes = document.last and not tail
            yield _Piece("train", head, ends=left == 0 or closes, closes=closes)
        if tail:
            yield _Piece("val", tail, ends=document.last, closes=document.last)


def _split_documents(
    documents: Iterable[Document], val_fraction: float
) -> Iterator[_Piece]:
    """Give each whole document to the split that the hash of its key says."""
    border = int(val_fraction * 2 ** (8 * HASH_BYTES))
    for key, text, last in documents:
        name = key.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(name, digest_size=HASH_BYTES).digest()
        low = int.from_bytes(digest, "big") < border
        yield _Piece("val" if low else "train", text, ends=last, closes=last)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[_Piece]) -> _Batch:
    eot = np.array([tokenizer.eot], np.uint16)
    encoded = {}
    for split in SPLITS:
        pieces = [piece for piece in batch if piece.split == split]
        tokens = [np.empty(0, np.uint16)]
        for piece in pieces:
            tokens.append(tokenizer.encode(piece.text))
            if piece.closes:
                tokens.append(eot)
        encoded[split] = _Encoded(
            np.concatenate(tokens),
            sum(piece.ends for piece in pieces),
            sum(len(piece.text.encode()) for piece in pieces),
        )
    return _Batch(len(batch), encoded)


def _in_order(
    function: Callable[[list[_Piece]], _Batch], items: Iterable[list[_Piece]]
) -> Iterator[_Batch]:
    """Apply `function` on all cores; at most three items a core are in memory."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load_progress(recipe: _Recipe, out: Path) -> tuple[int, dict[str, _Totals]]:
    """Return the pieces done and what each split holds, nothing to begin with."""
    path = out / PROGRESS
    if not path.is_file():
        _check_free(out)
        _save_progress(recipe, out, 0, {split: _Totals() for split in SPLITS})
    try:
        found = json.loads(path.read_bytes())
        done = int(found["pieces"])
        totals = {split: _Totals(**found["splits"][split]) for split in SPLITS}
        before, most = dict(found["recipe"]), int(found["piece_characters"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is malformed ({error}); delete {out}") from None
    if done:  # else there is nothing to lose
        recipe.check_same(out, before)
        name = f"{path}: piece_characters"
        check(most == PIECE_CHARACTERS, name, most, f"{PIECE_CHARACTERS}; delete {out}")
    return done, totals


def _check_free(out: Path) -> None:
    others = sorted({path.name for path in out.iterdir()} - {PROGRESS_PARTIAL})
    if others:
        remedy = "choose a new or empty directory"
        raise ConfigError(f"{out} holds other files ({others[0]}); {remedy}")


def _save_progress(
    recipe: _Recipe, out: Path, pieces: int, totals: dict[str, _Totals]
) -> None:
    splits = {split: dataclasses.asdict(total) for split, total in totals.items()}
    done = {"pieces": pieces, "piece_characters": PIECE_CHARACTERS}
    write_json(out / PROGRESS, done | {"splits": splits, "recipe": recipe.plain()})


@dataclass
class _Work:
    """What is written so far; from time to time it is made safe and reported."""

    recipe: _Recipe
    out: Path
    report: Callable[[str], None]
    writers: dict[str, ShardWriter]
    totals: dict[str, _Totals]
    pieces: int
    recorded: bool = False  # there is progress to go on from
    unsynced_tokens: int = 0
    bytes: int = 0  # of text, in this run
    started: float = dataclasses.field(default_factory=time.monotonic)
    reported: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, batch: _Batch) -> None:
        for split, part in batch.encoded.items():
            self.writers[split].write(part.tokens)
            total = self.totals[split]
            total.tokens += part.tokens.size
            total.documents += part.documents
            total.bytes += part.bytes
            self.unsynced_tokens += part.tokens.size
            self.bytes += part.bytes
        self.pieces += batch.pieces
        if self.unsynced_tokens >= SYNC_TOKENS:
            self._sync()
        if time.monotonic() - self.reported >= REPORT_SECONDS:
            self._report()

    def _sync(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        _save_progress(self.recipe, self.out, self.pieces, self.totals)
        self.unsynced_tokens, self.recorded = 0, True

    def forget(self) -> None:
        """Leave the directory as it was, unless there is progress to go on from."""
        if self.recorded:
            return
        for split in SPLITS:
            for path in self.out.glob(f"{split}_*.bin"):
                path.unlink()
        (self.out / PROGRESS).unlink(missing_ok=True)

    def _report(self) -> None:
        self.reported = time.monotonic()
        rate = self.bytes / (self.reported - self.started) / 1e6
        tokens = sum(total.tokens for total in self.totals.values())
        self.report(f"{tokens:,} tokens written, {rate:.1f} MB of text/s")


def _check_enough(recipe: _Recipe, totals: dict[str, _Totals]) -> None:
    for split, total in totals.items():
        if total.tokens >= 2:
            continue
        documents = sum(each.documents for each in totals.values())
        found = f"{total.tokens} tokens, of {documents} documents in all"
        remedy = "add text, name held-out text (--data.val-source), or"
        raise ConfigError(
            f"split {split} has {found}; allowed: at least 2 tokens; {remedy} change "
            f"data.val_fraction = {recipe.val_fraction}"
        )
