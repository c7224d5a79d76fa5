"""GPT-2 124M on a TPU v3-8, 512 sequences of 1024 tokens a step.

Machine: v3-8 (4 chips, 8 cores of 16 GiB). Not run there: libtpu's compiler estimates
1.21 s a step, 433,000 tokens/s, MFU 75 %, collectives not counted, and 9.3 GiB per
core. `gpt2-jax plan gpt2_124m_v3_8 --topology v3-8`
"""

from dataclasses import replace

from gpt2_jax.config import load_config

parent = load_config("gpt2_124m")

config = replace(
    parent,
    run_dir="runs/gpt2_124m_v3_8",
    # Unrolled, blocks keep their activations apart: no copies to a stack.
    model=replace(parent.model, unroll=12, attention="flash"),
    train=replace(parent.train, micro_batch=32),
    evaluate=replace(parent.evaluate, batches=8, batch_sequences=8),
)
