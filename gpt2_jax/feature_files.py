"""Write the features of any number of texts into one .npz or .parquet file.

With a pool, "mean" or "last", row i is text i:

    .npz      features (n, D) float32, n_tokens (n,) int32
    .parquet  index int64, n_tokens int32, features fixed_size_list<float32>[D]

Without one every token has a row:

    .npz      features (tokens, D) float32, offsets (n + 1,) int64:
              text i is features[offsets[i] : offsets[i + 1]]
    .parquet  the same columns, features list<fixed_size_list<float32>[D]>

Rows are written as they are computed: memory does not grow with the number of texts.
"""

import codecs
import contextlib
import itertools
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64, Integer

from gpt2_jax.config import ConfigError, check
from gpt2_jax.data.sources import BLOCK_BYTES, LINE_BYTES, read_blocks
from gpt2_jax.features import Pool
from gpt2_jax.pretrained import GPT2

Ids = Integer[np.ndarray, " _"]  # rows differ in length
# Takes the rows of some texts, "rows D", and how many tokens each of these has.
Add = Callable[[np.ndarray, np.ndarray], None]

BLOCK_BATCHES = 8  # texts of so many batches are sorted by length: little is padding
PROGRESS_SECONDS = 10.0  # between two lines of progress
COPY_BYTES = 2**20  # copied into a zip at once
ROW_GROUP_BYTES = 2**24  # of parquet at least: each costs the reader a look-up


def write_features(
    lm: GPT2,
    texts: Iterable[str],
    out: Path,
    *,
    layer: int = -1,
    pool: Pool | None = "mean",
    batch: int = 16,
    truncate: Literal["left"] | None = None,
    force: bool = False,
    say: Callable[[str], None],
) -> int:
    """Write the hidden states of `layer` for each text into `out`; return their number.

    The module's first lines describe the files; `np.load` opens an .npz as it is. An
    empty text is the start of a document, one token. `batch` texts are computed at
    once. `out` appears whole or not at all; until then a hidden folder beside it takes
    up to twice its size.

    Raises
    ------
    ConfigError
        If `out` exists and `force` is off, or ends in another suffix; if an option
        is out of range; if a text exceeds the context and `truncate` is off: the
        message says which, counted from 1, and by how much.
    """
    check(out.suffix in (".npz", ".parquet"), "OUT", str(out), "F.npz or F.parquet")
    check(batch >= 1, "batch", batch, ">= 1")
    _check_free(out, force)
    lm.encode("", truncate=truncate)  # a model without a tokenizer fails here
    lm.features([], layer, pool)  # and a layer or pool that there is not
    out.parent.mkdir(parents=True, exist_ok=True)
    open_file = _open_npz if out.suffix == ".npz" else _open_parquet
    count, block = 0, BLOCK_BATCHES * batch
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder, out.name)
        with open_file(partial, lm.config.n_embd, pooled=pool is not None) as add:
            for rows in _in_blocks(_encode(lm, texts, truncate), block, say):
                add(*_compute(lm, rows, layer=layer, pool=pool, batch=batch))
                count += len(rows)
        partial.replace(out)
    say(f"{out}: {count:,} texts")
    return count


def read_lines(paths: Sequence[str]) -> Iterator[str]:
    r"""Return the lines of UTF-8 files one by one, without "\n" or "\r\n".

    "-" is standard input, .gz and .zst files are unpacked, a byte order mark at the
    start is left out.

    Raises
    ------
    ConfigError
        At once, if there is no such file. While reading, if a file cannot be read, or
        a line is not UTF-8 or longer than 64 MiB.
    """
    for path in paths:
        good = path == "-" or Path(path).exists() and not Path(path).is_dir()
        check(good, "TEXT", path, "a file that exists, or - for standard input")
    return itertools.chain.from_iterable(map(_read_lines, paths))


def _check_free(out, force):
    if out.is_dir():
        raise ConfigError(f"OUT {str(out)!r} is a directory; name a file")
    if out.exists() and not force:
        raise ConfigError(
            f"OUT {str(out)!r} exists; choose another, or replace it with --force"
        )


def _in_blocks(
    rows: Iterator[Ids], size: int, say: Callable[[str], None]
) -> Iterator[list[Ids]]:
    done, start = 0, time.monotonic()
    told = start
    while block := list(itertools.islice(rows, size)):
        yield block
        done, now = done + len(block), time.monotonic()
        if now - told >= PROGRESS_SECONDS:
            say(f"{done:,} texts, {done / (now - start):,.0f} a second")
            told = now


def _encode(lm, texts, truncate) -> Iterator[Ids]:
    for number, text in enumerate(texts, 1):
        try:
            yield lm.encode(text, truncate=truncate)[0][0]
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from None


