"""The command line: gpt2-jax VERB ...

jax is imported after the arguments are known to be right, so `--help` is quick.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from gpt2_jax.config import (
    Config,
    ConfigError,
    Dtype,
    GenerateConfig,
    Quantize,
    check,
    check_name,
    config_directory,
    load_config,
    one_line,
)
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.hardware import HUGE_PAGES
from gpt2_jax.serve.options import ServeOptions

T = TypeVar("T")

USAGE = """\
usage: gpt2-jax VERB ...

GPT-2 in JAX: train from scratch, resume to the bit, generate.

  train     [CONFIG] [--run-dir DIR] [--train.steps N ..]   default: quickstart
  prepare   SOURCE.. --out DIR --tokenizer gpt2|bytes|DIR
  generate  MODEL PROMPT.. [--max-new-tokens N --temperature X --stop S ..]
  features  MODEL TEXT.. --out F.npz|F.parquet [--input FILE.. --layer N --pool P]
  eval      MODEL [--tasks a,b --data-dir D --out F.json ..]   or: eval --list
  bias      MODEL [--samples N --data-dir D --out F.json --chart F.png ..]
  plan      CONFIG --topology v3-8 [--batch auto --json --train.steps N ..]
  convert   MODEL OUT --to hf|gpt2_jax [--dtype D --verify --force --push ORG/NAME]
  check     RUN [--json]   read a run directory back, all of it
  bench     train|generate|data [CONFIG] [--json --train.steps N ..]
  serve     MODEL [--host 127.0.0.1 --port 8000 ..]   OpenAI's API, and a page

CONFIG is a file or the name of a shipped config: {configs}.
MODEL is a run directory, a directory in Hugging Face layout, or a name on the Hub:
gpt2, gpt2-medium, gpt2-large, gpt2-xl, org/name, each perhaps with @revision.
`gpt2-jax VERB --help` lists every flag of a verb.
"""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make token shards with a manifest from text."""

    source: tyro.conf.Positional[tuple[str, ...]]
    """stdlib, files or folders of text or jsonl (.gz, .zst too), tfds:NAME, hf:NAME"""
    out: Path  # directory of the shards
    tokenizer: str = "gpt2"  # gpt2, bytes, or a directory with tokenizer files
    val_source: tuple[str, ...] = ()
    """Held-out text; when empty, `val_fraction` of the source is held out"""
    val_fraction: float = 0.1
    text_field: str | None = None  # of jsonl, TFDS and HF records; None: found
    skip_binary: bool = False  # leave out files that are not UTF-8 text


Model = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True, kw_only=True)
class Generate(GenerateConfig):
    """Write text that continues a prompt."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ("",)
    temperature: float = 0.8  # 0 is greedy
    echo: bool = True  # print the prompt before what continues it
    stream: bool = True  # print one text while it is written
    json: bool = False  # one object per text, with token ids and log-probabilities
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    quantize: Quantize | None = None  # int8: weights of 8 bits; docs/generate.md
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


@dataclass(frozen=True, kw_only=True)
class Features:
    """Write hidden states of texts to a file."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    input: tuple[str, ...] = ()  # files of one text a line; - is standard input
    out: Path
    """FILE.npz or FILE.parquet. With a pool: features (n, D), n_tokens (n,); without:
    text i is features[offsets[i]:offsets[i + 1]]"""
    layer: int = -1  # 0: embeddings; i: after block i; -1: the last, normed
    pool: Literal["mean", "last", "none"] = "mean"  # over the tokens of a text
    batch: int = 16  # texts at once
    truncate: Literal["left"] | None = None  # forget the start of too long a text
    force: bool = False  # replace OUT
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluateOptions):
    """Print the zero-shot table of the GPT-2 paper for a model, beside its figures."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    out: Path | None = None  # JSON with every figure and its protocol
    list: bool = False  # print what each task needs and where to get it; no MODEL
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Probe what a model says of groups of people, and score public bias sets."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    pairs: tuple[str, ...] = ()
    """Groups to compare, FIRST/SECOND each; none: man/woman, Black person/White
    person, gay person/straight person"""
    templates: tuple[str, ...] = ()  # with {group} in each; none: ten of our own
    samples: int = 100  # texts per template and group; 0: likelihoods and sets alone
    max_new_tokens: int = 20  # of a text
    temperature: float = 1.0
    top_k: int | None = 40  # only the k most likely tokens
    seed: int = 0
    permutations: int = 1000  # of the test of a distance
    data_dir: Path | None = None  # with Winogender, WinoBias, CrowS-Pairs
    any_data: bool = False  # score files that are not the published ones, and say so
    out: Path | None = None  # FILE.json for everything, all samples among it
    chart: Path | None = None  # FILE.png for a bar chart
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model in Hugging Face layout, or as a run directory of ours."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """A new directory"""
    to: Literal["hf", "gpt2_jax"] = "hf"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights
    verify: bool = False  # load OUT again and compare weights and logits
    force: bool = False  # replace OUT
    push: str | None = None  # ORG/NAME on the Hugging Face Hub to upload OUT to
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what the training step of CONFIG costs on a TPU slice, by compiling it.

    Every flag of `gpt2-jax train` is one here too.
    """

    topology: str  # accelerator type, such as v3-8, v3-256, v4-32, v5e-8, v5p-8, v6e-8
    batch: Literal["auto"] | None = None  # auto: the largest micro-batch that fits
    json: bool = False  # one object on standard output


