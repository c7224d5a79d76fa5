"""Where text comes from: files, folders, JSON lines, TFDS, Hugging Face, the stdlib.

A document is delivered in pieces, so that no source is ever held whole. Text is
kept as it is: line ends, byte order marks and special tokens are data.
"""

import codecs
import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from gpt2_jax.config import ConfigError

PIECE_CHARACTERS = 2**18  # most of a document at once
BLOCK_BYTES = 2**16  # of a file, read at once
ZSTD_BYTES = 2**9  # at once; 4 of them can stand for 128 KiB (RFC 8878, RLE_Block)
LINE_BYTES = 2**24  # of one JSON record, which cannot be read in parts

# Parts of the standard library that differ between distributions of one version.
STDLIB_LEFT_OUT = re.compile(
    r"site-packages|dist-packages|tests?|idle_test|lib2to3|distutils|pydoc_data"
    r"|turtledemo|__pycache__|config-.*|_sysconfigdata.*|_distutils_system_mod\.py"
    r"|(site|user)customize\.py"
)
HIDDEN = re.compile(r"\..*")

TFDS_SPEC = re.compile(r"(?P<name>[^:]+(:\d+\.\d+\.\d+)?)(:(?P<split>.+))?")


class Document(NamedTuple):
    """A document, or with `last` false a piece of one that goes on."""

    key: str  # the same on every machine: a relative path, a line, an index
    text: str
    last: bool = True


class _NotText(ConfigError):
    """A file that is not UTF-8 text."""


def open_source(
    spec: str, *, text_field: str | None = None, skip_binary: bool = False
) -> Iterator[Document]:
    """Return the documents of a source, in an order that is always the same.

    `spec` is `stdlib`, a file, a folder, `tfds:NAME[/CONFIG][:SPLIT]` or
    `hf:NAME[/CONFIG][:SPLIT]`; SPLIT is train unless given. Hidden files of a
    folder are left out. `text_field` names the text of a record; left alone, it is
    "text" or the only string. With `skip_binary` files that are not UTF-8 text are
    left out and counted on stderr.

    Raises
    ------
    ConfigError
        At once, if the source is missing or empty. While reading, if a file is not
        UTF-8 text, a record is malformed, or no text is found at all.
    """
    kind, _, name = spec.partition(":")
    if kind == "tfds" and name:
        documents = _records(spec, _open_tfds(name), text_field)
    elif kind == "hf" and name:
        documents = _records(spec, _open_hf(name), text_field)
    elif spec == "stdlib":
        documents = _read_files(_stdlib_files(), text_field, skip_binary=True)
    else:
        files = _list_files(Path(spec))
        documents = _read_files(files, text_field, skip_binary=skip_binary)
    return _not_empty(spec, documents)


def is_single_text(spec: str) -> bool:
    """Say whether a source is one file of plain text, packed or not."""
    return Path(spec).is_file() and not _is_jsonl(Path(spec))


def source_bytes(spec: str) -> int | None:
    """Return the size of a source's files, None where it is not made of files."""
    if spec.startswith(("tfds:", "hf:")):
        return None
    files = _stdlib_files() if spec == "stdlib" else _list_files(Path(spec))
    return sum(path.stat().st_size for path in files.values())


def cut_pieces(
    key: str, texts: Iterable[str], most: int = PIECE_CHARACTERS
) -> Iterator[Document]:
    r"""Return one document's text in pieces of at most `most` characters.

    GPT-2 encodes the pieces as it encodes the whole: each ends between a character
    that is not blank and a blank, where no match of its pattern crosses and no
    lookahead sees (`\s+(?!\S)` and `\s++$` look past blanks only). A stretch of
    `most` characters without such a place is cut where it ends; there alone tokens
    may differ.
    """
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > most:
            cut = _safe_cut(rest, start, start + most)
            yield Document(key, rest[start:cut], last=False)
            start = cut
        rest = rest[start:]
    if rest:
        yield Document(key, rest)


def _safe_cut(text: str, start: int, stop: int) -> int:
    # str.isspace says yes to all that the pattern's \s does, and to \x1c..\x1f.
    places = range(stop, start, -1)
    safe = (i for i in places if text[i].isspace() and not text[i - 1].isspace())
    return next(safe, stop)


