"""What a run can be asked: frozen dataclasses, their checks, derived numbers.

A config file is a Python file that binds one `Config` to the name `config`. The
command line is the same dataclass as flags (`--model.n-layer 24`). Every default
stands here and nowhere else.
"""

import dataclasses
import difflib
import json
import reprlib
import runpy
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

Activation = Literal["gelu_new", "gelu", "relu", "silu", "tanh"]
Attention = Literal["auto", "xla", "flash", "cudnn"]
Dtype = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["int8"]
Remat = Literal["none", "dots", "block"]
Schedule = Literal["cosine", "wsd", "constant"]

MOST_LISTED = 24  # names in one line
MOST_TEXTS = 1024  # of a prompt: they share a batch, each with a cache
UNIONS = (UnionType, Union)  # a union with a Literal is the second one
MOST_INT = 2**31 - 1  # jax counts in int32
MOST_FLOAT = 3.4e38  # float32 ends there
# What a config file that is run as Python may raise by mistake.
FILE_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    NameError, OSError, RuntimeError, StopIteration, SyntaxError, SystemExit,
    TypeError, ValueError,
)  # fmt: skip


class _Brief(reprlib.Repr):
    """Spells a value on one line of bounded length, whatever a stranger put in it."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxtuple = self.maxlist = self.maxdict = 12

    def repr_int(self, x, level):
        huge = abs(x) >= 10**40  # Python itself spells no more than 4300 digits
        return f"an integer of {x.bit_length()} bits" if huge else repr(x)


spell = _Brief().repr  # in messages, in the place of repr


def join_faults(faults: Sequence[str]) -> str:
    """Return the first faults, cut to a bounded length, and how many more there are."""
    shown = [f if len(f) <= 400 else f"{f[:400]}.." for f in faults[:16]]
    more = [f"and {len(faults) - 16} more"] if len(faults) > 16 else []
    return "; ".join(shown + more)


class ConfigError(ValueError):
    """A value a user gave cannot work; the message names field, value and remedy.

    It is one line, whatever stranger's text is quoted in it.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Return `text` with everything spelt out that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check(claim: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ConfigError` naming the field, the value found and those allowed."""
    if not claim:
        raise ConfigError(f"{name} is {spell(value)}; allowed: {allowed}")


def _check_types(group: str, config: Any, kind: Any = None) -> None:
    for item in dataclasses.fields(kind or config):
        value = getattr(config, item.name)
        name = f"{group}.{item.name}" if group else item.name
        check(_fits(value, item.type), name, value, _spell(item.type))
        for part in value if isinstance(value, tuple) else (value,):
            good = not isinstance(part, str) or "\0" not in part
            check(good, name, value, "text without NUL")
            good = not isinstance(part, int) or abs(part) < 2**32
            check(good, name, value, "integers below 2**32")


def _fits(value: object, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in UNIONS:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        part = get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(v, part) for v in value)
    return isinstance(value, (int, float) if kind is float else kind)