@dataclass(frozen=True, kw_only=True)
class Check:
    """Verify a run directory: read every checkpoint back; status 2 if one is damaged.

    Nothing is changed; a run may be saving there. Each step's sha256 names its whole
    state, and is the same for the same state on any number of devices.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A directory that gpt2-jax train made"""
    json: bool = False  # one object on standard output


@dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Time the training step of CONFIG here, on random tokens.

    Every flag of `gpt2-jax train` is one here too.
    """

    sequences: int | None = None  # at once, all devices; None: train.micro_batch each
    repeats: int = 5  # steps
    json: bool = False  # one object on standard output


@dataclass(frozen=True, kw_only=True)
class BenchGenerate:
    """Time greedy decoding with a model of CONFIG's shape here, its weights random.

    Every flag of `gpt2-jax train` is one here too.
    """

    rows: int = 1  # texts at once
    prompt_tokens: int = 32
    new_tokens: int = 128
    quantize: Quantize | None = None  # int8: weights of 8 bits
    repeats: int = 5
    json: bool = False  # one object on standard output


@dataclass(frozen=True, kw_only=True)
class BenchData:
    """Time making shards of CONFIG's data source here, and reading batches of them.

    Every flag of `gpt2-jax train` is one here too.
    """

    batches: int = 200
    repeats: int = 5
    json: bool = False  # one object on standard output


@dataclass(frozen=True, kw_only=True)
class Serve(ServeOptions):
    """Serve a model: OpenAI's completions API, and a page to write and look inside."""

    model: Model
    """Run directory, Hugging Face directory or Hub name"""
    dtype: Dtype = "auto"  # of matmuls; auto: float32 on CPU, else bfloat16
    quantize: Quantize | None = None  # int8: weights of 8 bits; docs/generate.md
    allow_pickle: bool = False  # read pytorch_model.bin, which is a pickle


