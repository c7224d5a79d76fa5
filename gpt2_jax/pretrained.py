"""A model with its tokenizer: `load(MODEL)` -> `GPT2`: generate, features, score."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Integer

from gpt2_jax import export, features, int8, model, tokenizer_files
from gpt2_jax.config import (
    ConfigError,
    Dtype,
    GenerateConfig,
    ModelConfig,
    Quantize,
    check,
    from_dict,
)
from gpt2_jax.decode import as_integers
from gpt2_jax.features import Pool, Score
from gpt2_jax.generation import Generated, write_texts
from gpt2_jax.hf import config_from_hf, params_from_hf
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from gpt2_jax.weights import find_files, open_tensors, read_json

AT_ONCE = 32  # texts computed in one batch; more take turns
SEEDS = "one seed, or one for each prompt"
TEXTS = ("config.json", "generation_config.json", *tokenizer_files.FILES)
TEXTS += ("encoder.json", "vocab.bpe", "eval.json")  # beside the weights
Ids = Integer[np.ndarray, " _"]  # rows differ in length
Text = str | Sequence[int] | Ids  # or its tokens
Texts = Text | Sequence[str] | Sequence[Sequence[int]] | Sequence[Ids]
Truncate = Literal["left"] | None


@dataclass(frozen=True, eq=False)
class GPT2:
    """A model's config, its parameters and its tokenizer.

    `params` is a nested dict of float32 arrays (`gpt2_jax.model` lists it), `tokenizer`
    None where a model came without one and has not GPT-2's vocabulary: then texts are
    given as token ids, and `generate` is not to be had. Everywhere a text is a string
    or its token ids; a single one counts as a batch of one, an empty one as the start
    of a document. `quantize` "int8" is for `generate` alone.
    """

    config: ModelConfig
    params: model.Params
    tokenizer: Tokenizer | None
    quantize: Quantize | None = None

    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        eos: bool = True,
        truncate: Truncate = None,
        slide: bool = False,
        seed: int | Sequence[int] = 0,
        return_full_text: bool = True,
        details: bool = False,
        stream: Callable[[str], None] | None = None,
    ) -> list[Any]:
        """Return `[{"generated_text": ...}]`, as transformers' pipeline does.

        One dict per sequence; for a list of prompts, a list of them for each. What the
        options mean stands in `GenerateConfig`; `temperature` 0 is greedy. The same
        seed draws the same text, whatever else is in the batch; a list of seeds is one
        for each prompt. `stream` is called with every piece of a single text as soon as
        it is certain.

        Returns
        -------
        generated_text
            Prompt and new text, or only the new text without `return_full_text`.
        text, token_ids, log_probs, finish_reason
            With `details`: the new text and its tokens, the model's log-probability of
            each in nats, and "eos", "stop" or "length".

        Raises
        ------
        ConfigError
            If an option is out of range, or a prompt and its new tokens exceed the
            context: the message says by how much.
        FloatingPointError
            If the model gives logits that are not finite.
        """
        how = GenerateConfig(
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            num_return_sequences=num_return_sequences,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            num_beams=num_beams,
            length_penalty=length_penalty,
            stop=() if stop is None else _as_tuple(stop),
            eos=eos,
            truncate=truncate,
            slide=slide,
            seed=_as_tuple(seed),
        )
        found = self.write(prompts, how, stream=stream)
        starts = map(self._as_text, _listed(prompts))
        dicts = [
            [
                _as_dict(start if return_full_text else "", text, details)
                for text in texts
            ]
            for start, texts in zip(starts, found, strict=True)
        ]
        return dicts[0] if _is_single(prompts) else dicts

    def write(
        self,
        prompts: Texts,
        how: GenerateConfig,
        *,
        stream: Callable[[str], None] | None = None,
    ) -> list[list[Generated]]:
        """Return the new texts of every prompt; `generate` with options in one."""
        rows, tokenizer = self._rows(prompts), self._known_tokenizer
        check(len(how.seed) in (1, len(rows)), "seed", how.seed, SEEDS)
        found: list[list[Generated]] = []
        size = max(1, AT_ONCE // how.num_return_sequences)
        for first in range(0, max(len(rows), 1), size):  # no text: options are checked
            part = slice(first, first + size)
            some = replace(how, seed=how.seed if len(how.seed) == 1 else how.seed[part])
            found += write_texts(
                self.config, self.unstacked, tokenizer, rows[part], some, stream=stream
            )
        return found

    def logits(self, ids: Any) -> Float[Array, "*B T V"]:
        """Return float32 next-token logits, shape `ids.shape` + (n_vocab,).

        `ids` is (T,) or (B, T) with T at most `config.n_ctx`.
        """
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            text = "ids are rows of different lengths; allowed: integers of one shape"
            raise ConfigError(f"{text}, (T,) or (B, T)") from error
        good = ids.ndim in (1, 2) and np.issubdtype(ids.dtype, np.integer)
        found = f"{ids.dtype} of shape {ids.shape}"
        check(good, "ids", found, "integers of shape (T,) or (B, T)")
        rows = features.pad(self.config, list(np.atleast_2d(ids))).ids
        found = features.logits(self.config, self.params, rows)
        return found if ids.ndim == 2 else found[0]

    def encode(
        self, texts: Texts, *, truncate: Truncate = None
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Return the token ids, padded with 0 on the right, and where tokens are."""
        return features.pad(self.config, self._rows(texts), truncate=truncate)

    def features(
        self,
        texts: Texts,
        layer: int = -1,
        pool: Pool | None = None,
        *,
        truncate: Truncate = None,
    ) -> Float[np.ndarray, "B *T D"]:
        """Return float32 hidden states of one layer: (B, T, D), or (B, D) with `pool`.

        `layer` counts as transformers' `hidden_states`: 0 the embeddings, i what block
        i gives, -1 (or `config.n_layer`) the last, after the final layer norm. T is the
        longest text's number of tokens; padded positions are 0 and no part of a
        "mean"; "last" is each text's last token. `encode` gives the mask.
        """
        rows, how = self._rows(texts), dict(layer=layer, pool=pool)
        size = len(rows) if pool is None else AT_ONCE  # unpooled, T is that of all
        parts = [rows[i : i + size] for i in range(0, len(rows), size or 1)] or [rows]
        return np.concatenate([self._features(part, truncate, **how) for part in parts])

    def _features(self, rows, truncate, **how):
        batch = features.pad(self.config, rows, truncate=truncate)
        return features.features(self.config, self.params, batch, **how)

    def hidden_states(
        self, texts: Texts, *, truncate: Truncate = None
    ) -> Float[np.ndarray, "K B T D"]:
        """Return the hidden states of all layers, L + 1 of them, as in `features`."""
        batch = features.pad(self.config, self._rows(texts), truncate=truncate)
        return features.hidden_states(self.config, self.params, batch)

    def attentions(
        self, texts: Texts, *, truncate: Truncate = None
    ) -> Float[np.ndarray, "L B N T T"]:
        """Return every head's attention weights: layer, text, head, query, key.

        A row of keys sums to 1; padded queries and keys are 0.
        """
        batch = features.pad(self.config, self._rows(texts), truncate=truncate)
        return features.attentions(self.config, self.params, batch)

    def score(
        self, texts: Texts, *, start: bool = False, truncate: Truncate = None
    ) -> Any:
        """Return each text's log-probabilities per token, total and perplexity.

        A `Score`, or a list of them for a list of texts. The first token has nothing
        before it and is not scored; with `start`, every text begins after
        `<|endoftext|>`, and all its tokens are.
        """
        rows = self._rows(texts)
        if start:
            rows = [np.concatenate([[self._known_tokenizer.eot], row]) for row in rows]
        found: list[Score] = []
        for first in range(0, len(rows), AT_ONCE):
            part = rows[first : first + AT_ONCE]
            batch = features.pad(self.config, part, truncate=truncate)
            found += features.scores(self.config, self.params, batch)
        return found[0] if _is_single(texts) else found

    def save(
        self, directory: str | Path, *, dtype: str = "float32", force: bool = False
    ) -> None:
        """Write a directory that transformers' `from_pretrained` opens, and `load`.

        `dtype` is float32, float16 or bfloat16. The directory appears whole or not at
        all; one that exists is replaced only with `force`.
        """
        with export.replacing(Path(directory), force=force) as partial:
            export.write_hf(
                self.config, self.params, self.tokenizer, partial, dtype=dtype
            )

    @functools.cached_property
    def unstacked(self) -> model.Params:
        """Return what texts are written with, as `model.decode` takes it."""
        dtype = "float32" if self.quantize else self.config.dtype  # rounded once
        unstacked = model.unstack(replace(self.config, dtype=dtype), self.params)
        return int8.quantize(unstacked, self.quantize)

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                "this model has no tokenizer: its directory lacks vocab.json and "
                "merges.txt, or tokenizer.json; add them"
            )
        return self.tokenizer

    def _as_text(self, text: Text) -> str:
        if isinstance(text, str):
            return text
        return self._known_tokenizer.decode(np.asarray(text))

    def _rows(self, texts: Texts) -> list[Ids]:
        return [self._row(text) for text in _listed(texts)]

    def _row(self, text: Text) -> Ids:
        known = isinstance(text, str)
        ids = self._known_tokenizer.encode(text) if known else as_integers(text)
        return ids if len(ids) else np.array([self._known_tokenizer.eot])


