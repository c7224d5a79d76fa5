"""The zero-shot table against transformers: own windows, sums, masks and units.

Of `gpt2_jax.evaluate` this uses what is under test, the list of stop words and, for
real WikiText, the invertible de-tokenizer. Real files: GPT2_JAX_DATA or ../shared/data.
"""

import functools
import json
import math
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

import gpt2_jax
from gpt2_jax.evaluate import columns, scoring, texts
from gpt2_jax.evaluate.detokenize import WIKITEXT, invertible
from gpt2_jax.evaluate.lambada import STOP_WORDS
from gpt2_jax.evaluate.options import EvaluateOptions
from gpt2_jax.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # other people's

RTOL = 1e-4  # the promise; both sides compute in float32
DECIDED = 1e-4  # logits that are closer may swap; so may whole texts within 1e-2
V, CTX, EOT = 50_257, 128, 50_256
REAL = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))

# Files as their tokenizers left them, and as people write; by Megatron, where told.
WIKI = """ \n = Winter wren = \n \n The wren , a well @-@ known bird , weighs 9 @.@ \
5 g ( 0 @.@ 3 oz ) ; in 1950 <unk> wrote : " It 's small . " \n Bird watchers ' lists \
name 1 @,@ 200 in N counties ! \n \n = = Song = = \n \n It sings in spring , and at \
3 : 30 too . \n \n = Great tit = \n \n It flew from Köln to Łódź for seeds [ and \
nuts ] . \n Nobody knows why . \n"""
WIKI_PLAIN = """\n= Winter wren =\n\nThe wren, a well-known bird, weighs 9.5 g (0.3 \
oz); in 1950 <unk> wrote: "It's small."\nBird watchers' lists name 1,200 in N counties\
!\n\n== Song ==\n\nIt sings in spring, and at 3:30 too.\n\n= Great tit =\n\nIt flew \
from Köln to Łódź for seeds [and nuts].\nNobody knows why.\n"""
PTB = """ traders ' <unk> rose $ N to N \\/ N on monday \n mr. <unk> said it was n't \
clear that they 'd sell # N million of <unk> 's shares \n"""
PTB_PLAIN = """traders' <unk> rose $N to N/N on monday\nmr. <unk> said it wasn't \
clear that they'd sell #N million of <unk>'s shares\n"""
PTB_MEGATRON = """ traders' <unk> rose $1 to1 \\/1 on monday\nmr. <unk> said it wasn't \
clear that they'd sell #1 million of <unk>'s shares\n"""
LM1B = """" It 's $ 5 ( or 1,000 ) -- no , " said Mr. Smith .\nYes\nThe court didn 't \
rule on the states ' appeal , it said : it was 30 % late .\n"""
LM1B_PLAIN = """"It's $5 (or 1,000) -- no," said Mr. Smith.\nYes\nThe court didn't \
rule on the states' appeal, it said: it was 30% late.\n"""
ENWIK8 = """    <title>Café</title>\n    <text id="1">&lt;b&gt;A ==café==&lt;/b&gt; \
&amp;mdash; in [[Zürich]]\n|&lt;ref&gt;R&amp;amp;D &quot;of it&quot;&lt;/ref&gt;</text>\
\n"""
ENWIK8_PLAIN = """    <title>Café</title>\n    <text id="1"><b>A ==café==</b> \
&mdash; in [[Zürich]]\n|<ref>R&amp;D "of it"</ref></text>\n"""
TEXT8 = " anarchism originated as a term of abuse first used against early workers"
LAMBADA = [
    "He took the ring.\n\n“Who wants it?” he asked, and showed them the ring",
    "“Not you, Figaro,” said the queen. “I want to speak to Figaro",
    '"I was born in Vancouver," she said, "and I\'ll die in Vancouver',
    "She did not like him, and he did not like her",
    "We went to see the werewolves, but there were no werewolves  ",
    "They ran to the door, but there was no time to open the\n\ndoor",
    "“It is mine,” he said, “and you can't have what is\nmine",
    "Nobody knows",
    "In the wood, " + "the owl said nothing and the fox ran on, " * 14 + "said the owl",
]