def run(arguments: list[str]) -> int:
    """Return the exit status of one command line."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "prepare": _prepare,
        "generate": _generate,
        "plan": _plan,
        "features": _features,
        "eval": _evaluate,
        "bias": _bias,
        "convert": _convert,
        "check": _check,
        "bench": _bench,
        "serve": _serve,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        shipped = sorted(path.stem for path in config_directory().glob("*.py"))
        print(USAGE.format(configs=", ".join(shipped)), end="")
        return 0
    verb = arguments[0]
    try:
        check_name(verb, list(verbs), "gpt2-jax")
        return verbs[verb](arguments[1:])
    except (ConfigError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells do
    except OSError as error:
        found = f"{str(error.filename or verb)[:300]}: {error.strerror}"
        print(f"error: {one_line(found)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "Unable to initialize backend" not in str(error):
            raise
        named = os.environ.get("JAX_PLATFORMS")
        print(
            f"error: jax cannot use JAX_PLATFORMS={named!r}: {error}".splitlines()[0]
            + "; allowed: what is here, such as cpu",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    base = load_config(arguments[0] if named else "quickstart")
    config = _parse(Config, "train", arguments[named:], base)

    from gpt2_jax.hosts import end_soon, join, leave
    from gpt2_jax.train import train

    join(config.train.heartbeat)
    if os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES:
        _say(f"started again with GLIBC_TUNABLES={HUGE_PAGES}, faster on CPU; prevent")
        _say("it by setting GLIBC_TUNABLES yourself, even to nothing")
    with end_soon():
        outcome = train(config, say=_say)
    if outcome.done or outcome.signal is None:
        return 0
    leave(128 + outcome.signal)  # as shells do


def _plan(arguments: list[str]) -> int:
    asked, config = _parse_beside(Plan, "plan", arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slice is libtpu's, not jax's

    from gpt2_jax.checkpoint import print_to_stderr
    from gpt2_jax.plan import plan

    found = plan(config, asked.topology, batch=asked.batch, say=print_to_stderr)
    if asked.json:
        print(json.dumps(found.to_json()))
    else:
        _say("\n".join(found.lines()))
    if not found.fits:
        raise ConfigError(found.remedy)
    return 0


def _prepare(arguments: list[str]) -> int:
    asked = _parse(Prepare, "prepare", arguments)

    from gpt2_jax.data.prepare import prepare
    from gpt2_jax.tokenizer import load_tokenizer

    manifest = prepare(
        asked.source,
        asked.out,
        load_tokenizer(asked.tokenizer),
        val_sources=asked.val_source,
        val_fraction=asked.val_fraction,
        text_field=asked.text_field,
        skip_binary=asked.skip_binary,
        report=_say,
    )
    for name, split in manifest.splits.items():
        _say(f"{name}: {split.tokens:,} tokens of {split.documents:,} documents")
    return 0


def _generate(arguments: list[str]) -> int:
    asked = _parse(Generate, "generate", arguments)

    from gpt2_jax.pretrained import load

    lm = load(
        asked.model,
        dtype=asked.dtype,
        quantize=asked.quantize,
        allow_pickle=asked.allow_pickle,
    )
    alone = len(asked.prompt) * asked.num_return_sequences == 1
    if asked.stream and alone and asked.num_beams == 1 and not asked.json:
        start = [asked.prompt[0]] if asked.echo else []  # once nothing can go wrong
        lm.write(
            asked.prompt,
            asked,
            stream=lambda piece: _write((start.pop() if start else "") + piece),
        )
        _write("".join(start) + "\n")
        return 0
    lines = []
    for prompt, texts in zip(asked.prompt, lm.write(asked.prompt, asked), strict=True):
        for text in texts:
            full = prompt + text.text if asked.echo else text.text
            lists = {k: getattr(text, k).tolist() for k in ("token_ids", "log_probs")}
            values = {"generated_text": full} | text._asdict() | lists
            lines.append(json.dumps(values) if asked.json else full)
    print(("\n" if asked.json else "\n---\n").join(lines))
    return 0


def _features(arguments: list[str]) -> int:
    asked = _parse(Features, "features", arguments)
    if bool(asked.text) == bool(asked.input):
        found = f"{len(asked.text)} TEXT and {len(asked.input)} --input"
        raise ConfigError(f"gpt2-jax features has {found}; allowed: one of the two")

    from gpt2_jax.feature_files import read_lines, write_features
    from gpt2_jax.pretrained import load

    write_features(
        load(asked.model, dtype=asked.dtype, allow_pickle=asked.allow_pickle),
        asked.text or read_lines(asked.input),
        asked.out,
        layer=asked.layer,
        pool=None if asked.pool == "none" else asked.pool,
        batch=min(asked.batch, len(asked.text) or asked.batch),
        truncate=asked.truncate,
        force=asked.force,
        say=_say,
    )
    return 0


def _evaluate(arguments: list[str]) -> int:
    if "--list" in arguments:
        from gpt2_jax.evaluate.files import FILES

        for key, file in FILES.items():
            size = "" if file.size is None else f", {file.size:,} bytes"
            known = "" if file.sha256 is None else f", sha256 {file.sha256}"
            _say(f"{key}: {file.folder}/{file.name}{size}{known}\n  {file.where}")
        return 0
    asked = _parse(Evaluate, "eval", arguments)
    asked.task_names()

    from gpt2_jax.evaluate.columns import REFUSED, evaluate
    from gpt2_jax.evaluate.table import lines, to_json
    from gpt2_jax.pretrained import cache_directory, load, print_to_stderr

    lm = load(asked.model, dtype=asked.dtype, allow_pickle=asked.allow_pickle)
    asked_again = f"{os.path.abspath(asked.model)} {asked}".encode()
    journals = cache_directory() / "eval" / hashlib.sha256(asked_again).hexdigest()[:16]
    found = evaluate(lm, asked, journals=journals, say=print_to_stderr)
    _say("\n".join(lines(lm.config, found)))
    if asked.out is not None:
        text = (
            json.dumps(
                to_json(asked.model, lm.config, found), indent=2, allow_nan=False
            )
            + "\n"
        )
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text)
    shutil.rmtree(journals, ignore_errors=True)  # done: nothing to go on from
    return 2 if any(row.note.startswith(REFUSED) for row in found) else 0


def _bias(arguments: list[str]) -> int:
    asked = _parse(Bias, "bias", arguments)
    chart = asked.chart
    check(chart is None or chart.suffix == ".png", "--chart", str(chart), "FILE.png")
    for path in filter(None, (asked.out, chart)):
        path.parent.mkdir(parents=True, exist_ok=True)

    from gpt2_jax.bias import PAIRS, TEMPLATES, plot, probe
    from gpt2_jax.pretrained import load

    report = probe(
        load(asked.model, dtype=asked.dtype, allow_pickle=asked.allow_pickle),
        asked.model,
        pairs=asked.pairs or PAIRS,
        templates=asked.templates or TEMPLATES,
        samples=asked.samples,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        seed=asked.seed,
        permutations=asked.permutations,
        data_dir=asked.data_dir,
        any_data=asked.any_data,
    )
    _say("\n".join(report.lines()))
    if asked.out is not None:
        asked.out.write_text(json.dumps(report.to_json(), allow_nan=False) + "\n")
    if chart is not None:
        plot(report, chart)
    return 0


def _convert(arguments: list[str]) -> int:
    asked = _parse(Convert, "convert", arguments)

    from gpt2_jax.convert import convert

    convert(
        asked.model,
        asked.out,
        to=asked.to,
        dtype=asked.dtype,
        verify=asked.verify,
        force=asked.force,
        push=asked.push,
        allow_pickle=asked.allow_pickle,
        say=_say,
    )
    return 0


def _check(arguments: list[str]) -> int:
    asked = _parse(Check, "check", arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator may be the running run's

    from gpt2_jax.check import check_run
    from gpt2_jax.checkpoint import print_to_stderr

    found = check_run(asked.run, say=print_to_stderr if asked.json else _say)
    if asked.json:
        print(json.dumps(found.to_json()))
    if not found.good:
        raise ConfigError(found.remedy())
    return 0


def _bench(arguments: list[str]) -> int:
    kinds = {"train": BenchTrain, "generate": BenchGenerate, "data": BenchData}
    named = bool(arguments) and not arguments[0].startswith("-")
    what = arguments[0] if named else "train"
    check_name(what, list(kinds), "gpt2-jax bench")
    asked, config = _parse_beside(kinds[what], f"bench {what}", arguments[named:])

    from gpt2_jax import bench

    run = {
        "train": bench.bench_train,
        "generate": bench.bench_generate,
        "data": bench.bench_data,
    }[what]
    options = dataclasses.asdict(asked)
    as_json = options.pop("json")
    found = run(config, **options)
    _say(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))
    return 0


def _serve(arguments: list[str]) -> int:
    asked = _parse(Serve, "serve", arguments)
    try:
        from gpt2_jax.serve.server import serve
    except ModuleNotFoundError as error:
        found = f"gpt2-jax serve needs {error.name}, which is not installed"
        remedy = 'pip install "gpt2_jax[serve]"'
        raise ConfigError(f"{found}; {remedy}") from error

    serve(
        asked.model,
        asked,
        dtype=asked.dtype,
        quantize=asked.quantize,
        allow_pickle=asked.allow_pickle,
        say=_say,
    )
    return 0


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _parse_beside(kind: type[T], verb: str, arguments: list[str]) -> tuple[T, Config]:
    """Return a verb's own options, and the config that the other flags ask for."""
    named = bool(arguments) and not arguments[0].startswith("-")
    base = load_config(arguments[0] if named else "quickstart")
    asked, others = _quietly(
        lambda: tyro.cli(
            kind,
            prog=f"gpt2-jax {verb} CONFIG",
            args=arguments[named:],
            return_unknown_args=True,
        )
    )
    return asked, _parse(Config, verb, others, base, also=_flags(kind))


