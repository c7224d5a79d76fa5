"""GPT-2 1558M on a TPU v3-256, 512 sequences of 1024 tokens a step.

Machine: v3-256 (128 chips, 256 cores of 16 GiB, 32 hosts). Not run there: libtpu's
compiler estimates 0.86 s a step, 610,000 tokens/s, MFU 40 %, collectives not counted,
and 7.8 GiB per core. `gpt2-jax plan gpt2_1558m_v3_256 --topology v3-256`
"""

from dataclasses import replace

from gpt2_jax.config import MeshConfig, load_config

parent = load_config("gpt2_1558m")

config = replace(
    parent,
    run_dir="runs/gpt2_1558m_v3_256",
    mesh=MeshConfig(data=64, fsdp=4),
    train=replace(parent.train, micro_batch=2),  # all of a core's share at once
    evaluate=replace(parent.evaluate, batches=1, batch_sequences=2),
)
