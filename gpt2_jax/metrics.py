"""Write down how a run goes: JSON lines, progress, TensorBoard, W&B, a loss curve.

`metrics.jsonl` is the record; everything else can be made from it again.
"""

import gzip
import json
import lzma
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.config import ConfigError, LogConfig

RECORDS = "metrics.jsonl"
LOSS, TEXTS = "val_loss", "samples_bytes"  # what stands in a record beside training
ZERO_SHOT = "zero_shot/"  # and a task's name: its number
COLORS = {"train": "#4c78a8", "validation": "#e4572e"}
GREY = "#666666"
FIRST_FALL = 0.03  # of all steps; the loss before may lie above the picture


class _Sink(NamedTuple):
    write: Callable[[dict[str, Any], int], None]
    close: Callable[[], None]


class MetricsLog:
    """The records of one run, in `metrics.jsonl` and where the config asks.

    One process of a run writes it; in the others it is not `active`. Opening drops what
    a run resumed at `resume_step` writes again: the records of later steps, `done`, and
    where it only `finishes`, what was measured at that step. `kept` are left.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        resume_step: int,
        finishes: bool = False,
        active: bool = True,
    ):
        self._sinks, self._file = [], None
        self.kept: list[dict[str, Any]] = []
        if not active:
            return
        path = run_dir / RECORDS
        self._sinks = _open_sinks(run_dir, config, resume_step)
        self.kept = _drop_again(path, resume_step, finishes)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, on disk when this returns.

        JSON has no NaN: a number that is not finite becomes null, and its name stands
        in the record's list `nonfinite`.
        """
        if self._file is None:
            return
        bad = [name for name, value in record.items() if not _is_finite(value)]
        if bad:
            record = record | dict.fromkeys(bad) | {"nonfinite": bad}
        self._file.write(_line(record))
        self._file.flush()
        scalars = {k: v for k, v in record.items() if _is_number(v) and k != "step"}
        for sink in self._sinks:
            sink.write(scalars, record.get("step", 0))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`; a torn last line is left out.

    Raises
    ------
    ConfigError
        If another line is no JSON object; the message names it.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    records = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.endswith("\n"):
            found = f"{path} line {number} is {line.strip()[:60]!r}"
            raise ConfigError(f"{found}; allowed: one JSON object; delete the line")
    return records


def last_step(path: Path) -> int:
    """Return the last step that a `metrics.jsonl` tells of; 0 if there is none."""
    records = read_metrics(path) if path.is_file() else []
    return max((record.get("step", 0) for record in records), default=0)


def progress_line(
    *,
    step: int,
    steps: int,
    loss: float,
    tokens_per_second: float,
    mfu: float | None,
    eta_seconds: float,
) -> str:
    """Return one line that says how far training is."""
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {loss:.4f}",
        f"{tokens_per_second:,.0f} tok/s",
        f"MFU {mfu:.1%}" if mfu is not None else "",
        f"ETA {_duration(eta_seconds)}",
    ]
    return "  ".join(part for part in parts if part)


class Meter:
    """Tokens per second over the last `window` updates."""

    def __init__(self, start: float, *, window: int = 20):
        self._marks = deque([(start, 0)], maxlen=window + 1)  # seconds, tokens in all

    def update(self, tokens: int, now: float) -> float:
        """Count `tokens` more, done at `now`; return tokens per second."""
        self._marks.append((now, self._marks[-1][1] + tokens))
        return self.tokens_per_second

    @property
    def tokens_per_second(self) -> float:
        """Return the rate over the window; NaN before the first update."""
        (start, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - start) if now > start else math.nan

    def eta_seconds(self, tokens_left: int) -> float:
        """Return how long `tokens_left` take at this rate."""
        rate = self.tokens_per_second
        return tokens_left / rate if rate > 0 else math.nan


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Return what `gzip -9` and `xz -9` need for each byte of `data`, in bits."""
    if not data:
        raise ConfigError("there are 0 bytes to compress; allowed: at least 1")
    sizes = {
        "gzip": len(gzip.compress(data, compresslevel=9)),
        "xz": len(lzma.compress(data, preset=9)),
    }
    return {f"{k}_bits_per_byte": 8 * size / len(data) for k, size in sizes.items()}


def plot_loss(
    run_dir: Path,
    *,
    title: str,
    unit: str = "nats per token",
    references: Mapping[str, float] | None = None,
) -> Path:
    """Draw `loss.png` from `metrics.jsonl` and return its path.

    `references` are horizontal lines, name -> loss in `unit`. Zero-shot tasks that
    were evaluated on the way stand beneath, one strip each.
    """
    records = read_metrics(run_dir / RECORDS)
    tasks = sorted({name for r in records for name in r if name.startswith(ZERO_SHOT)})
    from matplotlib.figure import Figure  # half a second that few wait for

    figure = Figure(figsize=(9, 5.5 + 2 * len(tasks)), dpi=120, layout="constrained")
    heights = [5.5, *[2] * len(tasks)]
    axes, *more = figure.subplots(
        len(heights), squeeze=False, sharex=True, height_ratios=heights
    )[:, 0]
    for name, below in zip(tasks, more, strict=True):
        curve = _curve(records, name)
        below.plot(curve.steps, curve.values, color=COLORS["validation"], marker="o")
        below.set_ylabel(name.removeprefix(ZERO_SHOT), fontsize=11)
        below.grid(color="#e6e6e6", linewidth=0.8)
        below.spines[["top", "right"]].set_visible(False)
    train, validation = _curve(records, "train_loss"), _curve(records, "val_loss")
    labels = _draw_train(axes, train) + _draw_validation(axes, validation)
    labels += _draw_references(axes, references or {})
    _crop(axes, [train, validation], references or {})
    axes.set_title(title, fontsize=15, loc="left", pad=12)
    (more or [axes])[-1].set_xlabel("step", fontsize=13)
    axes.set_ylabel(f"loss, {unit}", fontsize=13)
    axes.tick_params(labelsize=12, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    _write_labels(axes, labels)
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


class _Curve(NamedTuple):
    steps: list[int]
    values: list[float]


class _Label(NamedTuple):
    text: str
    y: float
    color: str


def _curve(records: list[dict[str, Any]], name: str) -> _Curve:
    points = [
        (record["step"], record[name])
        for record in records
        if "event" not in record and record.get(name) is not None
    ]
    return _Curve([step for step, _ in points], [value for _, value in points])


def _draw_train(axes, curve: _Curve) -> list[_Label]:
    steps, values = curve
    if not steps:
        return []
    smooth, color = _smooth(values), COLORS["train"]
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth, color=color, linewidth=2)
    return [_Label(f"train {smooth[-1]:.3f}", smooth[-1], color)]


def _draw_validation(axes, curve: _Curve) -> list[_Label]:
    steps, values = curve
    if not steps:
        return []
    color = COLORS["validation"]
    axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=5)
    return [_Label(f"validation {values[-1]:.3f}", values[-1], color)]


def _draw_references(axes, references: Mapping[str, float]) -> list[_Label]:
    for value in references.values():
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (5, 4)))
    return [
        _Label(f"{name} {value:.3f}", value, GREY) for name, value in references.items()
    ]


def _smooth(values: list[float], share: float = 0.02) -> list[float]:
    """Return at each value the mean of the `share` of all values around it."""
    radius = round(share * len(values) / 2)
    reach = (min(i, radius) for i in range(len(values)))  # no lag in the first fall
    spans = [values[i - r : i + r + 1] for i, r in enumerate(reach)]
    return [sum(span) / len(span) for span in spans]


def _crop(axes, curves: list[_Curve], references: Mapping[str, float]) -> None:
    """End the axis above what the curves reach after the first fall."""
    last = max((curve.steps[-1] for curve in curves if curve.steps), default=0)
    later = [
        value
        for curve in curves
        for step, value in zip(curve.steps, curve.values, strict=True)
        if step >= FIRST_FALL * last
    ]
    values = later + list(references.values())
    if values:
        margin = 0.06 * (max(values) - min(values)) or 1.0
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _write_labels(axes, labels: list[_Label]) -> None:
    """Write each label right of the axes, near its height, none over another."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.y)
    heights = _spread([label.y for label in labels], 0.05 * (high - low))
    for label, y in zip(labels, heights, strict=True):
        place = dict(xy=(1.01, y), xycoords=("axes fraction", "data"))
        axes.annotate(label.text, **place, color=label.color, fontsize=12, va="center")


def _spread(rising: list[float], gap: float) -> list[float]:
    """Return heights near `rising` and at least `gap` apart."""
    raised = list(rising)
    for i in range(1, len(raised)):
        raised[i] = max(raised[i], raised[i - 1] + gap)
    lowered = list(rising)
    for i in reversed(range(len(lowered) - 1)):
        lowered[i] = min(lowered[i], lowered[i + 1] - gap)
    return [(up + down) / 2 for up, down in zip(raised, lowered, strict=True)]


def _drop_again(path: Path, step: int, finishes: bool) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = read_metrics(path)
    kept = [r for r in records if r.get("step", 0) <= step and r.get("event") != "done"]
    if finishes:
        kept = [r for r in kept if r.get("step") != step or not _measures(r)]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(map(_line, kept)), encoding="utf-8")
    os.replace(fresh, path)
    return kept


def _measures(record: dict[str, Any]) -> bool:
    """Say whether the record is of what stands beside training."""
    return any(name in (LOSS, TEXTS) or name.startswith(ZERO_SHOT) for name in record)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole:02}s" if minutes else f"{whole}s"


def _open_sinks(run_dir: Path, config: LogConfig, resume_step: int) -> list[_Sink]:
    sinks = []
    if config.tensorboard:
        sinks.append(_open_tensorboard(run_dir, resume_step))
    if config.wandb is not None:
        sinks.append(_open_wandb(run_dir, config.wandb))
    return sinks


def _open_tensorboard(run_dir: Path, resume_step: int) -> _Sink:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise _missing("log.tensorboard", True, "tensorboard") from error
    writer = SummaryWriter(str(run_dir), purge_step=resume_step + 1)

    def write(scalars: dict[str, Any], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Sink(write, writer.close)


def _open_wandb(run_dir: Path, project: str) -> _Sink:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise _missing("log.wandb", project, "wandb") from error
    run = wandb.init(project=project, dir=str(run_dir), name=run_dir.name)
    return _Sink(lambda scalars, step: run.log(scalars, step=step), run.finish)


def _missing(name: str, value: object, extra: str) -> ConfigError:
    remedy = f'pip install "gpt2_jax[{extra}]"'
    return ConfigError(f"{name} is {value!r} but the extra is missing: {remedy}")