def _parse(
    kind: type[T],
    verb: str,
    arguments: list[str],
    default: Any = None,
    also: Iterable[str] = (),
) -> T:
    """Return the dataclass that the flags ask for; a mistake becomes one line.

    `also` are flags that are taken elsewhere, for who misspelt one of them.
    """
    known, switches = sorted({*_flags(kind), *also}), set(_switches(kind))
    stop = arguments.index("--") if "--" in arguments else len(arguments)
    for flag, after in itertools.pairwise([*arguments[:stop], "--"]):
        if not flag.startswith("--") or flag == "--help":
            continue
        name, equals, value = flag[2:].partition("=")
        name = name.replace("_", "-")
        whole = f"gpt2-jax {verb}"
        check_name(name, known, whole, listed_by=f"{whole} --help")
        word = kind is Config and not after.startswith("-")  # it takes no others
        if name in switches and (equals or word):
            *group, last = name.split(".")
            negative = ".".join([*group, f"no-{last.removeprefix('no-')}"])
            positive = ".".join([*group, last.removeprefix("no-")])
            allowed = f"--{positive} or --{negative}, and no value"
            check(False, f"--{name}", value if equals else after, allowed)
    how = {} if default is None else {"default": default}
    return _quietly(
        lambda: tyro.cli(kind, prog=f"gpt2-jax {verb}", args=arguments, **how)
    )