def _compute(
    lm: GPT2, rows: list[Ids], *, layer: int, pool: Pool | None, batch: int
) -> tuple[Float32[np.ndarray, "rows D"], Int64[np.ndarray, " n"]]:
    """Return the states of the rows, one after the other, and the rows' lengths.

    Every batch is full, so that a bucket of lengths is compiled once: the last batch,
    of the shortest rows, repeats one and forgets what comes of it.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    sizes = lengths if pool is None else np.ones_like(lengths)
    ends = np.cumsum(sizes)
    found = np.empty((ends[-1], lm.config.n_embd), np.float32)
    order = np.argsort(-lengths, kind="stable")
    for some in np.split(order, range(batch, len(order), batch)):
        full = np.pad(some, (0, batch - len(some)), mode="edge")
        values = lm.features([rows[i] for i in full], layer, pool)
        values = values if pool is None else values[:, None]
        for i, value in zip(some, values, strict=False):
            found[ends[i] - sizes[i] : ends[i]] = value[: sizes[i]]
    return found, lengths


@contextlib.contextmanager
def _open_npz(path: Path, width: int, *, pooled: bool) -> Iterator[Add]:
    names = ["features", "n_tokens" if pooled else "offsets"]
    members = [path.with_name(f"{name}.npy") for name in names]
    dtype = np.dtype(np.int32 if pooled else np.int64)
    with (
        _open_npy(members[0], np.dtype(np.float32), width) as add_rows,
        _open_npy(members[1], dtype) as add_numbers,
    ):
        end = np.zeros(1, np.int64)
        if not pooled:
            add_numbers(end)

        def add(values: np.ndarray, lengths: np.ndarray) -> None:
            nonlocal end
            add_rows(values)
            ends = end + np.cumsum(lengths)
            add_numbers(lengths if pooled else ends)
            end = ends[-1:]

        yield add
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            _move_into(archive, member)


@contextlib.contextmanager
def _open_npy(
    path: Path, dtype: np.dtype[Any], *tail: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends rows to an .npy file; the shape is written last."""
    count = 0

    def write_header() -> None:
        descr = np.lib.format.dtype_to_descr(dtype)
        header = dict(descr=descr, fortran_order=False, shape=(count, *tail))
        np.lib.format.write_array_header_1_0(file, header)

    def add(rows: np.ndarray) -> None:
        nonlocal count
        file.write(np.ascontiguousarray(rows, dtype).data)
        count += len(rows)

    with path.open("wb") as file:
        write_header()
        yield add
        file.seek(0)
        write_header()  # as long as before: numpy leaves room for the rows to come


def _move_into(archive, member):
    with (
        member.open("rb") as source,
        archive.open(member.name, "w", force_zip64=True) as target,
    ):
        shutil.copyfileobj(source, target, COPY_BYTES)
    member.unlink()


@contextlib.contextmanager
def _open_parquet(path: Path, width: int, *, pooled: bool) -> Iterator[Add]:
    row = pa.list_(pa.float32(), width)
    kinds = {
        "index": pa.int64(),
        "n_tokens": pa.int32(),
        "features": row if pooled else pa.list_(row),
    }
    schema = pa.schema(list(kinds.items()))
    count, waiting, waiting_bytes = 0, [], 0
    # Hardly two numbers of a feature are alike: a dictionary only costs time.
    with pq.ParquetWriter(path, schema, use_dictionary=False) as file:

        def write_group() -> None:
            file.write_table(pa.Table.from_batches(waiting, schema))
            waiting.clear()

        def add(values: np.ndarray, lengths: np.ndarray) -> None:
            nonlocal count, waiting_bytes
            features = pa.FixedSizeListArray.from_arrays(
                pa.array(values.ravel()), type=row
            )
            if not pooled:
                offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
                features = pa.ListArray.from_arrays(pa.array(offsets), features)
            index = np.arange(count, count + len(lengths))
            columns = [index, lengths.astype(np.int32), features]
            waiting.append(pa.record_batch(columns, schema))
            count += len(lengths)
            waiting_bytes += waiting[-1].nbytes
            if waiting_bytes >= ROW_GROUP_BYTES:
                write_group()
                waiting_bytes = 0

        yield add
        write_group()


def _read_lines(path: str) -> Iterator[str]:
    name = "standard input" if path == "-" else path
    blocks = _read_standard_input() if path == "-" else read_blocks(Path(path))
    for number, line in enumerate(_split_lines(name, blocks), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{name} line {number} is not UTF-8: {error.reason} at byte "
                f"{error.start} of the line; convert it"
            ) from None


def _read_standard_input() -> Iterator[bytes]:
    if sys.stdin is None:
        raise ConfigError("standard input is closed; name files after --input")
    return iter(lambda: sys.stdin.buffer.read(BLOCK_BYTES), b"")


def _split_lines(name: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest, number = bytearray(), 1  # of the line that goes on in the next block
    for block in blocks:
        *lines, last = block.split(b"\n")
        for line in lines:
            yield bytes(rest + line)
            rest.clear()
            number += 1
        rest += last
        check(
            len(rest) <= LINE_BYTES,
            f"{name} line {number}",
            f"{len(rest)} bytes or more",
            f"at most {LINE_BYTES} bytes; break it into lines",
        )
    if rest:
        yield bytes(rest)
