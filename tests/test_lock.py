import os
import subprocess
import sys

import pytest

from gpt2_jax import lock
from gpt2_jax.config import ConfigError

HOLDER = """
import sys, time
from pathlib import Path
from gpt2_jax import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            message = f"is in use by process {holder.pid} on .+; wait until it ends, or"
            with pytest.raises(ConfigError, match=message), lock.hold(tmp_path):
                raise AssertionError
        finally:
            holder.kill()
    with lock.hold(tmp_path):  # a lock dies with its holder
        assert f"process {os.getpid()} on" in (tmp_path / lock.NAME).read_text()
    assert not (tmp_path / lock.NAME).exists()


def test_a_lock_that_was_deleted_before_it_was_held_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder ended."""

    def flock(file, how):
        (tmp_path / lock.NAME).unlink()

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="another process"), lock.hold(tmp_path):
        raise AssertionError
