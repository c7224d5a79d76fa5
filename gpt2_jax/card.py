"""The model card README.md: metadata, use, training facts, results, citation.

It begins with YAML for the Hub (huggingface.co/docs/hub/model-cards), as JSON values.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoint import read_meta
from gpt2_jax.config import SHAPE, Config, ConfigError, ModelConfig, check, from_dict
from gpt2_jax.digest import digests
from gpt2_jax.metrics import RECORDS, read_metrics

RESULTS = "eval.json"
# What a card says in its first line, not among the options.
SIZES = ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head")
LIBRARIES = {"hf": "transformers", "gpt2_jax": "gpt2_jax"}  # that open a layout
TAGS = ["gpt2", "jax", "gpt2_jax"]
LIMITS = (
    "The model continues text: it states falsehoods as fluently as facts, and repeats "
    "the biases of what it was trained on. Before relying on it, evaluate it on the "
    "task at hand: no quality is claimed beyond the results in this card."
)
CITATION = """\
@article{radford2019language,
  title  = {Language Models are Unsupervised Multitask Learners},
  author = {Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei,
            Dario and Sutskever, Ilya},
  year   = {2019}
}"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's directory tells of its making."""

    converted_from: str | None = None  # None: a run of this project made it
    run: Config | None = None  # of that run
    step: int | None = None  # updates done
    seconds: float = 0.0  # of training
    versions: Mapping[str, str] = field(default_factory=dict)
    done: Mapping[str, Any] = field(default_factory=dict)  # the run's last evaluation
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # eval.json


def read_facts(directory: Path, params: Any, *, source: str) -> Facts:
    """Return what is known of the model `params` that was loaded from `directory`.

    `source` is its name. Facts of a checkpoint other than the one loaded (the newest
    may be damaged) are left out.

    Raises
    ------
    ConfigError
        If `metrics.jsonl` or `eval.json` is malformed.
    """
    results = _read_results(directory / RESULTS)
    checkpoints, damaged = directory / "checkpoints", []
    meta = read_meta(checkpoints, report=damaged.append)
    if meta is None:
        return Facts(converted_from=source, results=results)
    if "converted_from" in meta:
        return Facts(converted_from=meta["converted_from"], results=results)
    saved = {name: tensor["digest"] for name, tensor in meta["params"].items()}
    if damaged or saved != digests(params):
        return Facts(results=results)
    step = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
    return Facts(
        run=from_dict(meta["config"]),
        step=step,
        seconds=meta["train_seconds"],
        versions=meta["versions"],
        done=_read_done(directory / RECORDS, step),
        results=results,
    )


def make_card(
    config: ModelConfig,
    facts: Facts,
    *,
    title: str,
    layout: str,  # hf or gpt2_jax
    dtype: str,
    tokenizer: str | None,
    license: str | None = None,
) -> str:
    """Return the README.md of a model that one loads by the name `title`."""
    parts = [
        _front(facts, title, library=LIBRARIES[layout], license=license),
        f"# {_line(title)}",
        _describe(config, facts, dtype, tokenizer),
        _use(title, layout),
        _training(facts, config, tokenizer),
        _evaluation(facts),
        f"## Limitations\n\n{LIMITS}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8")).get("results")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON object: {error}; delete it") from error
    form = 'an object {"wikitext2": {"value": 29.4, "unit": "ppl/word"}}; delete it'
    check(isinstance(results, dict), f"{path}: results", results, form)
    kept = {}
    for name, row in results.items():
        value: Any = row.get("value") if isinstance(row, dict) else ""
        good = type(value) in (int, float) and math.isfinite(value)
        check(good or value is None, f"{path}: results: {name}", row, form)
        if value is not None:  # it was run
            kept[name] = row
    return kept


def _read_done(path: Path, step: int) -> dict[str, Any]:
    """Return the record of the last evaluation, if it is of `step`."""
    records = read_metrics(path) if path.is_file() else []
    found = [r for r in records if r.get("event") == "done" and r.get("step") == step]
    return found[-1] if found else {}


