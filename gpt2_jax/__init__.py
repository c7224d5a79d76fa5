"""One small, exact, fast GPT-2 for JAX."""

from importlib import import_module
from typing import Any

__all__ = ["GPT2", "__version__", "load", "train"]

_HOME = {"GPT2": "pretrained", "load": "pretrained"}


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `gpt2-jax --help` does not load jax."""
    if name == "__version__":
        return import_module("importlib.metadata").version("gpt2_jax")
    if name == "train":  # the module, which can be called
        return import_module("gpt2_jax.train")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"gpt2_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value
