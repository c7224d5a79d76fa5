"""GPT-2 774M on a TPU v3-128, 512 sequences of 1024 tokens a step.

Machine: v3-128 (64 chips, 128 cores of 16 GiB, 16 hosts). Not run there: libtpu's
compiler estimates 0.53 s a step, 992,000 tokens/s, MFU 66 %, collectives not counted,
and 10.5 GiB per core. `gpt2-jax plan gpt2_774m_v3_128 --topology v3-128`
"""

from dataclasses import replace

from gpt2_jax.config import MeshConfig, load_config

parent = load_config("gpt2_774m")

config = replace(
    parent,
    run_dir="runs/gpt2_774m_v3_128",
    mesh=MeshConfig(data=32, fsdp=4),
    model=replace(parent.model, attention="flash", remat="none"),
    train=replace(parent.train, micro_batch=4),  # all of a core's share at once
    evaluate=replace(parent.evaluate, batches=1, batch_sequences=4),
)
