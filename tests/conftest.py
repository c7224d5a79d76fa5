"""Eight host devices, rank promotion as an error, one compile cache, tiny models."""

import os
import tempfile

from quick import xla_flags

# Most of the suite's time is XLA compiling the same tiny programs: share them, also
# with the processes that tests start.
CACHE = tempfile.TemporaryDirectory(prefix="gpt2_jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8, os.environ.get("XLA_FLAGS", ""))

import jax
import pytest

from gpt2_jax.config import ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def tiny() -> ModelConfig:
    return ModelConfig(
        n_vocab=61,
        n_ctx=16,
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_multiple=8,
        dtype="float32",
    )


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Unmap the programs of a file: a process that fills its 65,530 maps crashes."""
    yield
    jax.clear_caches()
