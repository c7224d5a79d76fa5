"""One completion: its texts through the engine, its answer in pieces or whole."""

import asyncio
import codecs
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer

from gpt2_jax.decode import Row, Sampling
from gpt2_jax.features import next_log_probs
from gpt2_jax.pretrained import GPT2
from gpt2_jax.serve.engine import Drawn, Engine, Writing, likeliest
from gpt2_jax.serve.protocol import (
    Choice,
    Completion,
    CompletionRequest,
    Refused,
    TopLogprobs,
    Usage,
)
from gpt2_jax.stopping import TextStream
from gpt2_jax.tokenizer import Tokenizer

Ids = Integer[np.ndarray, " T"]


class Token(NamedTuple):
    """A token of an answer."""

    id: int
    log_prob: float | None  # None: nothing stands before it
    tops: list[tuple[int, float]]


class Piece(NamedTuple):
    """Some more of one text."""

    number: int  # of the text in its request
    text: str
    tokens: list[Token]
    reason: Literal["stop", "length"] | None = None  # None: it goes on
    error: Exception | None = None
    echo: bool = False  # the prompt, not what was written


@dataclass(eq=False)
class _Whole:
    """All pieces of one text."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    echoed: int = 0  # tokens
    reason: Literal["stop", "length"] | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.echoed += len(piece.tokens) if piece.echo else 0
        self.reason = piece.reason

    def mean(self) -> float:
        """Return the mean log-probability of what was written."""
        values = [token.log_prob or 0.0 for token in self.tokens[self.echoed :]]
        return sum(values) / max(len(values), 1)


@dataclass(eq=False)
class _Text:
    """One text while it is written; its methods run in the engine's thread."""

    number: int
    tokenizer: Tokenizer
    stops: list[str]
    at_once: bool  # tell every piece, not only the whole
    post: Callable[[Piece], None]
    drawn: list[Token] = field(default_factory=list)
    text: str = ""
    reason: Literal["stop", "length"] = "length"
    sent: int = 0

    def __post_init__(self):
        self._out = TextStream(self.tokenizer, self.stops)

    def take(self, drawn: Drawn) -> bool:
        if drawn.token == self.tokenizer.eot:
            self.reason = "stop"
            return False
        self.drawn.append(Token(*drawn))
        self.text += self._out.push(drawn.token)
        if self._out.stopped:
            self.reason = "stop"
            return False
        if self.at_once and self.text:
            self._post(self._out.sent_tokens)
        return True

    def end(self, error: Exception | None) -> None:
        if not self._out.stopped:
            self.text += self._out.close()
        self._post(self._out.kept_tokens, self.reason, error)

    def _post(self, count, reason=None, error=None):
        tokens, text = self.drawn[self.sent : count], self.text
        self.sent, self.text = max(self.sent, count), ""
        self.post(Piece(self.number, text, tokens, reason, error))


