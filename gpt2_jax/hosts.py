"""Many processes of one run: join them, let one go first, agree before step 0.

One process is the common case, and then nothing here talks to anybody.
"""

import contextlib
import hashlib
import itertools
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from gpt2_jax.config import ConfigError, check

T = TypeVar("T")

ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT, NUMBER = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # of a Cloud TPU VM
WAIT_SECONDS = 300  # for the other processes to start
UDP = socket.SOCK_DGRAM
MESSAGE_BYTES = 2048  # of an error that all processes are told
EXIT_SECONDS = 5  # for the others to fail in the same way
HOST_BYTES = 64  # of a host's name
SEEN_SECONDS = (
    60  # until a new file is seen on every host; gcsfuse keeps names that long
)

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


def join(heartbeat: int = 100) -> None:
    """Join the other processes of the run, where the environment says there are any.

    That is where JAX_COORDINATOR_ADDRESS is set (with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID), and on a Cloud TPU VM, whose metadata name the hosts of the slice.
    Elsewhere nothing happens. To be called before jax is used. A process that is
    silent for `heartbeat` seconds counts as dead, and jax ends the others.

    Raises
    ------
    ConfigError
        If the variables are incomplete, or jax refuses. A process that waits for the
        others in vain ends with one line and status 2.
    """
    address = os.environ.get(ADDRESS)
    if address is None and not any(map(os.path.exists, TPU_DEVICES)):
        return
    how: dict[str, Any] = dict(
        initialization_timeout=2 * WAIT_SECONDS, heartbeat_timeout_seconds=heartbeat
    )
    who, count = "a process", 0
    heard: set[int] = set()  # the processes that have come, as far as is known
    joined = threading.Event()
    if address is not None:
        count, number = _number(COUNT, least=1), _number(NUMBER, least=0)
        check(number < count, NUMBER, number, f"< {COUNT} = {count}")
        how["coordinator_address"] = address
        how |= dict(num_processes=count, process_id=number)
        who = f"process {number} of {count}"
        heard.add(number)
        call = threading.Thread(
            target=_call_roll, args=(address, number, heard, joined), daemon=True
        )
        call.start()
    # jax itself ends a process that waited too long with a C++ stack, not an error.
    where = f" at {address}" if address else ""
    waited = f"error: {who} waited {WAIT_SECONDS} s{where} for the others"
    watch = threading.Timer(WAIT_SECONDS, _give_up, [waited, count, heard])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{who} cannot join the others{where}: {first}") from error
    finally:
        watch.cancel()
        joined.set()


def _give_up(waited: str, count: int, heard: set[int]) -> None:
    missing = ", ".join(str(n) for n in range(count) if n not in heard)
    if count and 0 not in heard:  # who tells of the others
        missing = "0, which knows of the rest"
    silent = f"; nothing was heard of process {missing}" if missing else ""
    cure = f"start all of them, with the same {ADDRESS} and numbers from 0"
    print(f"{waited}{silent}; {cure}", file=sys.stderr, flush=True)
    os._exit(2)


def _call_roll(
    address: str, number: int, heard: set[int], joined: threading.Event
) -> None:
    """Add to `heard` the numbers of the processes that have come, until `joined`.

    jax's service does not tell whom it waits for. Here each process sends its number,
    by UDP, to the coordinator's port; process 0 answers with all that it has heard.
    """
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, UDP) as line:
        line.settimeout(1)
        with contextlib.suppress(OSError, ValueError):  # taken, or no port: jax says so
            if number == 0:
                line.bind(("", int(port)))
        while not joined.wait(0 if number == 0 else 1):
            # Nobody there, or not yet: a name may resolve later, a process come.
            with contextlib.suppress(OSError, ValueError):
                if number:
                    line.sendto(str(number).encode(), (host.strip("[]"), int(port)))
                text, sender = line.recvfrom(65_536)
                heard.update(int(word) for word in text.split())
                if number == 0:
                    line.sendto(" ".join(map(str, heard)).encode(), sender)


def _number(name: str, *, least: int) -> int:
    text = os.environ.get(name, "")
    good = text.isdecimal() and int(text) >= least
    check(good, name, text, f"a number >= {least}, beside {ADDRESS}")
    return int(text)


def is_first() -> bool:
    """Say whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def first_goes_first(action: Callable[[], T]) -> T:
    """Return what `action` gives; process 0 has done it before the others begin.

    What makes `ConfigError` in process 0 makes it in all.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if is_first():
        try:
            result = action()
        except ConfigError as caught:
            error = caught
    text = broadcast("" if error is None else str(error))
    if text:
        raise ConfigError(text) from error
    return result if is_first() else action()  # pyright: ignore[reportReturnType]


