"""Convert a model: load it, write it in another layout, verify it, upload it.

OUT appears whole, once everything asked for is good, or not at all.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

from gpt2_jax import export, hub
from gpt2_jax.card import make_card, read_facts
from gpt2_jax.config import SHAPE, ConfigError, ModelConfig, check
from gpt2_jax.hf import params_from_hf, params_to_hf
from gpt2_jax.pretrained import GPT2, load, locate

LAYOUTS = ("hf", "gpt2_jax")
COMPARED = (1, 8)  # tokens of the rows whose logits are compared, beside the context

Text = str | tuple[int, ...]


class VerifyError(ConfigError):
    """What was written is not the model that was asked for."""


class Answer(NamedTuple):
    """What somebody published as a model's greedy continuation, prompt included."""

    prompt: Text
    new_tokens: int
    text: Text  # of the kind of the prompt
    source: str  # repository and path


class Known(NamedTuple):
    """What is known of a model on the Hub."""

    n_params: int  # keras-team/keras-hub keras_hub/src/models/gpt2/gpt2_presets.py
    answers: tuple[Answer, ...]


DOG = (464, 3290)  # The dog
FOUND = (373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13)
TRANSFORMERS = "huggingface/transformers tests/models/gpt2/test_modeling_gpt2.py"
LIFE = "What is the answer to life, the universe, and everything?"
LATE = "Hello. I'm a little late to the party, but"
TINYGRAD = "tinygrad/tinygrad examples/gpt2.py"  # at temperature 0 and --count 10
# Of gpt2-large and gpt2-xl in full precision nothing greedy was found to be published.
KNOWN = {
    "gpt2": Known(
        124_439_808, (Answer(DOG, 18, (*DOG, *FOUND, 198, 198, *DOG), TRANSFORMERS),)
    ),
    "gpt2-medium": Known(
        354_823_168,
        (
            Answer(LIFE, 10, f"{LIFE}\n\nThe answer is that we are all one", TINYGRAD),
            Answer("Hello.", 10, LATE, TINYGRAD),
        ),
    ),
    "gpt2-large": Known(774_030_080, ()),
    "gpt2-xl": Known(1_557_611_200, ()),
}