def _not_empty(spec: str, documents: Iterator[Document]) -> Iterator[Document]:
    count = 0
    for document in documents:
        count += 1
        yield document
    if not count:
        raise ConfigError(f"source {spec} holds no text; allowed: at least a character")


def _list_files(path: Path) -> dict[str, Path]:
    """Return relative posix path -> file, sorted; a single file has its name."""
    if not path.exists():
        allowed = "stdlib, a file, a folder, tfds:NAME or hf:NAME"
        raise ConfigError(f"source {path} does not exist; allowed: {allowed}")
    files = _walk(path, HIDDEN) if path.is_dir() else {path.name: path}
    if not any(file.stat().st_size for file in files.values()):
        raise ConfigError(f"source {path} is empty; allowed: files with text")
    return files


def _stdlib_files() -> dict[str, Path]:
    files = _walk(Path(sysconfig.get_path("stdlib")), STDLIB_LEFT_OUT)
    return {name: path for name, path in files.items() if path.suffix == ".py"}


def _walk(root: Path, left_out: re.Pattern[str]) -> dict[str, Path]:
    files = {}
    for top, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not left_out.fullmatch(name)]
        kept = [Path(top, name) for name in names if not left_out.fullmatch(name)]
        for path in kept:
            if path.is_file():  # not a socket, a pipe or a broken link
                files[path.relative_to(root).as_posix()] = path
    return dict(sorted(files.items()))


def _read_files(
    files: Mapping[str, Path], text_field: str | None, *, skip_binary: bool
) -> Iterator[Document]:
    skipped = 0
    for key, path in files.items():
        if skip_binary and not _is_text(path):
            skipped += 1
            continue
        if _is_jsonl(path):
            yield from _read_jsonl(key, path, text_field)
        else:
            yield from cut_pieces(key, _read_text(path))
    if skipped:
        print(f"left out {skipped} files that are not UTF-8 text", file=sys.stderr)


def _is_jsonl(path: Path) -> bool:
    packed = path.suffix in (".gz", ".zst")
    return (path.with_suffix("") if packed else path).suffix in (".jsonl", ".json")


def _is_text(path: Path) -> bool:
    try:
        for _ in _read_text(path):
            pass
    except _NotText:
        return False
    return True


def _read_text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte not yet decoded
    for block in itertools.chain(read_blocks(path), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_text(path, offset + error.start, "not UTF-8") from None
        if "\0" in text:
            at = offset + len(text[: text.index("\0")].encode())
            raise _not_text(path, at, "NUL")
        offset += pending + len(block) - len(decoder.getstate()[0])
        yield text


def _not_text(path: Path, offset: int, found: str) -> _NotText:
    return _NotText(
        f"{path} is no text: {found} at byte {offset}; allowed: UTF-8; convert it or "
        "leave such files out with --skip-binary (training: --data.skip-binary)"
    )


def read_blocks(path: Path) -> Iterator[bytes]:
    """Give the bytes of a file in order, unpacked where its name ends in .gz or .zst.

    Raises
    ------
    ConfigError
        If it cannot be read or unpacked.
    """
    readers = {".gz": _read_gzip, ".zst": _read_zstd}
    try:
        yield from readers.get(path.suffix, _read_plain)(path)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ConfigError(f"{path} cannot be unpacked: {error}; get it again") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _read_plain(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(BLOCK_BYTES), b"")


def _read_gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        yield from iter(lambda: file.read(BLOCK_BYTES), b"")


def _read_zstd(path: Path) -> Iterator[bytes]:
    # The library's own reader takes a file cut short for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    small = (
        block[i : i + ZSTD_BYTES]
        for block in _read_plain(path)
        for i in range(0, len(block), ZSTD_BYTES)
    )
    for block in small:
        while block:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            text = frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            if text:
                yield text
    if not frame.eof:
        raise EOFError("the last frame ends too early")


def _read_jsonl(key: str, path: Path, text_field: str | None) -> Iterator[Document]:
    field = text_field
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        record = _parse_record(line, where)
        field = field or _find_text_field(record, where)
        text = _text_of(record, field, where)
        yield from cut_pieces(f"{key}:{number}", [text])


