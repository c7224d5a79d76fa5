"""The peer of configs/shakespeare.py: nanoGPT's CPU recipe, in torch.

Our own writing of what nanoGPT's README runs on a laptop: `train.py
config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
--lr_decay_iters=2000 --dropout=0.0`: characters, no biases, AdamW, cosine. Prints one
JSON line: whole wall time, and the loss on the full validation split in windows of
64 that do not overlap.

    python benchmarks/nanogpt_cpu.py input.txt
"""

import argparse
import json
import math
import time

BEGIN = time.perf_counter()

import numpy as np  # noqa: E402  the clock starts before the imports
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Block(nn.Module):
    """One pre-norm block without biases."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ln_2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        """Return x after attention and the feed-forward layer."""
        batch, length, _ = x.shape
        heads = (batch, length, HEADS, WIDTH // HEADS)
        qkv = self.qkv(self.ln_1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(heads).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """The model of the recipe, its head tied to the embedding."""

    def __init__(self, n_vocab):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(n_vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * LAYERS) if residual else 1
                nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, tokens, targets):
        """Return the mean loss in nats per character."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        logits = F.linear(self.ln_f(self.blocks(x)), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step):
    """Return the recipe's rate: 100 steps of warm-up, cosine from 1e-3 to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    share = (step - 100) / (STEPS - 100)
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4


def batch(data):
    """Return random windows and the windows one character later."""
    at = torch.randint(len(data) - CONTEXT, (BATCH,)).tolist()
    pairs = [(data[i : i + CONTEXT], data[i + 1 : i + 1 + CONTEXT]) for i in at]
    x, y = zip(*pairs, strict=True)
    return torch.stack(x), torch.stack(y)


@torch.no_grad()
def full_loss(model, data):
    """Return nats per character over every window of the split."""
    whole = (len(data) - 1) // CONTEXT * CONTEXT
    x, y = data[:whole].view(-1, CONTEXT), data[1 : whole + 1].view(-1, CONTEXT)
    parts = [
        model(a, b).item() * a.numel()
        for a, b in zip(x.split(256), y.split(256), strict=True)
    ]
    return sum(parts) / whole


def main():
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    with open(parser.parse_args().file) as lines:
        text = lines.read()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.from_numpy(np.array([ids[c] for c in text]))
    train, held_out = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    torch.manual_seed(1337)
    model = GPT(len(ids))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {
            "params": [p for p in model.parameters() if p.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    tx = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(STEPS):
        if step % 250 == 0:  # as the recipe does: 20 batches of each split
            with torch.no_grad():
                [model(*batch(part)) for part in (train, held_out) for _ in range(20)]
        for group in tx.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(*batch(train))
        tx.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        loss.item()
    val_loss = full_loss(model, held_out)
    seconds = time.perf_counter() - BEGIN
    print(json.dumps({"val_loss": round(val_loss, 4), "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
