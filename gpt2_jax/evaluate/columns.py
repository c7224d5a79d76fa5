"""The columns of the table: file, protocol, requests, number."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate import cbt, files, lambada, texts
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.evaluate.scoring import (
    Answer,
    Choice,
    Request,
    score,
    score_choices,
    window_requests,
)
from gpt2_jax.evaluate.table import UNITS, Result
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import Tokenizer

Say = Callable[[str], None]


class Job(NamedTuple):
    """A model, what it is asked, and where answers are kept."""

    lm: GPT2
    tokenizer: Tokenizer
    options: EvaluateOptions
    journals: Path | None
    say: Say
    kept: dict[Any, Any]  # what two columns share

    def answers(self, name: str, requests: Sequence[Request], **how: Any):
        """Return the answers to the requests of one task; `how` goes to `score`."""
        how |= dict(journal=self._journal(name), say=self._told(name))
        found = score(self.lm, requests, **how)
        _check_finite(name, [answer.nll for answer in found])
        return found

    def choices(self, name: str, choices: Sequence[Choice]) -> list[list[float]]:
        """Return the nll of every ending of one task."""
        how: dict[str, Any] = dict(journal=self._journal(name), say=self._told(name))
        found = score_choices(self.lm, choices, **how)
        _check_finite(name, [nll for row in found for nll in row])
        return found

    def _journal(self, name):
        return None if self.journals is None else self.journals / f"{name}.jsonl"

    def _told(self, name):
        return lambda line: self.say(f"{name}: {line}")


def evaluate(
    lm: GPT2,
    options: EvaluateOptions,
    *,
    journals: Path | None = None,
    say: Say = lambda line: None,
) -> list[Result]:
    """Return a row for each task.

    One whose file is missing says where to get it; one whose file has another checksum
    (without `any_data`) or is damaged says so, with the line: `value` is None.
    `journals` is a directory where answers are kept while they come: called again with
    the same model, files and options, it goes on where it was.

    Raises
    ------
    ConfigError
        If a task is not known, an option is out of range for the model, or the model
        has no tokenizer.
    FloatingPointError
        If the model gives log-probabilities that are not finite.
    """
    names = options.task_names()
    options.sizes(lm.config.n_ctx)
    if lm.tokenizer is None:
        raise ConfigError("this model has no tokenizer: add its files and load again")
    job = Job(lm, lm.tokenizer, options, journals, say, {})
    return [_run(job, name) for name in names]


def _run(job: Job, name: str) -> Result:
    file = files.FILES[_file_key(job.options, name)]
    path = files.find(job.options.data_dir, file)
    if path is None:
        put = f"put {file.name} from {file.where} into {job.options.data_dir}"
        return Result(name, "", note=f"not run: {put}")
    began = time.perf_counter()
    try:
        note = files.verify(path, file, job.options.any_data)
        job.say(f"{name}: {path}")
        found = TASKS[name](job, name, path)
    except ConfigError as error:
        return Result(name, "", note=f"{REFUSED}{error}")
    notes = "; ".join(filter(None, (found.note, note)))
    return found._replace(seconds=time.perf_counter() - began, note=notes)


def _file_key(options: EvaluateOptions, name: str) -> str:
    valid = "_valid" if options.ptb_split == "valid" else ""
    test = "_test" if options.cbt_split == "test" else ""
    keys = dict(
        lambada_ppl="lambada",
        lambada_acc="lambada",
        lm_eval_lambada="lambada",
        cbt_cn=f"cbt_cn{test}",
        cbt_ne=f"cbt_ne{test}",
        ptb=f"ptb{valid}",
        hf_wikitext2="wikitext2_raw",
        lm_eval_wikitext="wikitext2_raw",
    )
    return keys.get(name, name)


def _text(job: Job, name: str, path: Path) -> Result:
    """Score a text column by a sliding window, in units of its file."""
    options = job.options
    how: dict[str, Any] = {} if options.unit is None else dict(unit=options.unit)
    if name == "lm1b":
        how["stream"] = options.lm1b_text == "stream"
    detok = DETOK[name] if options.detok is None else options.detok
    if name == "text8":
        detok = "none"  # there is nothing to undo
    else:
        how["detok"] = detok
    column = getattr(texts, name)(path, **how)
    window, stride = options.sizes(job.lm.config.n_ctx)
    rows = [_start(job, texts.encode(job.tokenizer, d.text)) for d in column.documents]
    requests = [part for row in rows for part in window_requests(row, window, stride)]
    tokens = sum(max(0, len(row) - 1) for row in rows)
    units = tokens if options.unit == "token" else column.units
    _check_some(path, min(len(requests), units))
    answers = job.answers(name, requests, hits=False)
    nll = math.fsum(answer.nll for answer in answers)
    kind = UNITS[name] if options.unit is None else f"{_measure(name)}/{options.unit}"
    per_unit = nll / units
    value = per_unit / math.log(2) if _measure(name) == "bits" else _exp(per_unit)
    words = f"de-tokenizer {detok}, window {window}, stride {stride}"
    protocol = f"{path.name}, {words}, start {options.start}"
    if name == "lm1b":
        protocol += f", {options.lm1b_text}"
    note = "; ".join(column.notes)
    return Result(name, protocol, value, kind, nll, tokens, units, note=note)


# The column's likeliest reading; docs/evaluation.md has the others.
DETOK = dict(
    wikitext2="invertible",
    wikitext103="none",
    ptb="invertible",
    enwik8="none",
    text8="none",
    lm1b="invertible",
)


ITEMS = dict(valid=2000, test=2500)  # of a CBT file, which has no known checksum


def _check_some(path: Path, count: int) -> None:
    found = f"{path} has nothing to predict; allowed: a token after another"
    if count == 0:
        raise ConfigError(f"{found}; get the file again")


def _measure(name: str) -> str:
    return UNITS[name].partition("/")[0]


def _check_finite(name: str, nll: list[float]) -> None:
    if not all(map(math.isfinite, nll)):
        raise FloatingPointError(
            f"{name}: the model's log-probabilities are not finite; check its weights"
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _start(job: Job, row: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " _"]:
    starts = dict(none=[], eot=[job.tokenizer.eot])
    how = job.options.start
    first = (
        job.tokenizer.encode("\n") if how == "newline" else np.array(starts[how], int)
    )
    return np.concatenate([first, row]).astype(row.dtype)


def _lambada_ppl(job: Job, name: str, path: Path) -> Result:
    """Return exp of the mean nll of the last word."""
    requests, answers = _last_words(job, path)
    nll = math.fsum(answer.nll for answer in answers)
    text = f"text {job.options.lambada_text}, the whole last word"
    return _shared(name, text, _exp(nll / len(requests)), requests, nll)


def _lambada_acc(job: Job, name: str, path: Path) -> Result:
    """Return how often the last word, or its last token, is the likeliest, in %."""
    options = job.options
    requests, answers = _last_words(job, path)
    if options.lambada_target == "last-token":
        hits = sum(answer.last for answer in answers)
    else:
        hits = sum(answer.greedy for answer in answers)
    kept = f"stop words {lambada.STOP_WORDS_SHA256[:8]} are no answer"
    words = kept if options.stop_filter else "any answer"
    target = f"target {options.lambada_target}, greedy, {words}"
    text = f"text {options.lambada_text}, {target}"
    return _shared(name, text, 100 * hits / len(requests), requests)


def _last_words(job: Job, path: Path) -> tuple[list[Request], list[Answer]]:
    """Return requests and answers, the same for perplexity and accuracy."""
    if "lambada" not in job.kept:
        requests = _last_word_requests(job, path, job.options.lambada_text)
        banned = None
        if job.options.stop_filter:
            banned = ~lambada.allowed_first_pieces(job.tokenizer)
        job.kept["lambada"] = requests, job.answers("lambada", requests, banned=banned)
    return job.kept["lambada"]


def _lm_eval_lambada(job: Job, name: str, path: Path) -> Result:
    """Return the perplexity of lambada_openai; its accuracy stands in the note."""
    requests = _last_word_requests(job, path, "lm-eval")
    answers = job.answers(name, requests)
    nll = math.fsum(answer.nll for answer in answers)
    hits = sum(answer.greedy for answer in answers) / len(requests)
    found = _shared(name, "lambada_openai", _exp(nll / len(requests)), requests, nll)
    return found._replace(unit="ppl/word", note=f"acc {hits:.4f}")


def _last_word_requests(
    job: Job, path: Path, text: lambada.Preprocessing
) -> list[Request]:
    most = job.lm.config.n_ctx
    requests = []
    for number, (context, target) in enumerate(lambada.read_items(path, text), 1):
        before, after = (job.tokenizer.encode(part) for part in (context, target))
        if len(before) == 0:  # nothing but blanks before the word
            before = np.array([job.tokenizer.eot])
        if len(after) > most:
            found = f"{path}, line {number}: a last word of {len(after)} tokens"
            raise ConfigError(f"{found}; allowed: at most the context of {most}")
        row = np.concatenate([before, after])[-(most + 1) :]
        requests.append(Request(row, len(row) - len(after)))
    return requests


def _shared(name, protocol, value, requests, nll=None):
    tokens = sum(len(one.tokens) - one.first for one in requests)
    return Result(
        name, protocol, value, UNITS.get(name, ""), nll, tokens, len(requests)
    )


def _cbt(job: Job, name: str, path: Path) -> Result:
    """Return how often the right word's ending is the likeliest of ten, in %."""
    options = job.options
    detok = "none" if options.detok == "none" else "invertible"
    passage = options.cbt_text == "passage"
    start = [job.tokenizer.eot] if passage else []  # as lm-eval's empty context
    count = None if options.any_data else ITEMS[options.cbt_split]
    items = cbt.read_items(path, options.cbt_text, detok, count)
    encode = job.tokenizer.encode
    choices = [
        Choice(
            np.concatenate([start, encode(item.prefix)]).astype(np.int32),
            tuple(map(encode, item.endings)),
        )
        for item in items
    ]
    found = job.choices(name, choices)
    hits = sum(
        int(np.argmin(nll)) == item.answer
        for nll, item in zip(found, items, strict=True)
    )
    tokens = sum(len(ending) for choice in choices for ending in choice.endings)
    words = f"plain text, de-tokenizer {detok}"
    if passage:
        words = "lm-eval v0.3.0's Passage: .. Question: .. and de-tokenizer"
    protocol = f"{path.name}, {words}, summed log-probability"
    value = 100 * hits / len(items)
    return Result(name, protocol, value, UNITS[name], None, tokens, len(items))


