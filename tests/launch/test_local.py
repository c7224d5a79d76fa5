"""Many processes on one machine, with a fake gpt2-jax on PATH."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch/local.sh"
# Ends with $RC of its process; waits up to 30 s where $WAIT of it is set.
PROGRAM = f"""\
#!{sys.executable} -S
import os, signal, sys, time
me = os.environ["JAX_PROCESS_ID"]
ended = []
signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
if os.environ.get("DEAF") == me:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS", "XLA_FLAGS"]
print(sys.argv[1:], *[os.environ[name] for name in names], flush=True)
until = time.monotonic() + 30 * (me in os.environ.get("WAIT", ""))
while time.monotonic() < until and not ended:
    time.sleep(0.02)
print("saved" * len(ended), end="", flush=True)  # a last line without its end
sys.exit(int(os.environ.get("RC" + me, "0")))
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    program = tmp_path / "gpt2-jax"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PORT")}
    return kept | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def local(environment, *words: str, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(LOCAL), *words],
        env=environment | extra,
        capture_output=True,
        text=True,
        timeout=25,
    )


def lines_of(text: str, process: int) -> list[str]:
    prefix = f"[{process}] "
    return [x.removeprefix(prefix) for x in text.splitlines() if x.startswith(prefix)]


def test_each_process_is_told_who_it_is(environment):
    done = local(environment, "3", "quickstart", "--a b", PORT="5555", DEVICES="2")
    assert done.returncode == 0, done.stderr
    flag = "--xla_force_host_platform_device_count=2"
    said = f"['train', 'quickstart', '--a b'] 127.0.0.1:5555 3 cpu  {flag}"
    assert [lines_of(done.stdout, i) for i in range(3)] == [[said]] * 3


def test_four_devices_a_free_port_and_kept_flags_are_the_default(environment):
    done = local(environment, "1", XLA_FLAGS="--xla_other=1")
    [said] = lines_of(done.stdout, 0)
    assert said.endswith("--xla_other=1 --xla_force_host_platform_device_count=4")
    assert 1024 < int(said.partition("127.0.0.1:")[2].split()[0]) < 2**16


def test_one_that_fails_ends_all_with_its_status(environment):
    done = local(environment, "3", RC1="7", RC2="5", WAIT="0 2")
    assert done.returncode == 7
    assert lines_of(done.stdout, 0)[-1] == "saved"
    assert "process 1 ended with status 7" in done.stderr


def test_one_that_does_not_end_is_killed(environment):
    began = time.monotonic()
    done = local(environment, "2", RC0="3", WAIT="1", DEAF="1", GRACE="1")
    assert done.returncode == 3
    assert time.monotonic() - began < 10
    assert "saved" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_all_save(environment, number):
    process = start(environment, WAIT="0 1")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out.count("saved") == 2


def test_a_second_signal_kills(environment):
    process = start(environment, WAIT="0 1", DEAF="0")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


def start(environment, **extra: str) -> subprocess.Popen:
    """Return a local.sh of two processes, once both have begun."""
    pipe = subprocess.PIPE
    words = [str(LOCAL), "2"]
    process = subprocess.Popen(
        words, env=environment | extra, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline()
    return process


@pytest.mark.parametrize("words", [[], ["0"], ["two"], ["-1"], ["1.5"]])
def test_another_number_is_refused(environment, words):
    done = local(environment, *words)
    assert done.returncode == 2
    assert "allowed: a number from 1 on" in done.stderr


def test_without_gpt2_jax_one_line_says_so(environment, tmp_path):
    (tmp_path / "gpt2-jax").unlink()
    bare = environment | {"PATH": "/usr/bin:/bin"}
    done = local(bare, "1")
    assert done.returncode == 2
    assert "gpt2-jax is not on PATH" in done.stderr