def _as_dict(start: str, found: Generated, details: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"generated_text": start + found.text}
    return result | found._asdict() if details else result


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a single value, or the values of a list or array, as Python's own."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,)
    return tuple(x.item() if isinstance(x, np.generic) else x for x in value)


def _is_single(texts: Texts) -> bool:
    array = isinstance(texts, np.ndarray | jax.Array)
    listed = isinstance(texts, Sized) and not isinstance(texts, Mapping | Set)
    good = texts.ndim > 0 if array else listed
    check(good, "texts", texts, "a string, token ids, or a list of them")
    if isinstance(texts, str) or array and texts.ndim == 1:
        return True
    return len(texts) > 0 and isinstance(texts[0], int | np.integer)


def _listed(texts: Texts) -> list[Text]:
    return [texts] if _is_single(texts) else list(texts)  # pyright: ignore[reportReturnType]  a list


def print_to_stderr(line: str) -> None:
    """Print one line to standard error."""
    print(line, file=sys.stderr, flush=True)


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    quantize: Quantize | None = None,
    allow_pickle: bool = False,
    report: Callable[[str], None] = print_to_stderr,
) -> GPT2:
    """Return the model that `name` stands for.

    A run directory of ours (its newest good checkpoint), a directory in Hugging Face
    layout, or a name on the Hub: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`,
    `org/name`, each perhaps with `@revision`. `dtype` is what matrices multiply in;
    "auto" is float32 on CPU and bfloat16 elsewhere. With `quantize` "int8", `generate`
    computes with weights of 8 bits; all else is as it was.

    Raises
    ------
    ConfigError
        If there is no such model, it is not a GPT-2 that this project computes, or a
        file of it is damaged, misshapen or a pickle (without `allow_pickle`).
    """
    int8.check_kind(quantize)
    keep_compiled()
    directory = locate(name, revision=revision, allow_pickle=allow_pickle)
    if _is_run(directory):
        lm = _load_run(directory)
    else:
        lm = _load_hf(directory, allow_pickle=allow_pickle)
    _report_nonfinite(directory, lm.params, report)
    config = model.resolve(replace(lm.config, dtype=dtype))
    params = jax.tree.map(jax.device_put, lm.params)
    return GPT2(config, params, lm.tokenizer, quantize)