def convert(
    name: str | Path,
    out: str | Path,
    *,
    to: str = "hf",
    dtype: str = "float32",
    verify: bool = False,
    force: bool = False,
    push: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the model `name` to `out` in Hugging Face layout or ours; return `out`.

    `name` is what `pretrained.load` takes. `verify` loads what was written and compares
    weights, logits and, of OpenAI's four, published answers. `push` names a repository
    on the Hub that `out` is uploaded to.

    Raises
    ------
    ConfigError
        If `out` may not be replaced, an option is wrong, or the model cannot be loaded.
    VerifyError
        If what was written differs from `name`; `out` is then as it was.
    """
    name, out = str(name), Path(out)
    _check_options(name, out, to=to, dtype=dtype, push=push)
    export.check_free(out, force=force)
    directory = locate(name, revision=revision, allow_pickle=allow_pickle)
    lm = load(directory, dtype="float32", allow_pickle=allow_pickle)
    source, title = _bare_name(name, revision), out.resolve().name
    say(f"{source}: {lm.config.n_params:,} parameters")
    with export.replacing(out, force=force) as partial:
        _write(lm, partial, name=title, source=source, to=to, dtype=dtype)
        card = make_card(
            lm.config,
            read_facts(directory, lm.params, source=source),
            title=push or title,
            layout=to,
            dtype=dtype,
            tokenizer=None if lm.tokenizer is None else lm.tokenizer.name,
            license="mit" if _official(name) else None,  # openai-community's README.md
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if verify:
            copy = load(partial, dtype="float32")
            say(compare(lm, copy, dtype=dtype))
            exact = copy if dtype == "float32" else lm  # rounding may turn a choice
            say(check_answers(exact, _official(name)))
    say(f"{out}: written in {dtype}, layout {to}")
    if push is not None:
        say(f"uploaded to {hub.upload(out, push, message=f'Add {source} in {dtype}')}")
    return out


def compare(lm: GPT2, copy: GPT2, *, dtype: str) -> str:
    """Return one line that says how `copy`, written in `dtype`, equals `lm`.

    Config, tokenizer and weights are equal to the bit once the weights are rounded to
    `dtype`; so are the logits, in float32. Otherwise their tolerance is u sqrt(m) times
    the largest logit: m matrices in a row, each with an independent relative error of
    at most u, half the spacing of `dtype` at 1.

    Raises
    ------
    VerifyError
        If they are not; it names the largest difference.
    """
    _compare_configs(lm, copy)
    copy = _padded_like(lm, copy)
    count = _compare_weights(lm, copy, dtype)
    worst, allowed = 0.0, 0.0
    for ids in _rows(lm.config):
        wanted, found = (np.asarray(m.logits(ids)) for m in (lm, copy))
        gap = _largest_difference(wanted, found)
        allowed = _tolerance(lm.config, dtype, wanted)
        if not gap <= allowed:
            raise VerifyError(
                f"logits of {len(ids)} tokens differ by up to {gap:.3g}; allowed in "
                f"{dtype}: {allowed:.3g}; OUT is not written"
            )
        worst = max(worst, gap)
    how = "to the bit" if dtype == "float32" else f"to the bit, once in {dtype}"
    text = f"verified: {count} tensors equal {how}; logits"
    near = f"within {worst:.3g} (allowed {allowed:.3g})" if allowed else "equal too"
    return f"{text} of up to {lm.config.n_ctx} tokens {near}"


def check_answers(lm: GPT2, official: str | None) -> str:
    """Return one line that says which published answers `lm` gives.

    Raises
    ------
    VerifyError
        If it gives another one, or is not of the official model's size.
    """
    if official is None:
        return "no published answers: MODEL is not one of OpenAI's four by name"
    known = KNOWN[official]
    if lm.config.n_params != known.n_params:
        raise VerifyError(
            f"{official} has {known.n_params:,} parameters, found "
            f"{lm.config.n_params:,}; OUT is not written"
        )
    if not known.answers:
        compared = "its size, weights and logits were compared, nothing else"
        return f"no published answer is known for {official}: {compared}"
    for answer in known.answers:
        found = _answer(lm, answer)
        if found != answer.text:
            raise VerifyError(
                f"{official} continues {answer.prompt!r} as {found!r}; "
                f"{answer.source} expects {answer.text!r}; OUT is not written"
            )
    sources = ", ".join(dict.fromkeys(answer.source for answer in known.answers))
    return f"{len(known.answers)} published answers given, as in {sources}"


def _check_options(
    name: str, out: Path, *, to: str, dtype: str, push: str | None
) -> None:
    check(to in LAYOUTS, "to", to, ", ".join(LAYOUTS))
    allowed = list(export.DTYPES) if to == "hf" else ["float32"]
    check(dtype in allowed, "dtype", dtype, f"{', '.join(allowed)}, with --to {to}")
    if push is not None:
        check(to == "hf", "push", push, "none with --to gpt2_jax: the Hub has --to hf")
        good = hub.is_name(push) and hub.split_name(push)[1] is None
        check(
            good, "push", push, "ORG/NAME on the Hugging Face Hub, without a revision"
        )
    if Path(name).is_dir() and Path(name).resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"OUT {str(out)!r} is or holds MODEL {name!r}, which would be deleted; "
            "choose another"
        )


def _bare_name(name: str, revision: str | None) -> str:
    """Return the name without the paths of this machine, with its revision."""
    if Path(name).is_dir():
        return Path(name).resolve().name
    return f"{name}@{revision}" if revision and "@" not in name else name


def _official(name: str) -> str | None:
    """Return which of OpenAI's four on the Hub `name` names, at any revision."""
    if Path(name).is_dir():
        return None
    repo = hub.split_name(name)[0].removeprefix("openai-community/")
    return repo if repo in KNOWN else None


def _write(
    lm: GPT2, directory: Path, *, name: str, source: str, to: str, dtype: str
) -> None:
    if to == "hf":
        export.write_hf(lm.config, lm.params, lm.tokenizer, directory, dtype=dtype)
    elif lm.tokenizer is None:
        raise ConfigError(
            f"MODEL {source!r} has no tokenizer, which a run directory needs; add "
            "vocab.json and merges.txt, or tokenizer.json, or use --to hf"
        )
    else:
        export.write_run(
            lm.config, lm.params, lm.tokenizer, directory, name=name, source=source
        )


def _compare_configs(lm: GPT2, copy: GPT2) -> None:
    names = [name for name in SHAPE if name != "vocab_multiple"]  # of memory, no file
    pairs = {n: (getattr(lm.config, n), getattr(copy.config, n)) for n in names}
    marks = [
        None if m.tokenizer is None else m.tokenizer.fingerprint for m in (lm, copy)
    ]
    pairs["tokenizer"] = (marks[0], marks[1])
    faults = [
        f"{n} {old!r} -> {new!r}" for n, (old, new) in pairs.items() if old != new
    ]
    if faults:
        raise VerifyError(f"what was written differs: {', '.join(faults)}")


def _padded_like(lm: GPT2, copy: GPT2) -> GPT2:
    """Return the copy with `lm`'s padding: of another width, sums round otherwise."""
    if copy.config.vocab_multiple == lm.config.vocab_multiple:
        return copy
    tensors = params_to_hf(copy.config, copy.params)
    return GPT2(lm.config, params_from_hf(lm.config, tensors), copy.tokenizer)


def _compare_weights(lm: GPT2, copy: GPT2, dtype: str) -> int:
    wanted = params_to_hf(lm.config, lm.params)
    found = params_to_hf(copy.config, copy.params)
    gaps = {}
    for name, tensor in wanted.items():
        rounded = tensor.astype(export.DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(rounded.view(np.uint32), found[name].view(np.uint32)):
            gaps[name] = _largest_difference(rounded, found[name])
    if gaps:
        name = max(gaps, key=lambda key: gaps[key])
        raise VerifyError(
            f"{len(gaps)} tensors differ from MODEL's in {dtype}, the most {name}, by "
            f"up to {gaps[name]:.3g}; OUT is not written"
        )
    return len(wanted)


def _rows(config: ModelConfig) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for length in sorted({min(n, config.n_ctx) for n in (*COMPARED, config.n_ctx)}):
        yield random.integers(config.n_vocab, size=length)


def _largest_difference(
    wanted: Float[np.ndarray, "..."], found: Float[np.ndarray, "..."]
) -> float:
    """Return it; where one is not finite it is infinite, unless both are alike."""
    alike = wanted.view(np.uint32) == found.view(np.uint32)
    with np.errstate(invalid="ignore"):
        gap = np.where(alike, 0, np.abs(wanted - found))
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max())


def _tolerance(config: ModelConfig, dtype: str, logits: np.ndarray) -> float:
    if dtype == "float32":
        return 0.0
    rounding = float(ml_dtypes.finfo(export.DTYPES[dtype]).eps) / 2
    matrices = 4 * config.n_layer + 2  # qkv, out, up, down; embedding and head
    return rounding * math.sqrt(matrices) * float(np.abs(logits).max())


def _answer(lm: GPT2, answer: Answer) -> Text:
    prompt = answer.prompt if isinstance(answer.prompt, str) else list(answer.prompt)
    [found] = lm.generate(
        prompt, max_new_tokens=answer.new_tokens, temperature=0.0, details=True
    )
    if isinstance(answer.prompt, str):
        return found["generated_text"]
    return (*answer.prompt, *found["token_ids"].tolist())