def broadcast(text: str) -> str:
    """Return process 0's text, cut to 2048 bytes."""
    if jax.process_count() == 1:
        return text
    room = np.zeros(MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:MESSAGE_BYTES], np.uint8)
    room[: len(data)] = data
    found = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return found.tobytes().rstrip(b"\0").decode("utf-8", errors="ignore")


def check_same(fields: Mapping[str, str]) -> None:
    """Compare texts with those of the other processes; all give the same names.

    Raises
    ------
    ConfigError
        If one differs from process 0's, in every process: it names field, process and
        host.
    """
    if jax.process_count() == 1:
        return
    mine = [hashlib.sha256(text.encode()).digest() for text in fields.values()]
    name = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
    sent = np.frombuffer(b"".join([name, *mine]), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(sent))
    names = [row[:HOST_BYTES].tobytes().rstrip(b"\0").decode() for row in everyone]
    digests = everyone[:, HOST_BYTES:].reshape(len(everyone), len(fields), -1)
    other = (digests != digests[0]).any(axis=2)  # (process, field)
    faults = []
    for field, odd in zip(fields, other.T, strict=True):
        who = ", ".join(f"{p} ({names[p]})" for p in np.flatnonzero(odd))
        if who:
            faults.append(f"{field} on process {who} is not that of process 0")
    if faults:
        raise ConfigError(
            f"{'; '.join(faults)}; start all processes with the same code, versions, "
            "config and data"
        )


def check_shared(directory: Path) -> None:
    """Refuse a directory that is not one and the same for all processes."""
    if jax.process_count() == 1:
        return
    mark = directory / f".seen-{os.getpid()}-{time.time_ns()}"
    if is_first():
        mark.touch()
    mark = directory / broadcast(mark.name)
    until = time.monotonic() + SEEN_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    try:
        check_same({"run_dir": f"{seen}"})
    finally:
        if is_first():
            mark.unlink()


def fingerprint() -> dict[str, str]:
    """Return what makes this process compile another program than its peers would."""
    found = {"code": code_digest(), "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
        found.setdefault(name, "not installed")
    found |= {name: os.environ.get(name, "") for name in VARIABLES}
    return found | {name: str(getattr(jax.config, name)) for name in SETTINGS}


def code_digest() -> str:
    """Return a SHA-256 of this package's source."""
    folder = Path(__file__).parent
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()


def asked_to_stop(ask: int) -> bool:
    """Say whether SIGTERM came to any of several processes: at the same ask in all.

    Every process counts its asks. One process has its own handler.
    """
    if jax.process_count() == 1:
        return False
    return multihost_utils.reached_preemption_sync_point(ask)


@contextlib.contextmanager
def end_soon() -> Iterator[None]:
    """End this process soon after an error inside, though the others go on.

    At its exit jax waits for the others, who may wait for this process. When all have
    the same error, none waits.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            timer = threading.Timer(EXIT_SECONDS, os._exit, [2])
            timer.daemon = True
            timer.start()
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            first = str(error).splitlines()[0]
            raise ConfigError(
                f"process {jax.process_index()} cannot go on with the others: {first}; "
                "start all of them again: they go on from the last checkpoint"
            ) from error
        raise


def leave(status: int) -> NoReturn:
    """End this process, with all the others, and wait for no thread that is stuck."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def connect(mesh: Mesh) -> None:
    """Sum once over every group of devices that programs on this mesh may sum over.

    On CPUs gloo connects a group when it first sums, and a process that comes 30 s
    after the others, since it compiled for longer, would end the run. Here all come at
    once; once connected, they wait for one another. Elsewhere nothing is to be done.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    wide = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, count):

            def add(x: jax.Array, axes: tuple[str, ...] = axes) -> jax.Array:
                return jax.lax.psum(x, axes)

            whole = PartitionSpec()
            total = jax.shard_map(add, mesh=mesh, in_specs=whole, out_specs=whole)
            jax.jit(total)(np.ones(())).block_until_ready()


def wait_for_all(name: str) -> None:
    """Return once every process has come here, however long one takes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def publish(name: str, text: str) -> None:
    """Let the other processes read `text` under `name`, if process 0 can be reached."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(name, text, allow_overwrite=True)


def published(folder: str) -> dict[str, str] | None:
    """Return name -> text of all that is published under `folder/`.

    None if process 0 cannot be reached: jax ends such a run.
    """
    try:
        return dict(_client().key_value_dir_get(folder))
    except jax.errors.JaxRuntimeError:
        return None


def _client() -> Any:
    return distributed.global_state.client  # jax has no public door to it


def gather(tree: Any) -> Any:
    """Return every array whole on this host; all processes call it."""
    if jax.process_count() == 1:
        return tree
    whole = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(jax.numpy.asarray, whole)
