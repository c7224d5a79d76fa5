"""GPT-2 124M on a TPU v5e-8, 512 sequences of 1024 tokens a step.

Machine: v5litepod-8 (8 chips of 16 GiB). Not run there: libtpu's compiler estimates
0.49 s a step, 1,074,000 tokens/s, MFU 58 %, collectives not counted, and 9.3 GiB per
chip. `gpt2-jax plan gpt2_124m_v5e_8 --topology v5e-8`
"""

from dataclasses import replace

from gpt2_jax.config import load_config

parent = load_config("gpt2_124m")

config = replace(
    parent,
    run_dir="runs/gpt2_124m_v5e_8",
    # Unrolled, blocks keep their activations apart: no copies to a stack.
    model=replace(parent.model, unroll=12),
    train=replace(parent.train, micro_batch=32),
    evaluate=replace(parent.evaluate, batches=8, batch_sequences=8),
)
