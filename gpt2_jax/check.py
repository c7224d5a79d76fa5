"""Verify a run directory: every checkpoint, config, records, tokenizer and data.

Nothing there is changed. A run may be saving into it meanwhile: a step that it deletes
is left out.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoint import CheckpointError, Verified, saved_steps, verify
from gpt2_jax.config import ConfigError, read_config
from gpt2_jax.data.shards import open_split, read_manifest
from gpt2_jax.export import OWN, open_tokenizer
from gpt2_jax.metrics import RECORDS, last_step, read_metrics

READABLE = "allowed: a directory that gpt2-jax train or convert made"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One checkpoint."""

    step: int
    ok: bool
    sha256: str | None  # of the state: `digest.state_digest`
    problem: str | None

    def line(self) -> str:
        """Return it as one line."""
        told = f"ok  sha256 {self.sha256}" if self.ok else f"damaged  {self.problem}"
        return f"step {self.step}  {told}"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something else that a run directory holds."""

    name: str
    problem: str | None

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.name}  {self.problem or 'ok'}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found."""

    run: str
    steps: tuple[Step, ...]  # by number
    parts: tuple[Part, ...]
    converted_from: str | None  # of a model that was converted, not trained here

    @property
    def newest_good(self) -> int | None:
        """Return the step that the run goes on from."""
        return max((step.step for step in self.steps if step.ok), default=None)

    @property
    def good(self) -> bool:
        """Say whether all of it is as it was written."""
        fine = all(part.problem is None for part in self.parts)
        return fine and bool(self.steps) and all(step.ok for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        parts = {part.name: dataclasses.asdict(part) for part in self.parts}
        return dict(
            run=self.run,
            steps=[dataclasses.asdict(step) for step in self.steps],
            **{
                key: _verdict(parts.get(name))
                for key, name in (
                    ("config", "config.json"),
                    ("metrics", RECORDS),
                    ("tokenizer", OWN),
                    ("data", "data"),
                )
            },
            converted_from=self.converted_from,
            good=self.good,
            newest_good=self.newest_good,
        )

    def remedy(self) -> str:
        """Return what is wrong and what can be done, in one line."""
        bad = [f"step {step.step}" for step in self.steps if not step.ok]
        bad += [part.name for part in self.parts if part.problem]
        left = f"the newest good checkpoint is step {self.newest_good}"
        if self.newest_good is None:
            left = "no checkpoint is good: begin again in another run directory"
        return f"{self.run} is not as it was written: {', '.join(bad)}; {left}"


def check_run(run: Path, *, say: Callable[[str], None]) -> Report:
    """Return what is good and what is not in the run directory, told as it is found.

    All arrays are read, one checkpoint after another, onto one device of any kind.

    Raises
    ------
    ConfigError
        If it is no run directory, or holds no checkpoint.
    """
    directory = _checkpoints(run)
    steps: list[Step] = []
    newest: Verified | None = None
    for number in reversed(saved_steps(directory)):
        step, found = _check_step(directory, number)
        if step is not None:
            steps.append(step)
            say(step.line())
        newest = found or newest
    meta = {} if newest is None else newest.meta
    reached = max((step.step for step in steps if step.ok), default=0)
    parts = [Part(name="config.json", problem=_check_config(run))]
    if "converted_from" not in meta:
        parts.append(Part(name=RECORDS, problem=_check_records(run, meta, reached)))
    if (run / OWN).is_dir():
        parts.append(Part(name=OWN, problem=_check_tokenizer(run, meta)))
    if (run / "data").is_dir():
        parts.append(Part(name="data", problem=_check_data(run / "data", meta)))
    for part in parts:
        say(part.line())
    origin = meta.get("converted_from")
    if origin is not None:
        say(f"converted from {origin}: parameters alone, no run to resume")
    return Report(
        run=str(run), steps=tuple(steps), parts=tuple(parts), converted_from=origin
    )


def _verdict(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    return dict(ok=part["problem"] is None, problem=part["problem"])


def _checkpoints(run: Path) -> Path:
    """Return the directory of the checkpoints, which holds at least one."""
    directory = run / "checkpoints"
    if not run.is_dir():
        what = "a file" if run.exists() else "missing"
        raise ConfigError(f"RUN {str(run)!r} is {what}; {READABLE}")
    if not directory.is_dir():
        if (run / RECORDS).is_file():
            raise ConfigError(f"RUN {str(run)!r} holds no checkpoint; {_reached(run)}")
        raise ConfigError(
            f"RUN {str(run)!r} is no run directory: it holds no checkpoints/; "
            f"{READABLE}"
        )
    if not saved_steps(directory):
        aside = sorted(path.name for path in directory.glob("*.damaged"))
        if aside:
            told = f"all of them were damaged and set aside: {', '.join(aside)}"
            raise ConfigError(f"RUN {str(run)!r} holds no checkpoint; {told}")
        raise ConfigError(f"RUN {str(run)!r} holds no checkpoint; {_reached(run)}")
    return directory


def _reached(run: Path) -> str:
    last = last_step(run / RECORDS)
    return f"its {RECORDS} ends at step {last}; the first save comes with more steps"


def _check_step(directory: Path, step: int) -> tuple[Step | None, Verified | None]:
    """Return the verdict; none if the run deleted the step while it was read."""
    try:
        found = verify(directory, step)
    except CheckpointError as error:
        path = directory / str(step)
        if not path.exists():
            return None, None
        problem = str(error).removeprefix(f"checkpoint {path} ")
        problem = problem.removeprefix("is damaged: ")
        return Step(step=step, ok=False, sha256=None, problem=problem), None
    return Step(step=step, ok=True, sha256=found.sha256, problem=None), found


def _check_config(run: Path) -> str | None:
    try:
        read_config(run / "config.json")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ConfigError as error:
        return str(error)
    return None


def _check_records(run: Path, meta: dict[str, Any], reached: int) -> str | None:
    """Compare the records' order, and their end with the newest checkpoint.

    How far apart they stand is not fixed: `log.interval` may change between sessions.
    """
    try:
        records = read_metrics(run / RECORDS)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ConfigError as error:
        return str(error)
    trained = [record for record in records if "train_loss" in record]
    steps: list[Any] = [record.get("step") for record in trained]
    if not all(isinstance(step, int) for step in steps):
        return "has a record of train_loss without a step"
    for before, step in zip(steps, steps[1:], strict=False):
        if step <= before:
            return f"has step {step} after step {before}"
    if meta:
        interval = meta["config"]["log"]["interval"]
        due = reached // interval * interval
        if max(steps, default=0) < due:
            return f"ends at step {max(steps, default=0)}; written was step {due}"
    return None


def _check_tokenizer(run: Path, meta: dict[str, Any]) -> str | None:
    try:
        found = open_tokenizer(run, OWN).fingerprint
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    wanted = meta.get("tokenizer", found)
    if found == wanted:
        return None
    return f"has fingerprint {found[:12]}; the run was trained with {wanted[:12]}"


def _check_data(directory: Path, meta: dict[str, Any]) -> str | None:
    try:
        manifest = read_manifest(directory)
        for split in manifest.splits:
            open_split(directory, split, n_vocab=manifest.n_vocab, verify=True)
    except (OSError, ConfigError) as error:
        return str(error)
    wanted = meta.get("data", manifest.digest)
    if manifest.digest == wanted:
        return None
    return f"has fingerprint {manifest.digest[:12]}; the run is on {wanted[:12]}"
