"""GPT-2 124M on a TPU v5p-8, 512 sequences of 1024 tokens a step.

Machine: v5p-8 (4 chips of 95 GiB). Not run there: libtpu's compiler estimates 0.40 s a
step, 1,307,000 tokens/s, MFU 61 %, collectives not counted, and 9.3 GiB per chip.
`gpt2-jax plan gpt2_124m_v5p_8 --topology v5p-8`
"""

from dataclasses import replace

from gpt2_jax.config import load_config

parent = load_config("gpt2_124m")

config = replace(
    parent,
    run_dir="runs/gpt2_124m_v5p_8",
    # Unrolled, blocks keep their activations apart: no copies to a stack.
    model=replace(parent.model, unroll=12),
    train=replace(parent.train, micro_batch=32),
    evaluate=replace(parent.evaluate, batches=16, batch_sequences=8),
)
