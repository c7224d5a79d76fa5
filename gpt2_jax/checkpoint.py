"""Save a run's state, verify it, restore it onto any mesh.

    DIRECTORY/STEP/params     parameters, name -> array
    DIRECTORY/STEP/opt_state  optimizer state, name -> array
    DIRECTORY/STEP/meta       JSON: names, shapes, dtypes and digests of both, versions,
                              what the caller adds, and a SHA-256 of all that

A step directory appears by one rename, once everything in it is written, and leaves
by one, to STEP.deleted. STEP.damaged is one that a run found damaged and went on
without. Orbax reads flipped bits of an array as other numbers and casts to the dtype
asked for; digests and dtypes are compared here.
"""

import functools
import hashlib
import json
import logging
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gpt2_jax.config import ConfigError
from gpt2_jax.digest import digests, named, prints, state_digest

FORMAT_VERSION = 1

# What Orbax and TensorStore raise for missing, cut and altered files: every file of a
# checkpoint was cut, emptied, deleted and flipped (tests/test_checkpoint.py).
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)
WRITE_ERRORS = (OSError, ValueError, RuntimeError)

UNFINISHED = "*.orbax-checkpoint-tmp*"  # Orbax's name for a save until it is whole
DELETED, DAMAGED = ".deleted", ".damaged"
TRIES = 10  # to open a directory that a run deletes steps from meanwhile

# Orbax logs a screen of tracebacks for each failure, which it raises too. When a read
# or write fails it closes the event loop of those still going on: asyncio, Python and
# TensorStore's threads tell of them later, when the failure has long been told.
ORBAX = str(Path(ocp.__file__).parent)
CLOSED = "Event loop is closed"
STATUS = re.compile(r"[A-Z_]+: ")  # how TensorStore's errors begin: OUT_OF_RANGE: ...
logging.getLogger("absl").addFilter(lambda record: ORBAX not in record.pathname)


def _is_left_over(error: BaseException | None) -> bool:
    """Say whether Orbax or TensorStore raised it, or a call into a loop they closed."""
    trace = None if error is None else error.__traceback__
    if trace is None and STATUS.match(str(error)):
        return True  # TensorStore's threads are not Python's: no frames
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    return str(error) == CLOSED or any(name.startswith(ORBAX) for name in files)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return ORBAX not in record.getMessage() and not _is_left_over(error)


logging.getLogger("asyncio").addFilter(_is_news)


