"""GPT-2 1558M on a TPU v3-256, 512 sequences of 1024 tokens a step.

Machine: v3-256 (128 chips, 256 cores of 16 GiB, 32 hosts). Not run there: libtpu's
compiler estimates 0.52 s a step, 1,005,000 tokens/s, MFU 66 %, collectives not counted,
and 10.3 GiB per core. `gpt2-jax plan gpt2_1558m_v3_256 --topology v3-256`
"""

from dataclasses import replace

from gpt2_jax.config import MeshConfig, load_config

parent = load_config("gpt2_1558m")

config = replace(
    parent,
    run_dir="runs/gpt2_1558m_v3_256",
    mesh=MeshConfig(data=32, fsdp=8),
    model=replace(parent.model, attention="flash", remat="none"),
    train=replace(parent.train, micro_batch=2),  # all of a core's share at once
    evaluate=replace(parent.evaluate, batches=1, batch_sequences=2),
)