def _hf_wikitext2(job: Job, name: str, path: Path) -> Result:
    """Return the perplexity page's number: a mean over windows of means.

    Each window after the first predicts its last `stride` tokens, one fewer where that
    is all of it: huggingface.co/docs/transformers/perplexity. A last window without a
    target, NaN there, does not count.
    """
    size = job.lm.config.n_ctx
    window, stride = job.options.sizes(size, stride=size)
    tokens = texts.encode(job.tokenizer, texts.hf_wikitext2(path).documents[0].text)
    requests, end = [], 0
    for begin in range(0, len(tokens), stride):
        last, end = end, min(begin + window, len(tokens))
        part = tokens[begin:end]
        first = max(1, len(part) - (end - last))
        if first < len(part):
            requests.append(Request(part, first))
        if end == len(tokens):
            break
    _check_some(path, len(requests))
    answers = job.answers(name, requests, hits=False)
    counts = [len(one.tokens) - one.first for one in requests]
    means = [a.nll / n for a, n in zip(answers, counts, strict=True)]
    value = _exp(math.fsum(means) / len(means))
    nll = math.fsum(answer.nll for answer in answers)
    protocol = f"window {window}, stride {stride}, mean over windows, rows joined"
    return Result(name, protocol, value, "ppl/token", nll, sum(counts), sum(counts))