@functools.cache
def _drop_what_is_left_over() -> None:
    """Let Python print nothing of reads and writes that go on after one failed."""
    tell_unraisable, tell = sys.unraisablehook, sys.excepthook

    def unraisable(about: Any) -> None:
        code = getattr(about.object, "cr_code", None)
        orbax = code is not None and code.co_filename.startswith(ORBAX)
        if not orbax and str(about.exc_value) != CLOSED:
            tell_unraisable(about)

    def uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if str(error) != CLOSED:
            tell(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


@functools.cache
def _write_small_arrays_whole() -> None:
    """Let one device write a replicated array that gives each less than 1 MiB.

    Orbax gives every replica its slice, and each slice of each shape is a program: with
    8 devices the first save of the quickstart took 9.6 s, this way 2.0, later ones 0.6
    and 0.3. The handler is Orbax's own, for all that this process saves.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, or cannot be what was asked for."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; an older one may be."""


class Restored(NamedTuple):
    """A run's state as it was saved at `step`."""

    step: int
    params: Any
    opt_state: Any
    meta: dict[str, Any]


def print_to_stderr(line: str) -> None:
    """Print one line to standard error."""
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run, in `directory`, one directory for each step.

    Leaving the context waits for the save in flight and raises if it failed. Every
    process enters, saves and restores; the directory is on a file system they share.
    Of the steps saved, the newest `keep` stay, and multiples of `keep_every` if that is
    not 0. The others go once a newer one is committed and its meta reads back: with
    the next save or at the end, so that one more may be there in between.
    """

    def __init__(
        self,
        directory: Path,
        *,
        interval: int,
        keep: int,
        keep_every: int,
        report: Callable[[str], None] = print_to_stderr,
    ):
        _sweep(directory, report)
        _drop_what_is_left_over()
        _write_small_arrays_whole()
        self._directory = directory
        self._manager = _open(directory, read_only=False)
        self._interval, self._keep, self._keep_every = interval, keep, keep_every
        self._report = report
        self._damaged: set[int] = set()
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is not None and jax.process_count() > 1:
            return  # who failed alone would wait for ever for the others' part
        try:
            self.finish()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._manager.close()

    def latest_step(self) -> int | None:
        """Return the newest step saved, damaged or not; None if there is none.

        Raises
        ------
        DamagedError
            If all that is there was found damaged and set aside: this run has begun.
        """
        _refuse_leftovers(self._directory)
        return max(saved_steps(self._directory), default=None)

    def due(self, step: int) -> bool:
        """Say whether `interval` asks for a save at `step`."""
        return step % self._interval == 0

    def save(self, step: int, params: Any, opt_state: Any, meta: dict) -> None:
        """Start to save the state of `step`; do nothing if that step is saved already.

        Returns once the arrays are copied to the host (without a copy on CPU), so they
        may be donated. `meta` is JSON; its keys stand beside those of `read_meta`.

        Raises
        ------
        CheckpointError
            If the save before this one failed, this one cannot begin, or a number in
            the state is not finite.
        """
        self.finish()
        self._set_damaged_aside()
        if step in saved_steps(self._directory):
            return
        state = dict(params=named(params), opt_state=named(opt_state))
        items = ocp.args.Composite(
            **{item: ocp.args.StandardSave(tree) for item, tree in state.items()},
            meta=ocp.args.JsonSave(_seal(meta | self._describe(step, state))),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except WRITE_ERRORS as error:
            raise self._save_failure(_brief(error)) from error
        self._saving = step

    def finish(self) -> None:
        """Wait for the save in flight.

        Raises
        ------
        CheckpointError
            If it failed; the checkpoints before it are as they were.
        """
        saved, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if saved is not None:
                _read_meta(self._manager, saved)
        except (*WRITE_ERRORS, DamagedError) as error:
            raise self._save_failure(_brief(error)) from error
        if saved is not None and jax.process_index() == 0:
            self._delete_older(saved)

    def refuse_if_full(
        self, params: Any, opt_state: Any, *, step: int, last: int
    ) -> None:
        """Refuse to go on from `step` to `last` where the disk has no room for it.

        Counted are the bytes of the arrays, for all checkpoints that will be there at
        once, without those of `keep_every`. The trees may be of `ShapeDtypeStruct`.

        Raises
        ------
        CheckpointError
            If fewer bytes are free.
        """
        leaves = jax.tree.leaves((params, opt_state))
        one = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        there = set(saved_steps(self._directory)) - self._damaged
        saves = -(-(last - step) // self._interval)
        count = min(saves, max(1, self._keep + 1 - len(there)))
        free = shutil.disk_usage(self._directory).free
        if count * one > free:
            raise CheckpointError(
                f"{self._directory} has {free:,} bytes free; {count} more checkpoints "
                f"of {one:,} need {count * one:,}; make room, choose another --run-dir "
                "or lower --checkpoint.keep"
            )

    def restore(self, step: int | None, params: Any, opt_state: Any) -> Restored:
        """Return the state of `step`, on the shardings of the targets.

        Targets are trees of arrays or of `jax.ShapeDtypeStruct` with shardings, on any
        mesh. With None, the newest step that is as it was written: each newer one is
        reported, and renamed to STEP.damaged by the next save.

        Raises
        ------
        DamagedError
            If the step, or every step, is not as it was written.
        CheckpointError
            If names, shapes or dtypes are not those of the targets.
        """
        targets = dict(params=params, opt_state=opt_state)
        found = _restore(self._manager, step, targets, self._report)
        if step is None:
            self._damaged = {s for s in saved_steps(self._directory) if s > found.step}
        return Restored(found.step, found.trees[0], found.trees[1], found.meta)

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """Return what was saved beside the arrays of `step`, or of the newest step.

        Keys: the caller's, `format_version`, `versions`, and for `params` and
        `opt_state` name -> shape, dtype, digest.
        """
        if step is not None:
            return _read_meta(self._manager, step)
        read = functools.partial(_read_meta, self._manager)
        return _newest_good(self._manager, read, self._report)

    def _set_damaged_aside(self) -> None:
        for step in self._damaged:
            if jax.process_index() == 0:
                aside = self._directory / f"{step}{DAMAGED}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        if self._damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()
        self._damaged = set()

    def _describe(self, step: int, state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found = {item: prints(tree) for item, tree in state.items()}
        bad = [
            f"{item} {name} ({one.nonfinite:,} of {state[item][name].size:,})"
            for item, tree in found.items()
            for name, one in tree.items()
            if one.nonfinite
        ]
        if bad:
            more = f" and {len(bad) - 4} arrays more" if len(bad) > 4 else ""
            why = f"step {step} has inf or NaN in {', '.join(bad[:4])}{more}"
            raise self._save_failure(f"{why}; lower --optimizer.learning-rate")
        names = ("gpt2_jax", "jax", "orbax-checkpoint")
        described: dict[str, Any] = {
            item: {
                name: dict(
                    shape=list(x.shape),
                    dtype=x.dtype.name,
                    digest=found[item][name].digest,
                )
                for name, x in tree.items()
            }
            for item, tree in state.items()
        }
        described["format_version"] = FORMAT_VERSION
        described["versions"] = {name: version(name) for name in names}
        return described

    def _delete_older(self, saved: int) -> None:
        """Delete what need not stay now that `saved` is on disk, whole."""
        steps = saved_steps(self._directory)
        every = self._keep_every
        kept = {saved, *steps[: self._keep]}
        kept |= {step for step in steps if every and step % every == 0}
        for step in sorted(set(steps) - kept):
            _delete(self._directory / str(step), self._report)

    def _save_failure(self, why: str) -> CheckpointError:
        good = max(saved_steps(self._directory), default=None)
        left = f"step {good} is the last one saved" if good is not None else "none yet"
        where = self._directory
        return CheckpointError(
            f"a checkpoint could not be saved in {where} ({left}): {why}"
        )


def restore_params(
    directory: Path,
    params: Any,
    step: int | None = None,
    *,
    report: Callable[[str], None] = print_to_stderr,
) -> Any:
    """Return the parameters of `step`, or of the newest good one, and nothing else.

    `params` is the target, as in `Checkpoints.restore`. Nothing on disk is changed.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory of checkpoints")
    manager = _open(directory, read_only=True)
    try:
        return _restore(manager, step, dict(params=params), report).trees[0]
    finally:
        manager.close()


def read_meta(
    directory: Path, *, report: Callable[[str], None] = print_to_stderr
) -> dict[str, Any] | None:
    """Return what stands beside the newest good checkpoint; None if there is none.

    Nothing on disk is changed, also while a run is saving there.

    Raises
    ------
    DamagedError
        If there are checkpoints and none is as it was written.
    """
    if not directory.is_dir():
        return None
    manager = _open(directory, read_only=True)
    try:
        _refuse_leftovers(directory)
        if not saved_steps(directory):
            return None
        return _newest_good(manager, functools.partial(_read_meta, manager), report)
    finally:
        manager.close()


class Verified(NamedTuple):
    """A checkpoint that is as it was written."""

    sha256: str  # of the whole state: `state_digest`
    meta: dict[str, Any]


def verify(directory: Path, step: int) -> Verified:
    """Read all of the checkpoint of `step`, on one device, and return its digest.

    Nothing on disk is changed, also while a run is saving there. The mesh it was saved
    from does not matter.

    Raises
    ------
    CheckpointError
        If it is not as it was written, or holds inf or NaN.
    """
    manager = _open(directory, read_only=True)
    try:
        meta = _read_meta(manager, step)
        targets = {item: _targets(meta[item]) for item in ("params", "opt_state")}
        params, opt_state = _restore(manager, step, targets, print_to_stderr).trees
    finally:
        manager.close()
    state = dict(params=params, opt_state=opt_state)
    bad = [name for name, one in prints(state).items() if one.nonfinite]
    if bad:
        raise CheckpointError(
            f"checkpoint {directory / str(step)} has inf or NaN in {', '.join(bad[:4])}"
        )
    return Verified(state_digest(step, params, opt_state), meta)


def saved_steps(directory: Path) -> list[int]:
    """Return the steps that have a directory, damaged or not, newest first.

    Orbax does not list a step that lost its commit file. To us it is damaged: were it
    absent, its run would begin again at step 0.
    """
    names = (path.name for path in directory.iterdir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _sweep(directory: Path, report: Callable[[str], None]) -> None:
    """Delete what a killed save or a killed deletion left."""
    if jax.process_index() != 0 or not directory.is_dir():
        return
    for path in [*directory.glob(UNFINISHED), *directory.glob(f"*{DELETED}")]:
        _delete(path, report)


def _delete(path: Path, report: Callable[[str], None]) -> None:
    """Delete a directory, which first loses its name: none is ever half a step."""
    doomed = path.with_name(path.name.removesuffix(DELETED) + DELETED)
    try:
        if path != doomed:
            path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        report(f"{path} could not be deleted: {_brief(error)}; delete it by hand")


def _refuse_leftovers(directory: Path) -> None:
    """Raise `DamagedError` if there is no step but one that was set aside."""
    aside = sorted(path.name for path in directory.glob(f"*{DAMAGED}"))
    if aside and not saved_steps(directory):
        raise DamagedError(
            f"every checkpoint in {directory} is damaged: {', '.join(aside)}; nothing "
            "was changed; begin again in another run directory"
        )


def _open(directory: Path, *, read_only: bool) -> ocp.CheckpointManager:
    # Where directories are made in the background and one cannot be, threads wait for
    # it at the exit: 240 s later they still did (Orbax 0.12.8).
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(  # it keeps all steps
        read_only=read_only, async_options=at_once
    )
    for left in reversed(range(TRIES)):
        try:
            return ocp.CheckpointManager(directory.absolute(), options=options)
        except WRITE_ERRORS as error:
            # Orbax lists the steps, then looks at each: a run may delete one between.
            if read_only and left and isinstance(error, FileNotFoundError):
                continue
            text = f"checkpoints cannot be kept in {directory}: {_brief(error)}"
            raise CheckpointError(text) from error
    raise AssertionError  # the last try returns or raises


def _seal(meta: dict[str, Any]) -> dict[str, Any]:
    return dict(sha256=_sha256(meta), meta=meta)


def _sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


class _Found(NamedTuple):
    step: int
    trees: list[Any]
    meta: dict[str, Any]


def _newest_good(manager, read: Callable[[int], Any], report: Callable[[str], None]):
    """Return what `read` gives for the newest step that it does not find damaged."""
    steps = saved_steps(Path(manager.directory))
    if not steps:
        raise CheckpointError(f"{manager.directory} holds no checkpoint")
    for step in steps:
        try:
            return read(step)
        except DamagedError as error:
            report(f"{error}; trying the step before it")
    found = ", ".join(map(str, steps))
    text = f"every checkpoint in {manager.directory} is damaged: {found}; nothing was"
    raise DamagedError(f"{text} changed; begin again in another run directory")


def _restore(manager, step, targets: dict[str, Any], report) -> _Found:
    def read(step: int) -> _Found:
        meta = _read_meta(manager, step)
        _refuse_misfit(step, meta, targets)
        items = {item: _restore_item(named(tree)) for item, tree in targets.items()}
        found = _read(manager, step, items)
        for item in targets:
            _refuse_flips(manager, step, item, meta[item], found[item])
        return _Found(step, [_like(targets[i], found[i]) for i in targets], meta)

    return _newest_good(manager, read, report) if step is None else read(step)


def _read_meta(manager, step: int) -> dict[str, Any]:
    steps = saved_steps(Path(manager.directory))
    if step not in steps:
        there = f"{manager.directory} holds {steps or 'none'}"
        raise CheckpointError(f"there is no checkpoint of step {step}; {there}")
    sealed = _read(manager, step, dict(meta=ocp.args.JsonRestore()))["meta"]
    meta = sealed.get("meta") if isinstance(sealed, dict) else None
    if meta is None or sealed.get("sha256") != _sha256(meta):
        raise _damaged(manager, step, "meta is not what its SHA-256 says")
    found, known = meta["format_version"], FORMAT_VERSION
    if found > known:
        text = f"checkpoint step {step} has format version {found}, this gpt2_jax reads"
        raise CheckpointError(f"{text} up to {known}; install a newer gpt2_jax")
    return meta


def _read(manager, step: int, items: dict[str, Any]) -> Any:
    with _Reading(manager, step):
        return manager.restore(step, args=ocp.args.Composite(**items))


class _Reading:
    """Turn what Orbax raises for a damaged file into `DamagedError`, nothing else.

    Orbax wraps some of it in a bare `Exception` (0.12.8 serialization.py), whose cause
    tells a damaged file from a lack of memory.
    """

    def __init__(self, manager, step: int):
        self._manager, self._step = manager, step

    def __enter__(self):
        _write_small_arrays_whole()

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        cause = error.__cause__ if error and kind is Exception else error
        if isinstance(cause, READ_ERRORS):
            _drop_what_is_left_over()  # hooks of a library, no sooner
            raise _damaged(self._manager, self._step, _brief(cause)) from error


def _damaged(manager, step: int, why: str) -> DamagedError:
    return DamagedError(f"checkpoint {manager.directory / str(step)} is damaged: {why}")


def _brief(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    text = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
    # TensorStore names the operation first and the cause last, long paths between.
    text = text if len(text) < 200 else f"{text[:70]} ... {text[-120:]}"
    return f"{type(error).__name__}: {text}"


def _refuse_misfit(step: int, meta: dict[str, Any], targets: dict[str, Any]) -> None:
    misfits = [
        f"{item} {line}"
        for item, tree in targets.items()
        for line in _misfits(meta[item], named(tree))
    ]
    if misfits:
        more = f"; and {len(misfits) - 8} more" if len(misfits) > 8 else ""
        text = f"checkpoint step {step} is of another model or optimizer: "
        text += "; ".join(misfits[:8]) + more
        raise CheckpointError(f"{text}; use the config the run was saved with")


def _misfits(saved: dict[str, Any], target: dict[str, Any]) -> Iterable[str]:
    for name in sorted(saved.keys() | target.keys()):
        if name not in target:
            yield f"{name} is saved but not asked for"
        elif name not in saved:
            yield f"{name} is asked for but not saved"
        else:
            old = f"{saved[name]['dtype']}{saved[name]['shape']}"
            new = f"{target[name].dtype.name}{list(target[name].shape)}"
            if old != new:
                yield f"{name} is {old} in the checkpoint, {new} here"


def _restore_item(tree: dict[str, Any]) -> ocp.args.StandardRestore:
    for name, leaf in tree.items():
        if leaf.sharding is None:
            raise CheckpointError(f"the target of {name} has no sharding; give it one")
    return ocp.args.StandardRestore(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in tree.items()
        }
    )


def _refuse_flips(manager, step, item, saved: dict[str, Any], found: Any) -> None:
    now = digests(found)
    bad = [name for name in saved if saved[name]["digest"] != now[name]]
    if bad:
        named = f"{item} {', '.join(bad[:8])}"
        raise _damaged(manager, step, f"digests differ from those saved: {named}")


def _targets(saved: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"]), sharding=where)
        for name, x in saved.items()
    }


def _like(target: Any, found: dict[str, Any]) -> Any:
    structure = jax.tree.structure(target)
    return jax.tree.unflatten(structure, [found[name] for name in named(target)])
