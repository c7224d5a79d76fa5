"""Tensor files of a Hugging Face directory, checked before a number is read.

A safetensors file is the length of its header (8 bytes), the header (JSON: name ->
dtype, shape, data_offsets; huggingface/safetensors README.md, Format) and the data.
Such files come from strangers: nothing is allocated from what they declare before all
of it is found to agree with the bytes that are there.
"""

import json
import math
import os
import pickle
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gpt2_jax.config import ConfigError, check, join_faults, spell

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Those of safetensors' dtypes that numpy can hold, in the format's byte order.
DTYPES = {
    "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
    "F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
# 20 times the header of GPT-2 XL. JSON takes up to 25 times its length in memory;
# safetensors itself allows 100 MB (src/tensor.rs, MAX_HEADER_SIZE).
JSON_BYTES = 2_000_000
MAX_DIMS = 64  # numpy ndarraytypes.h, NPY_MAXDIMS
PLAIN = "printable, without '/', '\\' and '..'"  # of a tensor's name
FILE_NAME = re.compile(r"(?!.{256})\w+([.-]\w+)*", re.ASCII)
# What torch.load raises for a pickle of more than tensors or for damage.
TORCH_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError,
    ArithmeticError, AttributeError, AssertionError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file; `np.asarray` of it gives its numbers.

    The array is a read-only map of this tensor's bytes alone: it costs the pages that
    are touched and one open file, until it is dropped.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Return the bytes it takes in its file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.nbytes == 0:  # nothing to map
            values = np.empty(self.shape, self.dtype)
        else:
            values = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(values, dtype, copy=copy)


Tensors = dict[str, StoredTensor | np.ndarray]


def open_tensors(directory: Path, *, allow_pickle: bool = False) -> Tensors:
    """Return the tensors of `directory` by name, none of their numbers read yet.

    `model.safetensors` comes first, then its index with the shards. Only where neither
    is there, and only with `allow_pickle`, does torch read `pytorch_model.bin` or its
    index, by `weights_only`. A link may lead to the directory itself, or to the `blobs`
    of the Hub's cache that it belongs to.

    Raises
    ------
    ConfigError
        If a file is missing, damaged, linked from elsewhere, or a pickle that was not
        allowed; or if an index and its shards disagree. It names such tensors.
    """
    names = (SAFE, SAFE_INDEX, BIN, BIN_INDEX)
    # A broken link counts: it is refused, not passed over for a pickle.
    found = [name for name in names if os.path.lexists(directory / name)]
    if not found:
        raise ConfigError(
            f"{directory} holds no weights; allowed: a directory with {SAFE} or "
            f"{SAFE_INDEX}; download the model again or name another directory"
        )
    name = found[0]
    is_pickle = name in (BIN, BIN_INDEX)
    if is_pickle and not allow_pickle:
        raise ConfigError(
            f"{directory} holds its weights as {name}, a pickle, and pickle files can "
            f"run code; allowed: {SAFE}; --allow-pickle (allow_pickle=True) reads it "
            "with torch's weights_only"
        )
    read = _read_pickle if is_pickle else _read_safetensors
    [path] = find_files(directory, [name])
    if name in (SAFE, BIN):
        return read(path)
    return _read_shards(directory, path, read)


def find_files(directory: Path, names: Sequence[str]) -> list[Path]:
    """Return where files of a model really are, none of them outside of it.

    Raises
    ------
    ConfigError
        If one is missing, no regular file, or linked from elsewhere.
    """
    root = directory.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # huggingface_hub: snapshots/REVISION/FILE
        homes.append(root.parent.parent / "blobs")
    paths = [Path(os.path.realpath(root / name)) for name in names]
    faults = []
    for name, path in zip(names, paths, strict=True):
        if not any(path.is_relative_to(home) for home in homes):
            inside = " or ".join(map(str, homes))
            faults.append(f"{name} is a link to {path}; allowed: a file in {inside}")
        elif not path.is_file():
            faults.append(f"{name} is missing, or no regular file")
    if faults:
        raise _refusal(directory, *faults)
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a small file of JSON holds.

    Raises
    ------
    ConfigError
        If it has more than `JSON_BYTES`, or is no JSON object of distinct keys.
    """
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise _refusal(path, f"it has {size} bytes; allowed: at most {JSON_BYTES}")
    return _parse(path, path.read_bytes())


def write_tensors(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: np.dtype | None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model.safetensors`, or shards and their index, as transformers does.

    Every tensor is cast to `dtype` unless it is None, and only the shard being written
    is copied. Files are complete when they appear; the index appears last.

    Raises
    ------
    ConfigError
        If the directory holds such files already, a name or a dtype cannot be stored,
        or the cast makes a finite number infinite. It names every such tensor.
    """
    check(shard_bytes >= 1, "shard_bytes", shard_bytes, ">= 1")
    if old := sorted(path.name for path in directory.glob("model*.safetensors*")):
        allowed = "a directory without weights; remove them or name another one"
        raise ConfigError(f"{directory} holds {', '.join(old)}; allowed: {allowed}")
    if faults := _find_unwritable(tensors, dtype):
        raise ConfigError(f"{directory} cannot be written: {join_faults(faults)}")
    sizes = {n: t.size * (dtype or t.dtype).itemsize for n, t in tensors.items()}
    shards = _split(sizes, shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
        for file, names in shards.items():
            shard = {name: _prepare(tensors[name], dtype) for name in names}
            save_file(shard, Path(scratch, file), metadata={"format": "pt"})
            del shard  # before the next one is made
        if len(shards) > 1:
            count, total = sum(t.size for t in tensors.values()), sum(sizes.values())
            index = {
                "metadata": {"total_parameters": count, "total_size": total},
                "weight_map": {n: f for f, names in shards.items() for n in names},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            Path(scratch, SAFE_INDEX).write_text(text, encoding="utf-8")
        for path in sorted(Path(scratch).iterdir()):  # the index sorts last
            path.replace(directory / path.name)


def _refusal(path: Path, *faults: str) -> ConfigError:
    mend = "download or export the model again"
    return ConfigError(f"{path} cannot be read: {join_faults(faults)}; {mend}")


def _read_shards(
    directory: Path, index: Path, read: Callable[[Path], Tensors]
) -> Tensors:
    files = _read_index(index)
    shards = sorted(set(files.values()))
    tensors: Tensors = {}
    holders: dict[str, list[str]] = {name: [] for name in files}
    for shard, path in zip(shards, find_files(directory, shards), strict=True):
        for name, tensor in read(path).items():
            tensors[name] = tensor
            holders.setdefault(name, []).append(shard)
    faults = [
        f"{spell(name)} is in {' and '.join(found) or 'no shard'}; allowed: in "
        f"{files.get(name, 'none')} alone, as the index says"
        for name, found in holders.items()
        if found != [files.get(name)]
    ]
    if faults:
        raise _refusal(index, *faults)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        found = spell(files)
        raise _refusal(path, f"weight_map is {found}; allowed: tensor -> file name")
    faults = [
        f"{spell(name)} is in {spell(file)}; allowed: a plain name beside the index"
        for name, file in files.items()
        if not (isinstance(file, str) and FILE_NAME.fullmatch(file))
    ]
    if faults:
        raise _refusal(path, *faults)
    return files


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_build_object)
        if b"\\u" in text:  # may spell half a character
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        fault = f"it holds no JSON in UTF-8 with distinct keys: {error}"
        raise _refusal(path, fault) from None
    if not isinstance(values, dict):
        raise _refusal(path, f"its JSON is {spell(values)}; allowed: an object")
    return values


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = [spell(name) for name, count in counts.items() if count > 1]
        raise ValueError(f"{', '.join(twice[:16])} more than once")
    return values


def _read_safetensors(path: Path) -> Tensors:
    size = path.stat().st_size
    if size < 10:
        raise _refusal(path, f"it has {size} bytes; allowed: 10 or more")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        most = min(size - 8, JSON_BYTES)
        if not 2 <= length <= most:
            raise _refusal(path, f"its header has {length} bytes; allowed: 2 to {most}")
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or {type(v) for v in metadata.values()} - {str}:
        found = spell(metadata)
        raise _refusal(path, f"__metadata__ is {found}; allowed: name -> string")
    start = 8 + length
    faults = [_find_fault(name, entry, size - start) for name, entry in header.items()]
    if faults := list(filter(None, faults)):
        raise _refusal(path, *faults)
    tensors = {}
    for name, entry in header.items():
        dtype, offset = DTYPES[entry["dtype"]], start + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, dtype, tuple(entry["shape"]), offset)
    if faults := _find_gaps(tensors, start, size):
        raise _refusal(path, *faults)
    return {**tensors}


def _find_fault(name: str, entry: Any, data_bytes: int) -> str | None:
    if not _is_plain(name):
        return f"{spell(name)} is a name; allowed: {PLAIN}"
    if not isinstance(entry, dict):
        return f"{spell(name)} is {spell(entry)}; allowed: an object"
    dtype, shape, offsets = map(entry.get, ("dtype", "shape", "data_offsets"))
    if dtype not in list(DTYPES):
        found, allowed = spell(dtype), ", ".join(DTYPES)
        return f"{spell(name)} has dtype {found}; allowed: {allowed}"
    # Zeros left out: numpy cannot hold (2**62, 2**62, 0) either.
    if not _are_sizes(shape) or math.prod(n or 1 for n in shape) >= 2**60:
        allowed = f"up to {MAX_DIMS} integers >= 0, their product < 2**60"
        return f"{spell(name)} has shape {spell(shape)}; allowed: {allowed}"
    size = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets if _are_sizes(offsets) and len(offsets) == 2 else (-1, -1)
    if not 0 <= begin <= end <= data_bytes or end - begin != size:
        found, inside = spell(offsets), f"inside of [0, {data_bytes}]"
        return f"{spell(name)} has data_offsets {found}; allowed: {size} bytes {inside}"
    return None


def _is_plain(name: object) -> bool:
    """Say whether `name` is text that can be printed and looks like no path."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    return bool(name) and not any(part in name for part in ("/", "\\", ".."))


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > MAX_DIMS:
        return False
    return all(type(value) is int and value >= 0 for value in values)


def _find_gaps(tensors: dict[str, StoredTensor], start: int, size: int) -> list[str]:
    """Return a line for each place where the tensors do not tile the data."""
    faults = []
    position = start
    for name in sorted(tensors, key=lambda n: (tensors[n].offset, tensors[n].nbytes)):
        begin = tensors[name].offset
        if begin != position:
            kind = "overlaps another" if begin < position else "is behind a hole"
            places = f"begins at byte {begin}; allowed: {position}"
            faults.append(f"{name!r} {kind}: it {places}")
        position = max(position, begin + tensors[name].nbytes)
    if position != size:
        faults.append(f"it has {size} bytes; allowed: {position}, the tensors' end")
    return faults


def _read_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path} is a pickle, which torch reads, and torch is not installed; "
            "pip install torch"
        ) from None
    # CVE-2025-32434, CVE-2026-24747: before 2.10 weights_only can run code. Versions
    # compare by their numbers, not as text.
    version, allowed = torch.__version__, "2.10 or newer; pip install -U torch"
    check(version >= "2.10", "the version of torch", str(version), allowed)
    with path.open("rb") as file:  # torch before 1.6 wrote no zip, which cannot map
        is_zip = file.read(4) == b"PK\3\4"
    try:
        values = torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    except TORCH_ERRORS as error:
        kind = type(error).__name__
        fault = f"torch's weights_only finds damage or more than tensors ({kind})"
        raise _refusal(path, fault) from None
    if not isinstance(values, dict):
        raise _refusal(path, f"it holds a {type(values).__name__}; allowed: a dict")
    known = {f"torch.{dtype}": dtype for dtype in DTYPES.values()}
    tensors: Tensors = {}
    faults = []
    for name, value in values.items():
        dtype = known.get(str(getattr(value, "dtype", None)))
        is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if dtype is None or not is_dense or value.is_meta or not _is_plain(name):
            found = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            allowed = f"plain names of dense tensors of {', '.join(map(str, known))}"
            faults.append(f"{name!r} is {found}; allowed: {allowed}")
        else:  # torch hands no bfloat16 to numpy
            bits = value.detach()
            bits = bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits
            tensors[name] = bits.numpy(force=True).view(dtype)
    if faults:
        raise _refusal(path, *faults)
    return tensors


def _find_unwritable(
    tensors: Mapping[str, np.ndarray], dtype: np.dtype | None
) -> list[str]:
    faults = []
    for name, tensor in tensors.items():
        stored = dtype or tensor.dtype
        if not _is_plain(name) or name == "__metadata__":
            faults.append(f"{name!r} is a name; allowed: {PLAIN}")
        elif stored not in DTYPES.values():
            allowed = ", ".join(map(str, DTYPES.values()))
            faults.append(f"{name!r} has dtype {stored}; allowed: {allowed}")
        elif np.any(np.isfinite(tensor) & ~np.isfinite(_prepare(tensor, stored))):
            mend = "write bfloat16 or float32"
            faults.append(f"{name!r} has numbers too large for {stored}; {mend}")
    return faults


def _prepare(tensor: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    with np.errstate(over="ignore"):  # _find_unwritable says which
        cast = tensor.astype(dtype or tensor.dtype, copy=False)
    # safetensors 0.8.0 writes other layouts wrong (safetensors#825); a scalar becomes
    # a vector on the way.
    return np.ascontiguousarray(cast).reshape(cast.shape)


def _split(sizes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Return file -> names, split as by huggingface_hub serialization/_base.py."""
    shards: list[list[str]] = []
    part: list[str] = []
    for name, size in sizes.items():
        if size > shard_bytes:
            shards.append([name])
            continue
        if sum(sizes[n] for n in part) + size > shard_bytes:
            shards.append(part)
            part = []
        part.append(name)
    if part or not shards:
        shards.append(part)
    if len(shards) == 1:
        return {SAFE: shards[0]}
    last = f"{len(shards):05}"
    return {f"model-{i:05}-of-{last}.safetensors": s for i, s in enumerate(shards, 1)}