class _Offsets:
    """Counts characters, token by token, as they come out of bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._count = 0

    def count(self, tokens: list[Token]) -> list[int]:
        """Return the character at which each of the next tokens begins."""
        found = []
        for token in tokens:
            found.append(self._count)
            data = self._tokenizer.decode_bytes([token.id])
            self._count += len(self._decoder.decode(data))
        return found


class Answer:
    """The answer to one request, while it is made; `cancel` it when nobody waits.

    Raises
    ------
    Refused
        If the request cannot be done, and why.
    FullError, ClosedError
        If the engine takes no more.
    """

    def __init__(self, lm: GPT2, name: str, engine: Engine, asked: CompletionRequest):
        check_model(asked.model, name)
        self._lm, self._name, self._engine, self._asked = lm, name, engine, asked
        self._tokenizer: Any = lm.tokenizer  # the server has seen that there is one
        listed = _listed(asked.prompt)
        self._prompts = [_to_ids(self._tokenizer, prompt) for prompt in listed]
        if (keep := asked.truncate_prompt_tokens) is not None:
            self._prompts = [ids[-keep:] for ids in self._prompts]
        self._n = asked.n or 1
        self._each = max(asked.best_of or self._n, self._n)  # texts per prompt
        self._most = 16 if asked.max_tokens is None else asked.max_tokens
        self._check()
        self.id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._writings: list[Writing] = []
        self.began, self.first_token_at = time.perf_counter(), None
        self.prompt_tokens = sum(map(len, self._prompts))
        self.completion_tokens = 0

    def _check(self):
        asked, n_ctx = self._asked, self._lm.config.n_ctx
        refuse_if(asked.suffix is not None, "suffix", "it is not supported")
        refuse_if(
            asked.best_of is not None and asked.best_of < self._n,
            "best_of",
            f"it is {asked.best_of}; allowed: at least n = {self._n}",
        )
        streams = bool(asked.stream)
        text = f"it is above n = {self._n}; allowed: only without stream"
        refuse_if(streams and self._each > self._n, "best_of", text)
        text = "allowed: only with stream"
        refuse_if(
            asked.stream_options is not None and not streams, "stream_options", text
        )
        text = "it is 0; allowed: at least 1, or 0 with echo"
        refuse_if(self._most == 0 and not asked.echo, "max_tokens", text)
        for prompt in self._prompts:
            excess = len(prompt) + self._most - n_ctx
            refuse_if(
                excess > 0,
                "max_tokens" if len(prompt) < n_ctx else "prompt",
                f"prompt of {len(prompt)} tokens + max_tokens = {self._most} exceed "
                f"the context of {n_ctx} by {excess}; shorten the prompt, lower "
                "max_tokens or set truncate_prompt_tokens",
                code="context_length_exceeded",
            )
        known = self._tokenizer
        for token in asked.logit_bias or {}:
            allowed = f"allowed: token ids below {known.n_vocab}"
            refuse_if(int(token) >= known.n_vocab, "logit_bias", f"{token}; {allowed}")
        texts, most = self._each * len(self._prompts), self._engine.most
        text = f"{texts} texts at once; allowed: {most}"
        refuse_if(texts > most, "n" if self._each > 1 else "prompt", text)

    def start(self) -> None:
        """Hand the texts to the engine."""
        if self._most == 0:
            return
        asked, loop = self._asked, asyncio.get_running_loop()

        def post(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        how = Sampling(
            _or(asked.temperature, 1.0),
            asked.top_k,
            _or(asked.top_p, 1.0),
            _or(asked.min_p, 0.0),
            _or(asked.repetition_penalty, 1.0),
        )
        for number in range(len(self._prompts) * self._each):
            prompt = self._prompts[number // self._each]
            stops, streams = _listed(asked.stop or []), bool(asked.stream)
            text = _Text(number, self._tokenizer, stops, streams, post)
            self._writings.append(
                Writing(
                    row=Row(prompt, self._most, seed, number % self._each),
                    sampling=how,
                    take=text.take,
                    end=text.end,
                    tops=asked.logprobs or 0,
                    presence_penalty=_or(asked.presence_penalty, 0.0),
                    frequency_penalty=_or(asked.frequency_penalty, 0.0),
                    logit_bias={
                        int(k): float(v) for k, v in (asked.logit_bias or {}).items()
                    },
                )
            )
        self._engine.submit(self._writings)

    def cancel(self) -> None:
        """Write no more of it."""
        for writing in self._writings:
            writing.cancelled = True

    async def pieces(self) -> AsyncIterator[Piece]:
        """Give the texts piece by piece, an echo first."""
        if self._asked.echo:
            for number in range(len(self._prompts) * self._each):
                yield await self._echo(number)
        left = len(self._writings)
        while left:
            piece = await self._pieces.get()
            self.first_token_at = self.first_token_at or time.perf_counter()
            if piece.error is not None:
                self.cancel()
                raise piece.error
            left -= piece.reason is not None
            self.completion_tokens += len(piece.tokens)
            yield piece

    async def _echo(self, number: int) -> Piece:
        """Return a prompt as the first piece of its text."""
        ids = self._prompts[number // self._each]
        asked, tokens = self._asked, []
        if asked.logprobs is not None:
            count = asked.logprobs
            work = self._engine.call(lambda: list(_score(self._lm, ids, count)))
            tokens = await asyncio.wrap_future(work)
        reason = None if self._most else "length"
        text = self._tokenizer.decode(ids)
        return Piece(number, text, tokens, reason, echo=True)

    async def whole(self) -> Completion:
        """Return the finished answer."""
        texts = [_Whole() for _ in range(len(self._prompts) * self._each)]
        async for piece in self.pieces():
            texts[piece.number].add(piece)
        choices = []
        for start in range(0, len(texts), self._each):
            group = texts[start : start + self._each]
            if self._each > self._n:  # the likeliest per token
                group = sorted(group, key=_Whole.mean, reverse=True)
            for text in group[: self._n]:
                choice = Choice(
                    index=len(choices),
                    text=text.text,
                    logprobs=self._logprobs(text.tokens, _Offsets(self._tokenizer)),
                    finish_reason=text.reason,
                )
                choices.append(choice)
        return self._completion(choices, self.usage())

    async def events(self) -> AsyncIterator[Completion]:
        """Give the answer as it is written, one event a piece."""
        count = len(self._prompts) * self._each
        offsets = [_Offsets(self._tokenizer) for _ in range(count)]
        async for piece in self.pieces():
            logprobs = self._logprobs(piece.tokens, offsets[piece.number])
            choice = Choice(
                index=piece.number,
                text=piece.text,
                logprobs=logprobs,
                finish_reason=piece.reason,
            )
            yield self._completion([choice], None)
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            yield self._completion([], self.usage())

    def usage(self) -> Usage:
        """Return the tokens so far."""
        total = self.prompt_tokens + self.completion_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=total,
        )

    def _completion(self, choices, usage) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._name,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, tokens: list[Token], offsets: _Offsets) -> TopLogprobs | None:
        if self._asked.logprobs is None:
            return None
        names = [name_token(self._tokenizer, token.id) for token in tokens]
        tops = [self._name_tops(token) for token in tokens]
        return TopLogprobs(
            tokens=names,
            token_logprobs=[token.log_prob for token in tokens],
            top_logprobs=tops if self._asked.logprobs else None,
            text_offset=offsets.count(tokens),
        )

    def _name_tops(self, token: Token) -> dict[str, float] | None:
        if token.log_prob is None:
            return None
        tops = [*token.tops, (token.id, token.log_prob)]  # the drawn one is among them
        return {name_token(self._tokenizer, i): p for i, p in reversed(tops)}


def check_model(asked: str, name: str) -> None:
    """Refuse another model than the one that is served."""
    if asked != name:
        text = f"model is {asked[:100]!r}; served here: {name!r}"
        raise Refused(text, status=404, param="model", code="model_not_found")


def refuse_if(
    bad: bool, field_name: str, text: str, *, code: str | None = None
) -> None:
    """Raise `Refused` with the field that is wrong."""
    if bad:
        raise Refused(f"{field_name}: {text}", param=field_name, code=code)


def _to_ids(tokenizer: Tokenizer, prompt: Any) -> Ids:
    if isinstance(prompt, str):
        return np.asarray(tokenizer.encode(prompt), np.int64)
    most = max(prompt)
    allowed = f"allowed: ids below {tokenizer.n_vocab}"
    refuse_if(most >= tokenizer.n_vocab, "prompt", f"token id {most}; {allowed}")
    return np.asarray(prompt, np.int64)


def _listed(value: Any) -> list[Any]:
    """Return a list of texts or of lists of ids."""
    single = isinstance(value, str) or value and isinstance(value[0], int)
    return [value] if single else list(value)


def _or(value, default):
    return default if value is None else float(value)


def _score(lm: GPT2, ids: Ids, tops: int) -> Iterator[Token]:
    """Give the tokens of a prompt, each with its log-probability after all before."""
    yield Token(int(ids[0]), None, [])
    rows = next_log_probs(lm.config, lm.params, ids)
    for token, row in zip(ids[1:], rows, strict=False):
        found = likeliest(row, tops) if tops else []
        yield Token(int(token), float(row[token]), found)


def name_token(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; half a character as OpenAI writes it, `bytes:\\xe2`."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