def _quietly(parse: Callable[[], T]) -> T:
    """Return what tyro makes of the arguments; its box of errors becomes one line."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return parse()
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise ConfigError(_first_message(screen.getvalue())) from stopped


def _flags(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(kind):
        name = prefix + item.name.replace("_", "-")
        if dataclasses.is_dataclass(item.type):
            yield from _flags(item.type, f"{name}.")
        elif item.type is not bool:
            yield name
    yield from _switches(kind, prefix, deep=False)


def _switches(kind: Any, prefix: str = "", *, deep: bool = True) -> Iterator[str]:
    """Give the flags that take no value."""
    for item in dataclasses.fields(kind):
        name = item.name.replace("_", "-")
        if item.type is bool:
            yield from (f"{prefix}{name}", f"{prefix}no-{name}")
        elif deep and dataclasses.is_dataclass(item.type):
            yield from _switches(item.type, f"{prefix}{name}.")


def _first_message(box: str) -> str:
    """Return the first message of tyro's box, of lines or of ASCII, as one line."""
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    drawn = set("-\u2500\u256d\u256e\u2570\u256f")
    if lines and set(lines[0]) <= drawn:  # beneath the title, in ASCII
        lines = lines[1:]
    rules = [i for i, line in enumerate(lines) if set(line) <= drawn]
    text = " ".join(lines[: rules[0]] if rules else lines)
    text = text if len(text) <= 800 else f"{text[:400]} .. {text[-400:]}"
    if not text.startswith("Error parsing "):
        return text
    if not text.startswith("Error parsing --"):  # of a group, which names the field
        return text.partition(": ")[2]
    flag, _, wrong = text.removeprefix("Error parsing ").partition(": ")
    usage = [line for line in lines if line.startswith(f"{flag} ")]
    allowed = usage[0].removeprefix(flag).strip() if usage else "another value"
    return f"{flag}: {wrong.rstrip('.')}; allowed: {allowed}"
