"""Scripts and YAML of launch/: what a checker says, and the lines that matter."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    """shellcheck where it is installed; else only whether bash can read them."""
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run([*checker, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert script.stat().st_mode & 0o100, f"chmod +x {script.name}"


# A line of YAML may be found at any depth, so its key is part of what is looked for.
LINES = {
    "gke-jobset.yaml": [
        r"kind: JobSet$",
        r"maxRestarts: \d+",
        r"parallelism: 4\b",
        r"completions: 4\b",
        r"cloud.google.com/gke-tpu-topology: 4x4$",
        r"limits: \{google.com/tpu: 4\}",
        r"driver: gcsfuse.csi.storage.gke.io$",
        r'gke-gcsfuse/volumes: "true"$',
        r"--run-dir /bucket/runs/one --data.source /data/webtext$",
    ],
    "skypilot.yaml": [
        r"accelerators: tpu-v5litepod-8$",
        r"runtime_version: v2-alpha-tpuv5-lite$",
        r"use_spot: true$",
        r"source: gs://BUCKET$",
        r"mode: MOUNT$",
        r"--run-dir /bucket/runs/one --data.source /data/webtext$",
    ],
}


@pytest.mark.parametrize("name", LINES)
def test_yaml_says_what_it_must(name):
    text = (LAUNCH / name).read_text()
    assert "\t" not in text
    code = [re.sub(r"(^|\s+)#.*", "", line) for line in text.splitlines()]
    for wanted in LINES[name]:
        assert any(re.search(rf"^\s*(- )?{wanted}", line) for line in code), wanted
