"""What docs/serve.md tells a reader to type, typed."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from gpt2_jax import model
from gpt2_jax.pretrained import GPT2
from gpt2_jax.serve.app import Doors
from gpt2_jax.tokenizer import load_tokenizer
from serve.conftest import SHAPE, Served

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
SECTION = DOCS.read_text().partition("## Call it")[2].partition("\n## ")[0]
CURL, PYTHON = re.findall(r"```\w*\n(.*?)```", SECTION, re.DOTALL)[:2]
LINES = CURL.replace("\\\n", "").splitlines()
ANSWERS = {
    '"max_tokens": 20': '"finish_reason":"length"',
    '"stream": true': "data: [DONE]",
    "/v1/inspect": '"attention":',
    "/v1/models": '"id":"gpt2"',
    "/health": '"status":"ok"',
    "/metrics": "# TYPE",
    "/openapi.json": '"/v1/completions"',
}


@pytest.fixture(scope="module")
def url():
    """A small model of six layers, served as gpt2."""
    shape = model.resolve(dataclasses.replace(SHAPE, n_layer=6))
    params = model.init(shape, jax.random.key(0))
    lm = GPT2(shape, params, load_tokenizer("bytes"))
    with Served(lm, doors=Doors(hosts=("127.0.0.1",)), name="gpt2") as served:
        yield served.url


@pytest.mark.parametrize("line", LINES)
def test_every_curl_line_works_as_printed(url, line):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    wanted = [answer for part, answer in ANSWERS.items() if part in line]
    assert len(wanted) == 1
    line = line.replace("http://127.0.0.1:8000", url)
    quiet = line.replace("curl ", f"{curl} --silent --show-error --max-time 60 ", 1)
    done = subprocess.run(quiet, shell=True, capture_output=True, text=True, check=True)
    assert wanted[0] in done.stdout.replace('": ', '":'), done.stdout


def test_the_lines_for_openais_library_work_as_printed(url, capsys):
    exec(PYTHON.replace("http://127.0.0.1:8000", url))
    assert capsys.readouterr().out.strip()
