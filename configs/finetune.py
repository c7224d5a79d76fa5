"""GPT-2 124M fine-tuned on Tiny Shakespeare, from OpenAI's weights.

`gpt2-jax train finetune --data.source input.txt`; another model: `--train.init-from
gpt2-xl`, a directory in Hugging Face layout, or a run directory. Shape and tokenizer
are the model's. 200 steps read its 302,000 training tokens 1.4 times.
"""

from gpt2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

config = Config(
    run_dir="runs/finetune",
    data=DataConfig(source=("input.txt",), val_fraction=0.1),
    model=ModelConfig(n_ctx=256, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1),
    optimizer=OptimizerConfig(
        learning_rate=3e-5,  # nanoGPT config/finetune_shakespeare.py
        schedule="wsd",
        warmup_steps=10,
        decay_fraction=0.9,
        final_fraction=0.0,
    ),
    train=TrainConfig(init_from="gpt2", steps=200, batch_tokens=8 * 256),
    evaluate=EvaluateConfig(
        interval=50, batches=8, batch_sequences=8, sample_tokens=200, prompt="\n"
    ),
    checkpoint=CheckpointConfig(interval=50),
    log=LogConfig(interval=5),
)