def _read_lines(path: Path) -> Iterator[bytes]:
    rest, number = bytearray(), 1
    for block in read_blocks(path):
        *lines, last = block.split(b"\n")
        for line in lines:
            yield bytes(rest + line)
            rest, number = bytearray(), number + 1
        rest += last
        if len(rest) > LINE_BYTES:
            allowed = f"at most {LINE_BYTES} bytes, one JSON object per line"
            raise ConfigError(f"{path} line {number} is too long; allowed: {allowed}")
    yield bytes(rest)


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, too deep
        raise ConfigError(
            f"{where} is malformed ({error}); allowed: one JSON object per line"
        ) from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ConfigError(f"{where} is a {kind}; allowed: one JSON object per line")
    return record


def _records(
    spec: str, records: Iterable[Mapping[str, Any]], text_field: str | None
) -> Iterator[Document]:
    field = text_field
    for index, record in enumerate(records):
        where = f"{spec} record {index}"
        field = field or _find_text_field(record, where)
        text = _text_of(record, field, where)
        yield from cut_pieces(f"{spec}:{index}", [text])


def _find_text_field(record: Mapping[str, Any], where: str) -> str:
    fields = [name for name, value in record.items() if isinstance(value, str | bytes)]
    if "text" in fields:
        return "text"
    if len(fields) == 1:
        return fields[0]
    found = ", ".join(fields) or "none"
    wanted = "'text' or a single one; name it with --text-field"
    raise ConfigError(f"{where} has string fields {found}; allowed: {wanted}")


def _text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str | bytes):
        kind = type(value).__name__ if field in record else "missing"
        known = ", ".join(map(str, record))
        raise ConfigError(
            f"{where} field {field!r} is {kind}; allowed: a string (fields: {known}); "
            "name another with --text-field"
        )
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()  # a JSON escape can spell a lone surrogate
    except UnicodeError as error:
        wrong = f"{where} is not valid Unicode ({error})"
        raise ConfigError(f"{wrong}; allowed: UTF-8") from None
    return value


def _open_tfds(name: str) -> Iterable[Mapping[str, Any]]:
    """Return the records of a TFDS split, without TensorFlow where that is possible."""
    match = TFDS_SPEC.fullmatch(name)
    if match is None:
        allowed = "tfds:NAME[/CONFIG][:VERSION][:SPLIT]"
        raise ConfigError(f"source is tfds:{name}; allowed: {allowed}")
    split = match["split"] or "train"
    try:
        builder = _tfds_builder(match["name"])
        with contextlib.redirect_stdout(sys.stderr):  # TFDS reports on stdout
            builder.download_and_prepare()
        if builder.info.file_format.value == "array_record":
            return builder.as_data_source(split)
        return _tfds_with_tensorflow(builder, split)
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        extra = "'gpt2_jax[tf]'" if missing == "tensorflow" else missing
        raise ConfigError(
            f"source tfds:{name} cannot be read without {missing}; run "
            f"`pip install {extra}`"
        ) from error
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"source tfds:{name} cannot be read: {first}") from error


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds  # a second to import

    folder = os.environ.get("TFDS_DATA_DIR")
    short = re.split("[/:]", name)[0]
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        # Older text data sets register themselves only when imported.
        module = f"tensorflow_datasets.text.{short}"
        if importlib.util.find_spec(module) is None:
            raise
        importlib.import_module(module)
        builder = tfds.builder(name, data_dir=folder)
    if builder.is_prepared():
        return builder
    return tfds.builder(name, data_dir=folder, file_format="array_record")


def _tfds_with_tensorflow(builder: Any, split: str) -> Iterable[Mapping[str, Any]]:
    import tensorflow_datasets as tfds

    return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))


def _open_hf(name: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows of `[ORG/]NAME[/CONFIG]` or a local folder, streamed."""
    try:
        import datasets
    except ImportError as error:
        wanted = "run `pip install 'gpt2_jax[hf]'`"
        raise ConfigError(f"source hf:{name} needs datasets; {wanted}") from error
    path, _, split = name.partition(":")
    config = None
    if not Path(path).exists() and path.count("/") == 2:
        path, _, config = path.rpartition("/")
    try:
        return datasets.load_dataset(
            path, config, split=split or "train", streaming=True
        )
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"source hf:{name} cannot be read: {first}") from error
