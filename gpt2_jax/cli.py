"""The command line: gpt2-jax VERB ...

jax is imported after the arguments are known to be right, so `--help` is quick.
"""

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from gpt2_jax.config import (
    Config,
    ConfigError,
    check_name,
    config_directory,
    load_config,
)

T = TypeVar("T")

HUGE_PAGES = "glibc.malloc.hugetlb=1"
USAGE = """\
usage: gpt2-jax VERB ...

GPT-2 in JAX: train from scratch, resume to the bit, generate.

  train     [CONFIG] [--run-dir DIR] [--train.steps N ..]   default: quickstart
  prepare   SOURCE.. --out DIR --tokenizer gpt2|bytes
  generate  MODEL PROMPT.. [--max-new-tokens N --temperature X ..]

CONFIG is a file or the name of a shipped config: {configs}.
`gpt2-jax VERB --help` lists every flag of a verb.
"""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make token shards with a manifest from text."""

    source: tyro.conf.Positional[tuple[str, ...]]
    """stdlib, files or folders of text or jsonl (.gz, .zst too), tfds:NAME, hf:NAME"""
    out: Path  # directory of the shards
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    val_source: tuple[str, ...] = ()
    """Held-out text; when empty, `val_fraction` of the source is held out"""
    val_fraction: float = 0.1
    text_field: str | None = None  # of jsonl, TFDS and HF records; None: found
    skip_binary: bool = False  # leave out files that are not UTF-8 text


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text that continues a prompt."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run directory"""
    prompt: tyro.conf.Positional[tuple[str, ...]] = ("",)
    max_new_tokens: int | None = None  # None: 128, or what the context has room for
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = None  # only the k most likely tokens
    top_p: float = 1.0  # only the most likely tokens that reach this share
    num_return_sequences: int = 1  # texts per prompt
    seed: int = 0


def main() -> None:
    """Run the verb on the command line and exit: 0 well, 2 for a user's mistake."""
    _use_huge_pages()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Return the exit status of one command line."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "prepare": _prepare,
        "generate": _generate,
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
    except OSError as error:
        print(f"error: {error.filename or verb}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    base = load_config(arguments[0] if named else "quickstart")
    config = _parse(Config, "train", arguments[named:], base)

    from gpt2_jax.train import train

    if os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES:
        _say(f"started again with GLIBC_TUNABLES={HUGE_PAGES}, faster on CPU; prevent")
        _say("it by setting GLIBC_TUNABLES yourself, even to nothing")
    outcome = train(config, say=_say)
    interrupted = outcome.signal == signal.SIGINT and not outcome.done
    return 130 if interrupted else 0  # 128 + SIGINT, as shells do


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

    texts = load(asked.model).generate(
        list(asked.prompt),
        max_new_tokens=asked.max_new_tokens,
        num_return_sequences=asked.num_return_sequences,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=asked.seed,
    )
    print("\n---\n".join(text["generated_text"] for text in texts))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _parse(kind: type[T], verb: str, arguments: list[str], default: Any = None) -> T:
    """Return the dataclass that the flags ask for; a mistake becomes one line."""
    known = sorted(_flags(kind))
    stop = arguments.index("--") if "--" in arguments else len(arguments)
    for flag in arguments[:stop]:
        if flag.startswith("--") and flag != "--help":
            name = flag[2:].partition("=")[0].replace("_", "-")
            check_name(name, known, f"gpt2-jax {verb}")
    screen = io.StringIO()
    how = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(kind, prog=f"gpt2-jax {verb}", args=arguments, **how)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise ConfigError(_first_message(screen.getvalue())) from stopped


def _flags(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(kind):
        name = prefix + item.name.replace("_", "-")
        if dataclasses.is_dataclass(item.type):
            yield from _flags(item.type, f"{name}.")
        else:
            yield name
            if item.type is bool:
                yield f"{prefix}no-{name.removeprefix(prefix)}"


def _first_message(box: str) -> str:
    """Return the first message of tyro's box as one line."""
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    rules = [
        i
        for i, line in enumerate(lines)
        if set(line) <= set("\u2500\u256d\u2570\u256f")
    ]
    text = " ".join(lines[: rules[0]] if rules else lines)
    return text.partition(": ")[2] if text.startswith("Error parsing ") else text


def _use_huge_pages() -> None:
    """Start this program again with huge pages for malloc, where Linux offers them.

    XLA:CPU takes fresh memory on every call, and 4 KiB page faults then cost more than
    small operations (an Adam update of 38M elements: 180 -> 33 ms). glibc reads the
    setting only when a process begins. A GLIBC_TUNABLES that is set, even to nothing,
    is left alone.
    """
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" in os.environ or not offered.is_file():
        return
    if "[never]" in offered.read_text() or not set(sys.argv[1:2]) & {
        "train",
        "generate",
    }:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
