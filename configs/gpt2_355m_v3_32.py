"""GPT-2 355M on a TPU v3-32, 512 sequences of 1024 tokens a step.

Machine: v3-32 (16 chips, 32 cores of 16 GiB, 4 hosts). Not run there: libtpu's compiler
estimates 1.65 s a step, 317,000 tokens/s, MFU 39 %, collectives not counted, and 9.5
GiB per core. `gpt2-jax plan gpt2_355m_v3_32 --topology v3-32`
"""

from dataclasses import replace

from gpt2_jax.config import load_config

parent = load_config("gpt2_355m")

config = replace(
    parent,
    run_dir="runs/gpt2_355m_v3_32",
    train=replace(parent.train, micro_batch=16),  # all of a core's share at once
    evaluate=replace(parent.evaluate, batches=2, batch_sequences=8),
)