def locate(
    name: str | Path, *, revision: str | None = None, allow_pickle: bool = False
) -> Path:
    """Return the directory of a model, after a download where `name` is on the Hub."""
    directory = Path(name)
    if directory.is_dir():
        found = [n for n in ("checkpoints", "config.json") if (directory / n).exists()]
        if not found:
            raise ConfigError(
                f"MODEL {str(name)!r} holds neither checkpoints/ nor config.json; "
                "allowed: a run directory that `gpt2-jax train --run-dir` wrote, or a "
                "directory in Hugging Face layout"
            )
        check(revision is None, "revision", revision, "None for a directory")
        return directory
    # The Hub's library takes 0.4 s to import; a directory needs none of it.
    from gpt2_jax import hub

    if not hub.is_name(str(name)):
        raise ConfigError(
            f"MODEL {str(name)!r} is no directory and no name on the Hugging Face Hub; "
            "allowed: a run directory such as runs/quickstart, a directory in Hugging "
            "Face layout, gpt2, gpt2-medium, gpt2-large, gpt2-xl or org/name"
            f"{_find_near(directory)}"
        )
    try:
        return hub.download(str(name), revision=revision, allow_pickle=allow_pickle)
    except ConfigError as error:
        if near := _find_near(directory):
            raise ConfigError(f"{error}{near}") from error
        raise