def _spell(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if get_origin(kind) in UNIONS:
        return " or ".join(_spell(part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a tuple of {_spell(get_args(kind)[0])}"
    return "None" if kind is NoneType else kind.__name__


def _check_numbers(group: str, config: Any, **minimum: int) -> None:
    for name, least in minimum.items():
        value = getattr(config, name)
        most = MOST_INT if isinstance(value, int) else MOST_FLOAT
        name = f"{group}.{name}" if group else name
        allowed = f"a finite number >= {least}"
        if value > most:
            allowed = f"{allowed} and <= {most}"
        check(least <= value <= most, name, value, allowed)


def _check_rates(group: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(0.0 <= value < 1.0, f"{group}.{name}", value, "0 <= rate < 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """GPT-2's shape, in its own words, and how to compute it.

    Defaults are GPT-2 124M (Radford et al. 2019; openai/gpt-2 hparams.json).
    """

    n_vocab: int = 50_257  # tokens, padding excluded
    n_ctx: int = 1024  # positions
    n_embd: int = 768  # width D
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # feed-forward width F; None means 4 * n_embd
    activation_function: Activation = "gelu_new"  # gelu_new is the tanh form
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0  # dropout rate after the embeddings; GPT-2 used 0.1
    attn_pdrop: float = 0.0  # dropout rate on attention probabilities
    resid_pdrop: float = 0.0  # dropout rate on both residual branches
    initializer_range: float = 0.02  # openai/gpt-2 src/model.py, conv1d
    scale_attn_weights: bool = True  # divide scores by sqrt(head width)
    scale_attn_by_inverse_layer_idx: bool = False  # and by layer + 1 (Mistral)
    reorder_and_upcast_attn: bool = False  # scores in float32 (Mistral)
    tie_word_embeddings: bool = True  # False: a separate output matrix, lm_head
    vocab_multiple: int = 128  # rows of wte are padded to a multiple of this
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    attention: Attention = "auto"  # kernel; auto: by device; flash: Pallas, for TPU
    remat: Remat = "none"  # what the backward pass computes again
    unroll: int = 1  # blocks per iteration of the scan over layers

    def __post_init__(self):
        _check_types("model", self)
        least = dict(n_vocab=2, n_ctx=1, n_embd=1, n_layer=1, n_head=1)
        _check_numbers("model", self, **least, vocab_multiple=1, unroll=1)
        _check_rates("model", self, "embd_pdrop", "attn_pdrop", "resid_pdrop")
        _check_numbers("model", self, layer_norm_epsilon=0, initializer_range=0)
        if self.n_embd % self.n_head:
            divisors = [n for n in range(1, 65) if self.n_embd % n == 0]
            allowed = f"a divisor of model.n_embd = {self.n_embd}, such as {divisors}"
            check(False, "model.n_head", self.n_head, allowed)
        if self.n_inner is not None:
            check(self.n_inner >= 1, "model.n_inner", self.n_inner, "None or >= 1")

    @property
    def head_width(self) -> int:
        """Return H, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Return F, the width of the feed-forward layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def n_vocab_padded(self) -> int:
        """Return the rows of `wte` in memory: `n_vocab` rounded up."""
        return -(-self.n_vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def n_params(self) -> int:
        """Return the number of parameters, vocabulary padding excluded."""
        d, f = self.n_embd, self.inner_width
        block = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d
        head = 0 if self.tie_word_embeddings else self.n_vocab * d
        embeddings = (self.n_vocab + self.n_ctx) * d
        return embeddings + self.n_layer * block + 2 * d + head

    @property
    def flops_per_token(self) -> float:
        """Return the FLOPs of one token's forward and backward pass.

        6 (N - wpe) + 12 L D T: PaLM (Chowdhery et al. 2022), appendix B, as nanoGPT
        counts it. `wte` is counted once, attention in full, recomputation not at all.
        """
        positions = self.n_ctx * self.n_embd
        return 6.0 * (self.n_params - positions) + 12.0 * self.n_layer * positions


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and in which order they are read."""

    source: tuple[str, ...] = ("stdlib",)
    """stdlib, paths of text, jsonl or token shards, tfds:NAME or hf:NAME"""
    val_source: tuple[str, ...] = ()
    """Held-out text; when empty, `val_fraction` of `source` is held out"""
    val_fraction: float = 0.1  # of the characters of one file, else of documents
    tokenizer: str = "gpt2"  # gpt2, bytes, or a directory with tokenizer files
    text_field: str | None = None  # of jsonl, TFDS and HF records; None: found
    skip_binary: bool = False  # leave out files that are not UTF-8 text
    verify: bool = True  # compare every shard with its sha256 before training
    seed: int = 0  # of the order of windows
    prefetch: int = 8  # batches read ahead of the step

    def __post_init__(self):
        _check_types("data", self)
        check(bool(self.source), "data.source", self.source, "at least one source")
        good = 0.0 < self.val_fraction < 1.0
        check(good, "data.val_fraction", self.val_fraction, "0 < fraction < 1")
        _check_numbers("data", self, prefetch=1)
        check(0 <= self.seed < 2**32, "data.seed", self.seed, ">= 0 and < 2**32")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates.

    Defaults follow GPT-3 (Brown et al. 2020, appendix B) for 124M.
    """

    name: Literal["adamw", "muon"] = "adamw"  # muon: matrices only, AdamW elsewhere
    learning_rate: float = 6e-4  # peak, of AdamW
    muon_learning_rate: float = 0.02  # peak, of Muon; Jordan et al. 2024
    muon_steps: int = 5  # Newton-Schulz iterations; Jordan et al. 2024
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of Muon, Nesterov; Jordan et al. 2024
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices only, times the learning rate
    grad_clip: float = 1.0  # largest global gradient norm; 0 does not clip
    schedule: Schedule = "cosine"  # wsd: warm up, stay, decay linearly
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # of all steps, the decay of wsd
    final_fraction: float = 0.1  # of the peak, the rate at the last step

    def __post_init__(self):
        _check_types("optimizer", self)
        rates = dict(learning_rate=0, muon_learning_rate=0, epsilon=0)
        _check_numbers("optimizer", self, **rates, weight_decay=0, grad_clip=0)
        _check_numbers("optimizer", self, warmup_steps=0, muon_steps=1)
        _check_rates("optimizer", self, "beta1", "beta2", "momentum")
        for name in ("decay_fraction", "final_fraction"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optimizer.{name}", value, "0 <= fraction <= 1")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices stand along each axis; -1 takes all that are left.

    None of them stated: chosen from model, devices and batch. Else `data` takes what
    the others leave, and the others are 1.
    """

    data: int | None = None  # copies of the parameters, each with its part of the batch
    fsdp: int | None = None  # parts of the parameters, each with its part of the batch
    tensor: int | None = None  # parts of each matrix, all with the same batch

    def __post_init__(self):
        _check_types("mesh", self)
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            good = value is None or value == -1 or value >= 1
            check(good, f"mesh.{name}", value, "None, -1 or >= 1")
        free = [self.data, self.fsdp, self.tensor].count(-1)
        check(free <= 1, "mesh", self, "at most one axis of -1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, on how much at once."""

    init_from: str | None = None
    """MODEL to fine-tune: its weights, shape and tokenizer, a new optimizer. A run
    directory, a Hugging Face directory or a Hub name; None: new random weights"""
    steps: int = 600_000  # optimizer updates; nanoGPT config/train_gpt2.py
    batch_tokens: int = 524_288  # tokens per step over all devices; paper 2.2
    micro_batch: int | None = None
    """Most sequences per device at once; the rest is accumulated. None: all at once"""
    loss_chunk: int = 0  # positions whose logits exist at once; 0: chosen by size
    seed: int = 0  # of initial weights and dropout
    max_bad_steps: int = 10  # skipped steps in a row before the run stops
    spike_sigmas: float = 0.0
    """Skip an update whose loss or gradient norm lies this many standard deviations
    above the mean of the last 128 steps; 0: only what is not finite. Levanter: 6"""
    heartbeat: int = 100  # seconds until a silent process counts as dead; several
    watchdog: int = 1800
    """Seconds without progress until several processes write their stacks and end;
    0: never"""

    def __post_init__(self):
        _check_types("train", self)
        _check_numbers("train", self, steps=1, batch_tokens=1, loss_chunk=0)
        _check_numbers("train", self, max_bad_steps=1, spike_sigmas=0)
        _check_numbers("train", self, heartbeat=1, watchdog=0)
        check(0 <= self.seed < 2**32, "train.seed", self.seed, ">= 0 and < 2**32")
        if self.micro_batch is not None:
            value = self.micro_batch
            check(value >= 1, "train.micro_batch", value, "None or >= 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on held-out text while training, and how often."""

    interval: int = 1000  # steps between evaluations; 0: only at the end
    batches: int = 0  # of validation per evaluation, 0: all of it
    final_batches: int = 0  # of the evaluation at the end, 0: all of it
    batch_sequences: int = 32  # sequences per batch of an evaluation, per device
    sample_interval: int = 0  # steps between samples; 0: only at the end
    samples: int = 3  # texts written each time
    sample_tokens: int = 256  # new tokens per sample
    prompt: str = ""  # what samples begin with; empty: a new document
    temperature: float = 0.8  # 0 is greedy; nanoGPT sample.py
    top_k: int | None = 200  # nanoGPT sample.py
    top_p: float = 1.0
    tasks: str = ""  # zero-shot tasks of `gpt2-jax eval`, with commas between
    tasks_interval: int = 0  # steps between them; 0: only at the end
    tasks_dir: str = "data/zero-shot"  # where their files are
    tasks_any_data: bool = False  # files of another checksum too

    def __post_init__(self):
        _check_types("evaluate", self)
        _check_numbers("evaluate", self, tasks_interval=0)
        least = dict(interval=0, batches=0, final_batches=0, batch_sequences=1)
        _check_numbers("evaluate", self, **least, sample_interval=0, samples=0)
        _check_numbers("evaluate", self, sample_tokens=1, temperature=0)
        check(0 < self.top_p <= 1, "evaluate.top_p", self.top_p, "0 < top_p <= 1")
        good = self.top_k is None or self.top_k >= 1
        check(good, "evaluate.top_k", self.top_k, "None or >= 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and how much of the past is kept."""

    interval: int = 1000  # steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # steps; checkpoints at multiples of it stay; 0: none

    def __post_init__(self):
        _check_types("checkpoint", self)
        _check_numbers("checkpoint", self, interval=1, keep=1, keep_every=0)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down, and where besides metrics.jsonl."""

    interval: int = 10  # steps between progress lines
    tensorboard: bool = False  # event files in the run directory; extra: tensorboard
    wandb: str | None = None  # project name; extra: wandb

    def __post_init__(self):
        _check_types("log", self)
        _check_numbers("log", self, interval=1)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is written on from a prompt, in transformers' words."""

    max_new_tokens: int | None = None  # None: 128, or what the context has room for
    max_length: int | None = None  # most tokens of prompt and new text together
    num_return_sequences: int = 1  # texts per prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # only the k most likely tokens
    top_p: float = 1.0  # only the most likely tokens that reach this share
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0  # > 1: what is there already becomes less likely
    num_beams: int = 1  # > 1: beam search, which draws nothing
    length_penalty: float = 1.0  # of beams: score = log-probability / length ** this
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    eos: bool = True  # end at <|endoftext|>
    truncate: Literal["left"] | None = None  # forget the start of too long a prompt
    slide: bool = False  # go on past the context: forget its older half when it is full
    seed: tuple[int, ...] = (0,)  # one for all prompts, or one for each

    def __post_init__(self):
        _check_types("", self, GenerateConfig)  # a verb of the shell may have more
        _check_numbers("", self, num_return_sequences=1, num_beams=1)
        for name in ("num_return_sequences", "num_beams"):
            value = getattr(self, name)
            check(value <= MOST_TEXTS, name, value, f"<= {MOST_TEXTS}")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "None or >= 1")
        if self.max_new_tokens is not None and self.max_length is not None:
            found = f"max_new_tokens = {self.max_new_tokens} beside max_length = "
            raise ConfigError(f"{found}{self.max_length}; allowed: one of them")
        check(bool(self.seed), "seed", self.seed, "at least one seed")
        good = abs(self.length_penalty) <= MOST_FLOAT
        check(good, "length_penalty", self.length_penalty, "a finite number")
        if self.num_beams > 1:
            self._check_beams()
        else:
            allowed = "1.0 unless num_beams > 1"
            value = self.length_penalty
            check(value == 1.0, "length_penalty", value, allowed)

    def _check_beams(self):
        allowed = f"<= num_beams = {self.num_beams}"
        count = self.num_return_sequences
        check(count <= self.num_beams, "num_return_sequences", count, allowed)
        default = {f.name: f.default for f in dataclasses.fields(GenerateConfig)}
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "slide"):
            value = getattr(self, name)
            allowed = f"{default[name]} when num_beams > 1: beam search draws nothing"
            check(value == default[name], name, value, allowed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a training run can be asked."""

    run_dir: str = "runs/gpt2"  # where checkpoints, metrics and samples go
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        _check_types("", self)
        path = "a path; mount a bucket with gcsfuse, or start with launch/tpu.py"
        good = 0 < len(self.run_dir) < 2000 and "://" not in self.run_dir
        check(good, "run_dir", self.run_dir, path)
        n_ctx, tokens = self.model.n_ctx, self.train.batch_tokens
        whole = f"a multiple of model.n_ctx = {n_ctx}"
        check(tokens % n_ctx == 0, "train.batch_tokens", tokens, whole)
        chunk = self.train.loss_chunk
        whole = f"0 or a divisor of model.n_ctx = {n_ctx}"
        check(not chunk or n_ctx % chunk == 0, "train.loss_chunk", chunk, whole)
        warmup, most = self.optimizer.warmup_steps, self.train.steps
        name = "optimizer.warmup_steps"
        check(warmup <= most, name, warmup, f"<= train.steps = {most}")

    @property
    def batch_sequences(self) -> int:
        """Return the sequences per step, over all devices."""
        return self.train.batch_tokens // self.model.n_ctx

    @property
    def total_tokens(self) -> int:
        """Return the tokens the whole run reads."""
        return self.train.steps * self.train.batch_tokens


# Fields of a model that its weights were trained with; the rest is how to compute it.
SHAPE = (
    "n_vocab",
    "n_ctx",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "vocab_multiple",
)

# Fields that may differ when a run is resumed: they change how it is computed,
# watched or how long it lasts, not which run it is.
MAY_CHANGE = [
    "run_dir",
    "mesh",
    "evaluate",
    "checkpoint",
    "log",
    "data.prefetch",
    "data.verify",
    "model.dtype",
    "model.attention",
    "model.remat",
    "model.unroll",
    "train.steps",
    "train.micro_batch",
    "train.loss_chunk",
    "train.max_bad_steps",
    "train.heartbeat",
    "train.watchdog",
]


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """Return the `Config` that `to_dict` gave `values` for.

    Raises
    ------
    ConfigError
        If a field is unknown or a value is not allowed.
    """
    check(isinstance(values, Mapping), "config", values, "an object of its groups")
    groups = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        check_name(name, list(groups), "config")
        kind = groups[name]
        fields[name] = _group(kind, name, value) if is_dataclass(kind) else value
    return Config(**fields)


def read_config(path: Path) -> Config:
    """Return the `Config` in a run directory's `config.json`.

    Raises
    ------
    ConfigError
        If it holds something else.
    OSError
        If it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
        check(isinstance(values, dict), "it", type(values).__name__, "an object")
        return from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no config: {error}; restore the file") from error


def _group(kind: Any, group: str, values: Any) -> Any:
    good = isinstance(values, Mapping)
    check(good, f"config.{group}", values, "an object of its fields")
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        check_name(name, known, group)
    return kind(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def check_name(
    name: str, known: list[str], what: str, also: str = "", *, listed_by: str = ""
) -> None:
    """Raise `ConfigError` with the nearest known name when `name` is not known.

    `also` says what else may stand there; `listed_by`, which command lists the names,
    where they are too many for a line.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name[:200], known, n=1)  # quadratic in length
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = f"known: {', '.join(known)}{also}"
    if near and listed_by and len(known) > MOST_LISTED:
        listed = f"{listed_by} lists all {len(known)}"
    raise ConfigError(f"{what} has no {spell(name)}; {hint}{listed}")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old value, new value) for every field that differs."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return {k: (before[k], after[k]) for k in after if before[k] != after[k]}


def must_match(name: str) -> bool:
    """Say whether a resumed run must keep the field `name` as it was."""
    return not {name, name.partition(".")[0]} & set(MAY_CHANGE)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name, as `to_dict` gives them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def config_directory() -> Path:
    """Return where shipped configs lie: in the wheel, else the repository."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def load_config(name: str) -> Config:
    """Return the config of a path, or of a shipped config's name.

    The file is run as Python: load only files you trust.

    Raises
    ------
    ConfigError
        If there is no such file, it raises, or it binds no `Config` to `config`.
    """
    path = _find_config(name)
    try:
        bound = runpy.run_path(str(path)).get("config")
    except FILE_ERRORS as error:
        raise ConfigError(_explain(path, error)) from error
    if not isinstance(bound, Config):
        kind = type(bound).__name__
        raise ConfigError(f"{path} binds `config` to {kind}; allowed: a Config")
    return bound


def _explain(path: Path, error: BaseException) -> str:
    """Return one line: what the file raised, and in which of its lines."""
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    what = " ".join(str(error).split())[:1000]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f" line {lines[0]}" if lines else ""
    return f"{path} is no config:{where} {kind}{what}; mend the file"


def _find_config(name: str) -> Path:
    if Path(name).is_file() and Path(name).suffix == ".py":
        return Path(name)
    shipped = {p.stem: p for p in sorted(config_directory().glob("*.py"))}
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(Path(name).stem, list(shipped), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join(shipped)
    raise ConfigError(f"config {name!r} is no .py file; {hint}shipped: {known}")