def _lm_eval_wikitext(job: Job, name: str, path: Path) -> Result:
    """Return lm-eval's word_perplexity; byte perplexity and bits are in the note."""
    column, size = texts.lm_eval_wikitext(path), job.lm.config.n_ctx
    n_bytes = texts.lm_eval_wikitext(path, "byte").units
    eot, encode = job.tokenizer.eot, job.tokenizer.encode
    rows = [np.append(eot, encode(document.text)) for document in column.documents]
    requests = [part for row in rows for part in window_requests(row, size, size)]
    answers = job.answers(name, requests, hits=False)
    nll = math.fsum(answer.nll for answer in answers)
    tokens, bits = sum(len(row) - 1 for row in rows), nll / n_bytes / math.log(2)
    note = f"byte_perplexity {_exp(nll / n_bytes):.4f}, bits_per_byte {bits:.4f}"
    protocol = f"articles, de-tokenized, windows of {size} without overlap, start eot"
    value = _exp(nll / column.units)
    kind = "ppl/word"
    return Result(name, protocol, value, kind, nll, tokens, column.units, note=note)


REFUSED = "refused: "
TASKS: dict[str, Callable[[Job, str, Path], Result]] = {
    "lambada_ppl": _lambada_ppl,
    "lambada_acc": _lambada_acc,
    "cbt_cn": _cbt,
    "cbt_ne": _cbt,
    "wikitext2": _text,
    "ptb": _text,
    "enwik8": _text,
    "text8": _text,
    "wikitext103": _text,
    "lm1b": _text,
    "hf_wikitext2": _hf_wikitext2,
    "lm_eval_lambada": _lm_eval_lambada,
    "lm_eval_wikitext": _lm_eval_wikitext,
}