def _find_near(directory: Path) -> str:
    """Return a question after the model beside `directory` that is called alike."""
    beside = directory.parent
    models = [
        path.name
        for path in (beside.iterdir() if beside.is_dir() else [])
        if (path / "checkpoints").is_dir() or (path / "config.json").is_file()
    ]
    near = difflib.get_close_matches(directory.name[:200], models, n=1)
    return f"; did you mean {str(beside / near[0])!r}?" if near else ""


def _is_run(directory: Path) -> bool:
    weights = any(directory.glob("*.safetensors")) or any(directory.glob("*.bin"))
    return (directory / "checkpoints").is_dir() and not weights


def keep_compiled() -> None:
    """Keep compiled programs on disk between runs, unless jax was told where to.

    They lie in `~/.cache/gpt2_jax`, or where XDG_CACHE_HOME or
    JAX_COMPILATION_CACHE_DIR says.
    """
    # jax declares its flags at run time.
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if told is None:
        folder = str(cache_directory() / "compiled")
        jax.config.update("jax_compilation_cache_dir", folder)


def cache_directory() -> Path:
    """Return `~/.cache/gpt2_jax`, or what is in XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gpt2_jax"


def read_hf_config(directory: Path) -> tuple[ModelConfig, int | None]:
    """Return the config in `config.json` and the id of its end of text, if it says."""
    path = directory / "config.json"
    # A link, or what is no file, could show or wait for what is not the model's.
    present = [name for name in TEXTS if os.path.lexists(directory / name)]
    find_files(directory, [path.name, *present])
    values = read_json(path)
    ends = values.get("eos_token_id")
    eot: Any = ends[0] if isinstance(ends, list) and ends else ends
    good = eot is None or type(eot) is int
    check(good, f"{path}: eos_token_id", eot, "an integer or null")
    config = config_from_hf(values)
    # A small vocabulary beside transformers' default end of text, 50256.
    return config, eot if eot is not None and 0 <= eot < config.n_vocab else None


def _load_hf(directory: Path, *, allow_pickle: bool) -> GPT2:
    config, eot = read_hf_config(directory)

    def read_weights() -> model.Params:
        tensors = open_tensors(directory, allow_pickle=allow_pickle)
        return params_from_hf(config, tensors)

    with ThreadPoolExecutor(1) as pool:  # copying numbers leaves Python free
        weights = pool.submit(read_weights)
        tokenizer = _find_tokenizer(directory, config, eot)
        return GPT2(config, weights.result(), tokenizer)


def _find_tokenizer(
    directory: Path, config: ModelConfig, eot: int | None
) -> Tokenizer | None:
    tokenizer = read_tokenizer(directory, eos_token_id=eot)
    if tokenizer is None:  # a model of GPT-2's vocabulary size is taken to have it
        names = {257: "bytes", 50_257: "gpt2", 50_304: "gpt2"}
        name = names.get(config.n_vocab)
        return None if name is None else load_tokenizer(name)
    spare = config.n_vocab - tokenizer.n_vocab
    # Some trainers pad the embedding to a multiple of 8, 64 or 128 and keep it.
    if spare and not (0 < spare < 128 and config.n_vocab % 8 == 0):
        raise ConfigError(
            f"{directory}: the tokenizer has {tokenizer.n_vocab} tokens, config.json "
            f"says vocab_size {config.n_vocab}; allowed: the same number (or padding "
            "to a multiple of 8); use the tokenizer files the model was trained with"
        )
    return tokenizer


def _load_run(directory: Path) -> GPT2:
    # Orbax takes half a second to import; Hugging Face's files need none of it.
    from gpt2_jax.checkpoint import read_meta, restore_params

    checkpoints = directory / "checkpoints"
    meta = read_meta(checkpoints)
    if meta is None:
        raise ConfigError(
            f"MODEL {str(directory)!r} holds no checkpoint yet; train it first"
        )
    run = from_dict(meta["config"])
    # Kernel and dtype that a run resolved are those of its machine, not of this one.
    shape = replace(run.model, dtype="auto", attention="auto")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init(shape, jax.random.key(0)))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
    )
    tokenizer = export.open_tokenizer(directory, run.data.tokenizer)
    return GPT2(shape, restore_params(checkpoints, target), tokenizer)


def _report_nonfinite(directory, params, report):
    for path, leaf in jax.tree.leaves_with_path(params):
        values = np.asarray(leaf)
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            report(f"warning: {directory}: {name} holds numbers that are not finite")
