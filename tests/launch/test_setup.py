"""setup.sh in an empty home, with everything that it calls played."""

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "launch/setup.sh"
NOTE = '#!/bin/sh\necho "$(basename "$0") $*" >>"$CALLS"\n'
PLAYED = {
    "uv": "",
    "curl": "echo a key\n",
    "lsb_release": "echo jammy\n",
    "mountpoint": 'test -e "$MOUNTED"\n',
    "gcloud": 'test -z "$NO_BUCKET"\n',
    # Installs gcsfuse, which mounts.
    "sudo": """\
[ "$1" = tee ] && exec cat >/dev/null
case "$*" in *"install gcsfuse")
  printf '%s\\n' '#!/bin/sh' 'echo "gcsfuse $*" >>"$CALLS"; touch "$MOUNTED"' \\
    >"$(dirname "$0")/gcsfuse"
  chmod +x "$(dirname "$0")/gcsfuse"
esac
""",
}
TOOLS = [
    "bash",
    "sh",
    "basename",
    "cat",
    "chmod",
    "dirname",
    "id",
    "mkdir",
    "rm",
    "sha256sum",
    "touch",
]


class Home:
    def __init__(self, where: Path):
        self.calls, self.root = where / "calls", where / "gpt2-jax"
        self.root.mkdir()
        (where / "bin").mkdir()
        for name, text in PLAYED.items():
            (where / "bin" / name).write_text(NOTE + text)
            (where / "bin" / name).chmod(0o755)
        for name in TOOLS:  # alone, so that nothing else of this machine is found
            (where / "bin" / name).symlink_to(str(shutil.which(name)))
        self.package("one")
        places = dict(HOME=where, PATH=where / "bin", MOUNTED=where / "mounted")
        self.environment = {name: str(path) for name, path in places.items()}
        self.environment["CALLS"] = str(self.calls)

    def package(self, text: str) -> None:
        self.root.with_name("gpt2_jax.tar.gz").write_text(text)

    def setup(self, bucket: str = "", data: str = "", **extra: str) -> list[str]:
        """Return what was called."""
        self.calls.write_text("")
        words = ["bash", str(SETUP), "../gpt2_jax.tar.gz", bucket, data]
        environment = self.environment | extra
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        self.status = done.returncode
        return self.calls.read_text().splitlines()


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path)


def test_a_new_worker_gets_all_of_it_and_an_old_one_what_is_missing(home):
    first = home.setup("bucket", "gs://bucket/data/webtext/")
    assert home.status == 0
    assert first[:2] == [
        "uv venv --clear --python 3.12 venv",
        "uv pip install --python venv/bin/python ./source[tpu,offline]",
    ]
    assert any(call.endswith("install gcsfuse") for call in first)
    [mount] = [call for call in first if call.startswith("gcsfuse ")]
    assert mount.endswith(" bucket /mnt/gcs/bucket")
    assert "--metadata-cache-ttl-secs=0" in mount
    copy = "gcloud storage rsync --recursive gs://bucket/data/webtext/ data/webtext"
    assert first[-1] == copy
    assert (home.root / "ready").exists()
    again = home.setup("bucket", "gs://bucket/data/webtext/")
    assert again == ["mountpoint -q /mnt/gcs/bucket", copy]


def test_another_package_is_installed(home):
    home.setup()
    assert home.setup() == []
    home.package("two")
    assert len(home.setup()) == 2


def test_a_worker_whose_setup_fails_is_not_ready(home):
    home.setup()
    home.setup("", "gs://bucket/data/webtext", NO_BUCKET="yes")
    assert home.status != 0
    assert not (home.root / "ready").exists()
