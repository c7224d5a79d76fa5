"""The notebook for Colab: it is clean, installs what it needs and runs on a CPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest

from gpt2_jax import model
from gpt2_jax.config import ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
SHAPE = ModelConfig(n_ctx=64, n_embd=32, n_layer=2, n_head=2)
TEXT = "".join(f"{n} green bottles hanging on the wall,\n" for n in range(300))
# In a process of its own: nbclient's event loop and the deprecations of tornado and zmq
# stay out of the tests, where warnings are errors.
EXECUTE = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace"]


def code_cells(path: Path = NOTEBOOK) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_as_jupyter_writes_it():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    written = nbformat.writes(notebook, version=nbformat.NO_CONVERT)
    assert NOTEBOOK.read_text(encoding="utf-8") == written + "\n"


def test_the_notebook_holds_nothing_of_a_run():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in code_cells():
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    metadata = notebook["metadata"]
    assert set(metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert metadata["kernelspec"]["name"] == "python3"


class Colab:
    """The first cell in a Colab whose pip only writes down what it is asked."""

    def __init__(self, monkeypatch):
        self.installed: list[list[str]] = []
        self.gpu = False
        for name in ("TPU_NAME", "TPU_ACCELERATOR_TYPE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GPT2_JAX_SOURCE", "clone")
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
        monkeypatch.setattr(subprocess, "check_call", self.installed.append)
        monkeypatch.setattr(
            subprocess, "getstatusoutput", lambda command: (127 * (not self.gpu), "")
        )

    def run_first_cell(self) -> list[str]:
        """Return what pip is asked to install or upgrade."""
        exec("".join(code_cells()[0]["source"]), {})
        [command] = self.installed
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        assert "--upgrade" in command
        return command[command.index("--upgrade") + 1 :]


@pytest.fixture
def colab(monkeypatch) -> Colab:
    return Colab(monkeypatch)


def test_on_a_cpu_no_extra_is_installed(colab, capsys):
    assert colab.run_first_cell() == ["clone", "jax", "flax"]
    assert "No restart is needed" in capsys.readouterr().out


def test_on_a_gpu_the_cuda_extra_is_installed(colab):
    colab.gpu = True
    assert colab.run_first_cell()[0] == "clone[cuda]"


def test_on_a_tpu_the_tpu_extra_is_installed(colab, monkeypatch):
    monkeypatch.setenv("COLAB_TPU_1VM", "1")
    assert colab.run_first_cell()[0] == "clone[tpu]"


def test_without_a_source_nothing_is_installed(colab, monkeypatch):
    monkeypatch.delenv("GPT2_JAX_SOURCE")
    with pytest.raises(SystemExit, match="say above where the package comes from"):
        colab.run_first_cell()
    assert colab.installed == []


def test_the_package_comes_from_where_the_environment_says(colab, monkeypatch):
    colab.gpu = True
    monkeypatch.setenv("GPT2_JAX_SOURCE", "git+https://host/owner/repository")
    wanted = "gpt2_jax[cuda] @ git+https://host/owner/repository"
    assert colab.run_first_cell()[0] == wanted


@pytest.mark.parametrize("name", ["jax", "flax"])
def test_an_old_version_that_is_loaded_asks_for_a_restart(colab, monkeypatch, name):
    monkeypatch.setattr(f"{name}.__version__", "0.7.2")
    new = importlib.metadata.version(name)
    with pytest.raises(SystemExit, match=f"RESTART: {name} 0.7.2 is loaded, {new} is"):
        colab.run_first_cell()


def test_the_first_cell_loads_no_jax():
    source = "".join(code_cells()[0]["source"])
    check = "assert not {'jax', 'flax', 'gpt2_jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{source}\n{check}"], check=True)


@pytest.fixture
def model_directory(tmp_path) -> Path:
    params = model.init(SHAPE, jax.random.key(0))
    directory = tmp_path / "model"
    GPT2(SHAPE, params, load_tokenizer("gpt2")).save(directory)
    return directory


def test_the_notebook_runs_on_a_cpu(tmp_path, model_directory):
    copy, text = tmp_path / NOTEBOOK.name, tmp_path / "text.txt"
    copy.write_bytes(NOTEBOOK.read_bytes())
    text.write_text(TEXT)
    done = subprocess.run(
        [*EXECUTE, str(copy)],
        env=environment(tmp_path)
        | dict(
            GPT2_JAX_MODEL=str(model_directory),
            GPT2_JAX_TEXT=str(text),
            GPT2_JAX_STEPS="4",
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cells = {cell["id"]: cell for cell in code_cells(copy)}
    assert all(cell["execution_count"] for cell in cells.values())
    drawn = {name for name, cell in cells.items() if shows_png(cell)}
    assert drawn == {"next-token", "attention", "features", "loss"}
    assert "nothing is installed" in printed(cells["install"])
    assert "logits are equal: True" in printed(cells["convert"])
    [exported] = tmp_path.glob("gpt2_jax_*/hf")
    assert (exported / "config.json").is_file()
    assert (exported / "model.safetensors").is_file()


def environment(folder: Path) -> dict[str, str]:
    """Return this process's, with one device, files in `folder`, inline pictures."""
    left_out = ("XLA_FLAGS", "MPLBACKEND")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    where = ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")
    return kept | dict.fromkeys(where, str(folder))


def shows_png(cell: dict) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])
