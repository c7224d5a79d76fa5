"""Tokens in, text out: whole characters only, ended by stop strings."""

import bisect
import codecs
from collections.abc import Sequence

from gpt2_jax.config import ConfigError, check
from gpt2_jax.tokenizer import Tokenizer


class TextStream:
    """The text of one row, token by token.

    Stop strings are looked for in the bytes of the text, so it does not matter how it
    is cut into tokens. The text ends before the first one: of those complete after the
    same token, the one that begins first. What may still become a stop string, and
    half a character, is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        for stop in stops:
            check(bool(stop), "stop", stop, "strings of at least one character")
        self._tokenizer = tokenizer
        self._stops = [_utf8(stop) for stop in stops]
        self._bytes = bytearray()
        self._starts: list[int] = []  # of each token, in bytes
        self._sent = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False

    @property
    def kept_tokens(self) -> int:
        """Return how many tokens begin before the end of the text."""
        return sum(start < len(self._bytes) for start in self._starts)

    @property
    def sent_tokens(self) -> int:
        """Return how many tokens begin inside the text that was returned so far."""
        return bisect.bisect_left(self._starts, min(self._sent, len(self._bytes)))

    def push(self, token: int) -> str:
        """Return the text that is certain once `token` is known."""
        piece = self._tokenizer.decode_bytes([token])
        self._starts.append(len(self._bytes))
        self._bytes += piece
        longest = max(map(len, self._stops), default=0)
        begin = max(len(self._bytes) - len(piece) - longest + 1, 0)
        found = [self._bytes.find(stop, begin) for stop in self._stops]
        found = [place for place in found if place >= 0]
        if found:
            self.stopped = True
            del self._bytes[min(found) :]
            return self.close()
        return self._send(len(self._bytes) - self._held())

    def close(self) -> str:
        """Return the rest of the text, half a character as U+FFFD."""
        return self._send(len(self._bytes)) + self._decoder.decode(b"", final=True)

    def _held(self) -> int:
        """Return the length of the longest end that may become a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._bytes)), longest, -1):
                if self._bytes.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _send(self, end: int) -> str:
        new = bytes(self._bytes[self._sent : end])
        self._sent = max(end, self._sent)
        return self._decoder.decode(new)


def _utf8(stop: str) -> bytes:
    try:
        return stop.encode()
    except UnicodeEncodeError as error:
        allowed = "valid Unicode; a lone surrogate is in no text"
        raise ConfigError(f"stop is {stop!r}; allowed: {allowed}") from error