def megatron(text: str) -> str:
    """Write WikiText as Megatron-LM v2.5 and lm-eval do."""
    rules = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", ".")]
    rules += [(f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"]
    for pair in (r"\(\)", r"\[\]", "{}", '""', "''"):
        left, right = pair[: len(pair) // 2], pair[len(pair) // 2 :]
        inside = rf"{left}\s*([^{right}]*?)\s*{right}"
        rules.append((inside, rf"{left[-1]}\1{right[-1]}"))
    rules += [(" ".join("=" * n), "=" * n) for n in (4, 3, 2)]
    rules += [(" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


def lines_of(text):
    return text.removesuffix("\n").split("\n")


WIKI103, PTB_VALID = WIKI.replace("wren", "Zaunkönig"), PTB.upper()
# By column: the file, its text, and the documents that each de-tokenizer makes of it.
TEXTS = {
    "wikitext2": ("wikitext2_tokens/wiki.test.tokens", WIKI, dict(
        none=[WIKI], invertible=[WIKI_PLAIN], megatron=[megatron(WIKI)])),
    "wikitext103": ("wikitext103_tokens/wiki.test.tokens", WIKI103, dict(
        none=[WIKI103], megatron=[megatron(WIKI103)])),
    "ptb": ("ptb.test.txt", PTB, dict(
        none=[PTB], invertible=[PTB_PLAIN], megatron=[PTB_MEGATRON])),
    "ptb valid": ("ptb/ptb.valid.txt", PTB_VALID, dict(none=[PTB_VALID])),
    "enwik8": ("enwik8", ENWIK8, dict(none=[ENWIK8], invertible=[ENWIK8_PLAIN])),
    "text8": ("text8", TEXT8, dict(none=[TEXT8])),
    "lm1b": ("news.en.heldout-00000-of-00050", LM1B, dict(
        none=lines_of(LM1B), invertible=lines_of(LM1B_PLAIN))),
    "lm1b stream": ("news.en.heldout-00000-of-00050", LM1B, dict(
        none=[LM1B], invertible=[LM1B_PLAIN])),
}  # fmt: skip
KINDS = ["ptb_split", "lm1b_text"]
DEFAULT = dict(wikitext2="invertible", ptb="invertible", lm1b="invertible")


class Pair(NamedTuple):
    lm: gpt2_jax.GPT2
    network: GPT2LMHeadModel  # of what we export
    tokenizer: GPT2Tokenizer  # so is this
    encode: Any  # the tokenizer's
    trained: bool


@pytest.fixture(scope="module", params=["random", "trained"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)  # quicker, where others compute beside it
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_embd=64, n_positions=CTX)
    std = 0.3 if request.param == "random" else 0.1
    network = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=std)).eval()
    if request.param == "trained":
        encode = load_tokenizer("gpt2").encode
        items = LAMBADA + real_lambada(40)
        train(network, [encode(text.strip()).tolist()[-CTX:] for text in items])
    network.save_pretrained(folder / "theirs")
    lm = gpt2_jax.load(folder / "theirs", dtype="float32")
    lm.save(folder / "ours")
    tokenizer = GPT2Tokenizer.from_pretrained(folder / "ours")
    network = GPT2LMHeadModel.from_pretrained(folder / "ours", dtype=torch.float32)
    trained = request.param == "trained"
    return Pair(lm, network.eval(), tokenizer, tokenizer.encode, trained)


def train(network, rows):
    """Show a few dozen times how the rows end."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    ends = [(i, len(row) - n) for i, row in enumerate(rows) for n in (1, 2, 3)]
    row, at = (torch.tensor(x) for x in zip(*ends, strict=True))
    adam = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(36):
        hidden = network.transformer(ids).last_hidden_state[row, at - 1]
        logits = network.lm_head(hidden)
        torch.nn.functional.cross_entropy(logits, ids[row, at]).backward()
        adam.step()
        adam.zero_grad()


def real_lambada(count):
    path = REAL / "lambada/lambada_test.jsonl"
    lines = path.read_text().split("\n")[:count] if path.exists() else []
    return [json.loads(line)["text"] for line in lines]


def real_text(name, n_lines):
    if not (REAL / name).exists():
        pytest.skip(f"no {name} in GPT2_JAX_DATA")
    with (REAL / name).open(encoding="utf-8", newline="\n") as file:
        return "".join(next(file) for _ in range(n_lines))


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def as_jsonl(items):
    return "".join(f"{json.dumps({'text': text})}\n" for text in items)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    files = {name: text for name, text, _ in TEXTS.values()}
    files |= {"wiki.test.raw": WIKI, "lambada_test.jsonl": as_jsonl(LAMBADA)}
    return write(tmp_path_factory.mktemp("data"), files)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    how = dict(tokens_at_once=8 * CTX, devices=jax.devices()[:1])
    monkeypatch.setattr(columns, "score", functools.partial(scoring.score, **how))


def ours(lm, data, task, **how):
    options = EvaluateOptions(tasks=task, data_dir=data, any_data=True, **how)
    found = columns.evaluate(lm, options)
    assert all(row.value is not None for row in found), found
    return found[0] if len(found) == 1 else found


def logits_of(network, row, first):
    """Return the logits that predict row[first:], each from all before it."""
    with torch.no_grad():
        ids = torch.tensor([row[:-1]])
        return network(ids, logits_to_keep=len(row) - first).logits[0]


def nll_from(logits, targets):
    at = logits[torch.arange(len(logits)), torch.tensor(targets)]
    return math.fsum((torch.logsumexp(logits, -1).double() - at.double()).tolist())


def nll_of(network, row, first):
    return nll_from(logits_of(network, row, first), row[first:])


def sliding_nll(network, tokens, window, stride):
    """Return the nll of all tokens but the first.

    The first window scores all that it predicts, a later one its last `stride`.
    """
    ends = defaultdict(list)  # what the window that ends there scores
    for target in range(1, len(tokens)):
        steps = math.ceil(max(0, target - window) / stride)
        ends[min(window + steps * stride, len(tokens) - 1)].append(target)
    return math.fsum(
        nll_of(network, tokens[(begin := max(0, end - window)) : end + 1], n[0] - begin)
        for end, n in ends.items()
    )


def check_text(pair, data, task, raw, documents, **how):
    """Compare a text column; each document is scored by itself."""
    starts = dict(none=[], eot=[EOT], newline=pair.encode("\n"))
    start = starts[how.get("start", "none")]
    rows = [start + pair.encode(text) for text in documents]
    sizes = how.get("window", CTX), how.get("stride", 32)
    nll = math.fsum(sliding_nll(pair.network, row, *sizes) for row in rows)
    tokens = sum(len(row) - 1 for row in rows)
    words = len(re.findall(r"\S+", raw))
    units = {"word": words, "word+eos": words + raw.count("\n"), "token": tokens}
    units |= {"byte": len(raw.encode()), "char": len(raw)}
    default = dict(enwik8="byte", text8="char").get(task, "word+eos")
    per_unit = nll / units[how.get("unit", default)]
    in_bits = task in ("enwik8", "text8")
    found = ours(pair.lm, data, task, **how)
    assert found.tokens == tokens
    wanted = per_unit / math.log(2) if in_bits else math.exp(per_unit)
    assert found.value == pytest.approx(wanted, rel=RTOL)


@pytest.mark.parametrize(
    "task, how",
    [
        ("wikitext2", {}),
        ("wikitext2", dict(detok="none", unit="token", start="eot")),
        ("wikitext2", dict(detok="megatron", unit="word")),
        ("wikitext2", dict(unit="byte", start="newline", stride=CTX)),
        ("wikitext2", dict(unit="char", window=50, stride=50)),
        ("wikitext2", dict(window=40, stride=7, start="eot")),
        ("wikitext2", dict(window=60, stride=1, unit="token")),
        ("wikitext103", {}),
        ("wikitext103", dict(detok="megatron", stride=CTX - 1)),
        ("ptb", {}),
        ("ptb", dict(detok="none", window=32, stride=16)),
        ("ptb", dict(detok="megatron", unit="char")),
        ("ptb", dict(detok="none", ptb_split="valid")),
        ("enwik8", {}),
        ("enwik8", dict(detok="invertible", start="newline", window=30, stride=10)),
        ("text8", dict(window=16, stride=8)),
        ("text8", dict(unit="word", start="eot")),
        ("lm1b", {}),
        ("lm1b", dict(detok="none", start="eot", unit="word")),
        ("lm1b", dict(lm1b_text="stream", window=24, stride=12)),
    ],
)
def test_a_text_has_the_same_number(pair, data, task, how):
    kind = " ".join([task, *(v for k, v in how.items() if k in KINDS)])
    _, raw, documents = TEXTS[kind]
    documents = documents[how.get("detok", DEFAULT.get(task, "none"))]
    check_text(pair, data, task, raw, documents, **how)


@pytest.mark.parametrize("task", ["wikitext2", "wikitext103"])
def test_real_wikitext_has_the_same_number(pair, tmp_path, task):
    name = TEXTS[task][0]
    raw = real_text(name, 16)
    files = write(tmp_path, {name: raw})
    check_text(pair, files, task, raw, [raw], detok="none")
    check_text(pair, files, task, raw, [megatron(raw)], detok="megatron", stride=CTX)
    plain = "".join(f"{invertible(line, WIKITEXT)}\n" for line in lines_of(raw))
    check_text(pair, files, task, raw, [plain], detok="invertible", stride=96)


def test_enwik8_and_text8_are_their_last_part(pair, tmp_path, monkeypatch):
    """The cuts halve two characters: their bytes are tokens by themselves."""
    raw = ENWIK8.encode()
    begin, end = raw.index("é".encode()) + 1, raw.index("ü".encode()) + 1
    (tmp_path / "enwik8").write_bytes(raw[:end])
    monkeypatch.setattr(texts, "TEST_SIZE", end - begin)
    vocab = pair.tokenizer.get_vocab()  # where these bytes go by their own names
    middle = pair.encode(raw[begin + 1 : end - 1].decode())
    nll = sliding_nll(pair.network, [vocab["\xa9"], *middle, vocab["\xc3"]], CTX, 32)
    wanted = nll / math.log(2) / (end - begin)
    assert ours(pair.lm, tmp_path, "enwik8").value == pytest.approx(wanted, rel=RTOL)
    monkeypatch.setattr(texts, "TEST_SIZE", 40)
    write(tmp_path, {"text8": TEXT8})
    check_text(pair, tmp_path, "text8", TEXT8[-40:], [TEXT8[-40:]])


@pytest.mark.parametrize("stride", [CTX, CTX // 2, 24])
def test_hf_wikitext2_is_the_perplexity_pages_loop(pair, data, stride):
    """huggingface.co/docs/transformers/perplexity, with its labels of -100."""
    rows = ["" if not line.strip() else f"{line}\n" for line in lines_of(WIKI)]
    ids = torch.tensor([pair.encode("\n\n".join(rows))])
    size, means, previous = ids.shape[1], [], 0
    for begin in range(0, size, stride):
        end = min(begin + CTX, size)
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : previous - end] = -100
        with torch.no_grad():
            means.append(pair.network(part, labels=labels).loss)
        previous = end
        if end == size:
            break
    assert len(means) > 1
    wanted = torch.exp(torch.stack(means).mean()).item()
    found = ours(pair.lm, data, "hf_wikitext2", stride=stride)
    assert found.value == pytest.approx(wanted, rel=RTOL)


@pytest.mark.parametrize("real", [False, True])
def test_lm_eval_wikitext_is_its_arithmetic(pair, tmp_path, real):
    """Rolling windows, the last one filled up with what stands before it."""
    raw = real_text("wikitext2_raw/wiki.test.raw", 30) if real else WIKI
    total = words = n_bytes = 0
    for page in pages_of(raw):
        tokens = pair.encode(megatron(page))
        for at in range(0, len(tokens), CTX):
            part = tokens[at : at + CTX]
            before = [EOT, *tokens][: at + 1][-(CTX + 1 - len(part)) :]
            total += nll_of(pair.network, before + part, len(before))
        words += len(re.split(r"\s+", page))
        n_bytes += len(page.encode())
    found = ours(pair.lm, write(tmp_path, {"wiki.test.raw": raw}), "lm_eval_wikitext")
    assert found.value == pytest.approx(math.exp(total / words), rel=RTOL)
    bits = total / n_bytes / math.log(2)
    notes = dict(part.split() for part in found.note.split("; ")[0].split(", "))
    assert float(notes["bits_per_byte"]) == pytest.approx(bits, rel=RTOL)
    assert float(notes["byte_perplexity"]) == pytest.approx(2**bits, rel=RTOL)


def pages_of(raw):
    """Cut before each title with one sign, as the builder of the data set does."""
    starts = [m.start() for m in re.finditer(r"(?m)^ = [^=].*[^=] = $", raw)]
    assert not raw[: starts[0]].strip()  # else it would be a page
    ends = [*(start - 1 for start in starts[1:]), len(raw)]
    return [raw[begin:end] for begin, end in zip(starts, ends, strict=True)]


def judge(pair, before, after, banned=()):
    """Return a target's nll, if greedy decoding writes it, and if its last token."""
    row = [*before, *after][-(CTX + 1) :]
    logits = logits_of(pair.network, row, len(row) - len(after))
    nll = nll_from(logits, after)
    logits[0, list(banned)] = -math.inf
    hits = []
    for scores, target in zip(logits, after, strict=True):
        others = scores.clone()
        others[target] = -math.inf
        assert abs(scores[target] - others.max()) > DECIDED
        hits.append(scores.argmax().item() == target)
    return nll, all(hits), hits[-1]


@functools.cache
def stop_tokens(tokenizer):
    """Return what is no first piece: stop words, no letter or digit, special."""
    words = [tokenizer.decode([i]).strip().casefold() for i in range(V)]
    allowed = [word not in STOP_WORDS and any(map(str.isalnum, word)) for word in words]
    return [i for i in range(V) if i == EOT or not allowed[i]]


def last_word(text, how):
    """Return what stands before the last word, and the blank and the word."""
    if how == "paper":
        text = "\n" + re.sub("[“”]", '"', text).strip()
    before, word = re.fullmatch(r"(?s)(.*?)\s+(\S+)\s*", text).groups()
    return before, f" {word}"


@pytest.mark.parametrize("text", ["paper", "none"])
@pytest.mark.parametrize("real", [False, True])
def test_lambada_has_the_same_numbers(pair, tmp_path, real, text):
    items = real_lambada(100) if real else LAMBADA
    if not items:
        pytest.skip("no lambada/lambada_test.jsonl in GPT2_JAX_DATA")
    write(tmp_path, {"lambada_test.jsonl": as_jsonl(items)})
    parts = [[pair.encode(part) for part in last_word(item, text)] for item in items]
    for stop_filter in (False, True):
        banned = stop_tokens(pair.tokenizer) if stop_filter else ()
        found = zip(*(judge(pair, *part, banned) for part in parts), strict=True)
        nll, greedy, last = (math.fsum(x) / len(items) for x in found)
        how = dict(lambada_text=text, stop_filter=stop_filter)
        for target, share in (("word", greedy), ("last-token", last)):
            tasks = "lambada_ppl,lambada_acc"
            ppl, acc = ours(pair.lm, tmp_path, tasks, lambada_target=target, **how)
            assert acc.value == pytest.approx(100 * share, abs=1e-9)
            assert share > 0 or not pair.trained
            assert ppl.value == pytest.approx(math.exp(nll), rel=RTOL)


def test_lm_eval_lambada_is_its_arithmetic(pair, tmp_path):
    """Context and continuation are tokenized together; blanks go to the latter."""
    items, answers = LAMBADA + real_lambada(60), []
    for item in items:
        *before, word = item.split(" ")
        context = " ".join(before)
        whole, start = pair.encode(f"{context} {word}"), pair.encode(context.rstrip())
        answers.append(judge(pair, start, whole[len(start) :]))
    nll, greedy, _ = (math.fsum(x) / len(items) for x in zip(*answers, strict=True))
    write(tmp_path, {"lambada_test.jsonl": as_jsonl(items)})
    found = ours(pair.lm, tmp_path, "lm_eval_lambada")
    assert found.value == pytest.approx(math.exp(nll), rel=RTOL)
    assert found.note.split("; ")[0] == f"acc {greedy:.4f}"


# Lines as the Penn Treebank's tokenizer cuts them, and as people write them.
SENTENCES = [
    ("`` Look , '' said {} .", '"Look," said {}.'),
    ("{} did n't see it .", "{} didn't see it."),
    ("They ran .", "They ran."),
    ("It was {} 's hat !", "It was {}'s hat!"),
]
QUERIES = [
    ("`` Where is XXXXX ? '' said {} .", '"Where is XXXXX?" said {}.'),
    ("XXXXX was here -LRB- and gone -RRB- .", "XXXXX was here (and gone)."),
    ("He took {} 's XXXXX , and ran .", "He took {}'s XXXXX, and ran."),
    ("`` XXXXX ! '' they said , `` our XXXXX", '"XXXXX!" they said, "our XXXXX'),
]
WORDS = dict(
    cbt_cn="owl hat werewolf time door-step nuts tree café fox king",
    cbt_ne="Tom Alice Mr. Figaro Ozma Dorothy Krähe Bob-Cat Queen Zeb",
)


def make_story(task, n):
    """Return 20 sentences and a query, cut and plain, and ten options."""
    draw = random.Random(n)
    lines = [draw.choice(SENTENCES) for _ in range(20)] + [QUERIES[n % 4]]
    names = [draw.choice(["Ann", "Peter", "the fox"]) for _ in lines]
    cut = [line[0].format(name) for line, name in zip(lines, names, strict=True)]
    plain = [line[1].format(name) for line, name in zip(lines, names, strict=True)]
    return cut, plain, draw.sample(WORDS[task].split(), 10)


def as_item(cut, options, answer):
    """Return an item as it stands in a file of CBTest."""
    lines = [f"{n} {line}" for n, line in enumerate(cut, 1)]
    return "\n".join(lines) + f"\t{answer}\t\t{'|'.join(options)}\n\n"


def as_passage(cut):
    """Write an item as lm-eval v0.3.0 does (tasks/cbt.py)."""
    text = f"Passage: {' '.join(cut[:20])}\nQuestion: {cut[20]}"
    olds = [" '", " \n", "\n ", " n't", "`` ", "''", *(f" {c}" for c in ":;!?,.")]
    news = ["'", "\n", "\n", "n't", '"', '"', *":;!?,."]
    for old, new in zip(olds, news, strict=True):
        text = text.replace(old, new)
    return text


def rank(pair, text, options, start):
    """Return the options, likeliest whole text first; all lose alike at the left."""
    rows = [start + pair.encode(text.replace("XXXXX", option)) for option in options]
    over = max(0, max(map(len, rows)) - (CTX + 1))
    nlls = [nll_of(pair.network, row[over:], 1) for row in rows]
    ranked = sorted(zip(nlls, options, strict=True))
    assert ranked[1][0] - ranked[0][0] > 100 * DECIDED
    return [option for _, option in ranked]


def check_cbt(pair, folder, task, start=(), **how):
    """Three answers of five are the likeliest, two the runner-up: 60 %."""
    file = ""
    for n in range(5):
        cut, plain, options = make_story(task, n)
        text = " ".join(cut if "detok" in how else plain)
        text = as_passage(cut) if "cbt_text" in how else text
        file += as_item(cut, options, rank(pair, text, options, [*start])[n % 2])
    split = "test_2500ex" if "cbt_split" in how else "valid_2000ex"
    write(folder, {f"cbtest_{task[-2:].upper()}_{split}.txt": file})
    assert ours(pair.lm, folder, task, **how).value == pytest.approx(60)


def test_cbt_chooses_the_likeliest_whole_text(pair, tmp_path):
    check_cbt(pair, tmp_path, "cbt_cn")
    check_cbt(pair, tmp_path, "cbt_ne", detok="none", cbt_split="test")


@pytest.mark.parametrize("pair", ["random"], indirect=True)
def test_cbts_passage_is_as_lm_evals(pair, tmp_path):
    """Its loglikelihood of a text without context starts with end of text."""
    check_cbt(pair, tmp_path, "cbt_ne", start=[EOT], cbt_text="passage")


@pytest.mark.parametrize("pair", ["random"], indirect=True)
def test_a_model_of_zeros_finds_all_tokens_alike(pair, data, tmp_path):
    """It gives log V a token, so that the numbers follow from counts."""
    params = jax.tree.map(jnp.zeros_like, pair.lm.params)
    zero = gpt2_jax.GPT2(pair.lm.config, params, pair.lm.tokenizer)
    near = functools.partial(pytest.approx, rel=1e-5)

    def value(task, **how):
        return ours(zero, data, task, stride=CTX, detok="none", **how).value

    for task in ("wikitext2", "wikitext103", "ptb", "lm1b", "enwik8", "text8"):
        _, raw, documents = TEXTS[task]
        tokens = sum(len(pair.encode(text)) for text in documents["none"])
        words, ends = len(raw.split()), raw.count("\n")
        if task in ("enwik8", "text8"):
            size = len(raw.encode())
            assert value(task, start="eot") == near(math.log2(V) * tokens / size)
            continue
        assert value(task, unit="token") == near(V)
        assert value(task, start="eot") == near(V ** (tokens / (words + ends)))
        assert value(task, unit="word", start="newline") == near(V ** (tokens / words))
    assert value("hf_wikitext2") == near(V)
    pieces = sum(len(pair.encode(last_word(item, "none")[1])) for item in LAMBADA)
    wanted = V ** (pieces / len(LAMBADA))
    assert value("lambada_ppl", lambada_text="none") == near(wanted)
    pages = pages_of(WIKI)
    tokens = sum(len(pair.encode(megatron(page))) for page in pages)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert value("lm_eval_wikitext") == near(V ** (tokens / words))
    # The likeliest option is that of the fewest tokens.
    cut, options = make_story("cbt_cn", 1)[0], ["werewolf", "hat", "Zaunkönig"]
    file = "".join(as_item(cut, options, answer) for answer in options)
    write(tmp_path, {"cbtest_CN_valid_2000ex.txt": file})
    assert ours(zero, tmp_path, "cbt_cn").value == near(100 / 3)
