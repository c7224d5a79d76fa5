import os
import subprocess
import sys

import pytest

from gpt2_jax import start
from gpt2_jax.hardware import HUGE_PAGES


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    known = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "gpt2_jax.start", *arguments]
    how = dict(capture_output=True, text=True, timeout=120)
    return subprocess.run(command, env=known | env, **how)


@pytest.mark.parametrize("arguments", [["generate"], ["train"], ["check", "runs/x"]])
def test_starts_again_once_with_huge_pages(monkeypatch, arguments):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(start.Path, "is_file", lambda _: True)
    monkeypatch.setattr(start.Path, "read_text", lambda _: "always [madvise] never")
    monkeypatch.setattr(sys, "argv", ["gpt2-jax", *arguments])
    started = []
    monkeypatch.setattr(os, "execv", lambda *how: started.append(how))
    start._use_huge_pages()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["GLIBC_TUNABLES"] == HUGE_PAGES
    start._use_huge_pages()  # as the process does that was started
    assert len(started) == 1
    monkeypatch.delenv("GLIBC_TUNABLES")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train", "--help"], ["prepare", "x"]]
)
def test_quick_verbs_do_not_start_again(monkeypatch, arguments):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(start.Path, "is_file", lambda _: True)
    monkeypatch.setattr(start.Path, "read_text", lambda _: "[always] madvise never")
    monkeypatch.setattr(sys, "argv", ["gpt2-jax", *arguments])
    monkeypatch.setattr(os, "execv", lambda *how: pytest.fail("started again"))
    start._use_huge_pages()


def test_huge_pages_have_a_way_out(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(sys, "argv", ["gpt2-jax", "train"])
    monkeypatch.setattr(os, "execv", lambda *how: pytest.fail("started again"))
    start._use_huge_pages()


def test_status_and_words_of_a_process_that_leaves_at_once():
    found = run("generate", "no/such/model", "Hello")
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.startswith("error: MODEL 'no/such/model'")
    assert len(found.stderr.splitlines()) == 1


def test_status_of_other_verbs():
    assert run("trian").returncode == 2
    found = run("--help")
    assert found.returncode == 0 and found.stdout.startswith("usage: gpt2-jax VERB")