def _front(facts: Facts, title: str, *, library: str, license: str | None) -> str:
    values: dict[str, Any] = {} if license is None else {"license": license}
    values |= dict(library_name=library, pipeline_tag="text-generation", tags=TAGS)
    if results := list(_index(facts)):
        values["model-index"] = [dict(name=title, results=results)]
    lines = [f"{name}: {_yaml(value)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _yaml(value: Any) -> str:
    r"""Return JSON in ASCII with Python's escapes, \U0001f600 among them, as YAML's.

    JSON's own escapes of such characters are two surrogates, which YAML lacks.
    """
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\x7f")
    return text.encode("ascii", "backslashreplace").decode()


def _index(facts: Facts) -> Iterator[dict[str, Any]]:
    task = dict(type="text-generation", name="Text Generation")
    if metrics := [
        dict(type=kind, value=round(value, 4), name=name)
        for name, kind, value in _measures(facts)
    ]:
        data = dict(type="held-out", name=_held_out(facts))
        yield dict(task=task, dataset=data, metrics=metrics)
    for name, row in facts.results.items():
        unit = str(row.get("unit", ""))
        metric = dict(type=unit.partition("/")[0] or "value", value=row["value"])
        yield dict(
            task=task,
            dataset=dict(type=name, name=name),
            metrics=[metric | dict(name=unit or name)],
        )


def _measures(facts: Facts) -> Iterator[tuple[str, str, float]]:
    """Give name, kind and value of what was measured when the run ended."""
    loss, bits = facts.done.get("val_loss"), facts.done.get("val_bits_per_byte")
    if loss is not None:
        yield "cross-entropy, nats per token", "loss", loss
        if loss < 100:  # else not a number anybody reads, soon not even a float
            yield "perplexity per token", "perplexity", math.exp(loss)
    if bits is not None:
        yield "bits per byte", "bits_per_byte", bits


def _held_out(facts: Facts) -> str:
    if facts.run is None:
        return ""
    data, batches = facts.run.data, facts.run.evaluate.final_batches
    if data.val_source:
        text = f"held-out text, {_names(data.val_source)}"
    else:
        text = f"{data.val_fraction:.2g} of {_names(data.source)}, held out"
    return f"{text}, first {batches} batches" if batches else text


def _names(sources: tuple[str, ...]) -> str:
    """Return data sources without the paths of the machine they lie on."""
    return ", ".join(_bare(source) for source in sources)


def _bare(source: str) -> str:
    kind, colon, rest = source.partition(":")
    if colon and kind in ("tfds", "hf"):
        return f"{kind}:{_bare(rest)}" if Path(rest).is_absolute() else source
    return Path(source).name or source


def _line(text: str) -> str:
    return " ".join(text.split())


def _describe(
    config: ModelConfig, facts: Facts, dtype: str, tokenizer: str | None
) -> str:
    words = "no tokenizer" if tokenizer is None else f"tokenizer `{tokenizer}`"
    origin = "Trained with `gpt2_jax`."
    if facts.converted_from is not None:
        origin = f"Converted from `{_line(facts.converted_from)}` by `gpt2_jax`."
    text = (
        f"GPT-2 with {config.n_params:,} parameters in {dtype}: {config.n_layer} "
        f"layers, {config.n_head} heads, width {config.n_embd}, context of "
        f"{config.n_ctx:,} tokens, vocabulary of {config.n_vocab:,} ({words}). {origin}"
    )
    plain = ModelConfig()
    options = [
        f"`{name}` {getattr(config, name)}"
        for name in SHAPE
        if name not in SIZES and getattr(config, name) != getattr(plain, name)
    ]
    return f"{text} Unlike GPT-2: {', '.join(options)}." if options else text


def _use(title: str, layout: str) -> str:
    name, prompt = json.dumps(title, ensure_ascii=False), '"Once upon a time"'
    theirs = (
        "With transformers:\n\n```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={name})\n'
        f'print(generate({prompt}, max_new_tokens=40)[0]["generated_text"])\n```\n\n'
    )
    ours = (
        "With gpt2_jax:\n\n```python\nimport gpt2_jax\n\n"
        f"lm = gpt2_jax.load({name})\n"
        f'print(lm.generate({prompt}, max_new_tokens=40)[0]["generated_text"])\n```'
    )
    return f"## Use\n\n{theirs if layout == 'hf' else ''}{ours}"


def _training(facts: Facts, config: ModelConfig, tokenizer: str | None) -> str:
    run = facts.run
    if run is None or facts.step is None:
        return ""
    how, tokens = run.optimizer, run.train.batch_tokens
    clip = f", gradient norm at most {how.grad_clip:g}" if how.grad_clip else ""
    down = "" if how.schedule == "constant" else f", down to {how.final_fraction:g}"
    rate = f"{how.learning_rate:g}"
    if how.name == "muon":
        rate = f"{how.muon_learning_rate:g} (Muon, matrices), {rate} (AdamW)"
    rows = {
        "data": _names(run.data.source),
        "tokenizer": str(tokenizer),
        "steps": f"{facts.step:,} of {run.train.steps:,}",
        "tokens per step": f"{tokens:,}",
        "tokens in all": f"{facts.step * tokens:,}",
        "optimizer": f"{how.name}, betas {how.beta1:g} and {how.beta2:g}, "
        f"weight decay {how.weight_decay:g}{clip}",
        "learning rate": rate,
        "schedule": f"{how.schedule}, {how.warmup_steps:,} warm-up steps{down}",
        "dropout": f"embeddings {config.embd_pdrop:g}, attention "
        f"{config.attn_pdrop:g}, residual {config.resid_pdrop:g}",
        "computed in": run.model.dtype,
        "training time": f"{facts.seconds:,.0f} s",
        "versions": ", ".join(f"{k} {v}" for k, v in facts.versions.items()),
    }
    if start := run.train.init_from:
        rows["began from"] = Path(start).name if Path(start).is_absolute() else start
    return "## Training\n\n" + _table(("", ""), list(rows.items()))


def _evaluation(facts: Facts) -> str:
    parts = []
    if rows := [(name, f"{value:.4f}") for name, _, value in _measures(facts)]:
        packed = {"gzip_bits_per_byte": "gzip -9", "xz_bits_per_byte": "xz -9"}
        rows += [
            (f"bits per byte of {name}, for comparison", f"{facts.done[key]:.4f}")
            for key, name in packed.items()
            if facts.done.get(key) is not None
        ]
        parts.append(_table((_held_out(facts), "value"), rows))
    if facts.results:
        header = ("benchmark", "value", "published", "unit", "tokens", "protocol")
        keys = ("value", "card", "unit", "tokens", "protocol")
        rows = [
            (name, *(_spell(row.get(key)) for key in keys))
            for name, row in facts.results.items()
        ]
        parts.append(_table(header, rows))
    return "## Evaluation\n\n" + "\n\n".join(parts) if parts else ""


def _spell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = [[_line(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
