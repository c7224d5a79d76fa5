"""The layout: who imports whom, who owns what is heavy, tests mirror modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpt2_jax"
FLOORS = [
    ["config", "hardware", "hlo", "flash", "digest", "layers"],
    ["topology", "sharding", "lock", "int8"],
    ["tokenizer_files"],
    ["attention", "loss", "optimizer", "spikes", "tokenizer", "metrics"],
    ["hub", "weights", "stopping", "hosts"],
    ["signals", "watchdog"],
    ["model"],
    # Inside a folder the order counts as well: one floor each.
    ["data.shards"],
    ["data.sources"],
    ["data.prepare"],
    ["data.loader"],
    ["data.dataset"],
    ["step", "checkpoint", "decode", "hf"],
    ["beam", "features", "export"],
    ["generation"],
    ["pretrained"],
    ["evaluate.files", "evaluate.detokenize", "evaluate.table"],
    ["evaluate.texts", "evaluate.lambada", "evaluate.cbt", "evaluate.options"],
    ["evaluate.scoring"],
    ["evaluate.columns", "evaluate.harness"],
    ["report", "measure", "card", "feature_files", "bias_sets"],
    ["bias"],
    ["serve.options", "serve.engine"],
    ["serve.protocol"],
    ["serve.completions"],
    ["serve.app"],
    ["train", "convert", "plan", "check", "bench", "serve.server"],
    ["cli"],
    ["start"],
]
OWNERS = {
    "flax": ["model"],
    "orbax": ["checkpoint"],
    "tiktoken": ["tokenizer"],
    "tiktoken_ext": ["tokenizer"],
    "tensorflow_datasets": ["data.sources"],
    "datasets": ["data.sources"],
    "grain": ["data.loader"],
    "optax": ["optimizer", "step"],
    "tyro": ["cli"],
    "matplotlib": ["metrics", "bias"],
    "huggingface_hub": ["hub"],
    "safetensors": ["weights"],
    "pyarrow": ["feature_files"],
    "lm_eval": ["evaluate.harness"],
    "pydantic": ["serve.protocol"],
    "fastapi": ["serve.app"],
    "starlette": ["serve.app"],
    "prometheus_client": ["serve.app"],
    "uvicorn": ["serve.server"],
    "torch": ["weights"],
    "tensorflow": [],
    "transformers": [],
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.stem != "__init__":
            found[name] = path
    return found


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("gpt2_jax.") for name in imports(path)}
    return names & set(modules())


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_floors_below(name):
    assert any(name in names for names in FLOORS), f"{name} stands on no floor"
    above = [other for other in ours(modules()[name]) if floor(other) >= floor(name)]
    assert not above, f"{name} (floor {floor(name)}) imports {above}"


@pytest.mark.parametrize("name", modules())
def test_a_heavy_dependency_has_one_owner(name):
    tops = {imported.partition(".")[0] for imported in imports(modules()[name])}
    foreign = [top for top in tops if name not in OWNERS.get(top, [name])]
    assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", modules())
def test_a_module_has_its_test_file(name):
    *folder, stem = name.split(".")
    if name == "evaluate.harness":  # needs the harness, as the parity tests do
        folder = ["parity"]
    assert ROOT.joinpath("tests", *folder, f"test_{stem}.py").is_file()


def test_the_floors_are_of_modules_that_exist():
    assert {name for names in FLOORS for name in names} == set(modules())


def test_the_map_in_the_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [n for n in modules() if f"{n.split('.')[-1]}.py" not in readme]
    assert not missing
