import dataclasses
import random
import threading
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.decode import Row, Sampling
from gpt2_jax.pretrained import GPT2
from gpt2_jax.serve.engine import ClosedError, Engine, FullError, Writing, likeliest
from gpt2_jax.tokenizer import load_tokenizer

SHAPE = ModelConfig(
    n_vocab=257, n_ctx=160, n_layer=2, n_head=2, n_embd=16, initializer_range=0.4
)
GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def lm() -> GPT2:
    shape = model.resolve(SHAPE)
    return GPT2(shape, model.init(shape, jax.random.key(0)), load_tokenizer("bytes"))


@pytest.fixture
def engine(lm):
    made = Engine(lm.config, lm.unstacked, lanes=4, queue=8)
    with made:
        yield made
        made.stop()
    assert made.error is None


class Text:
    """A writing that remembers what it was told."""

    def __init__(self, prompt, limit, sampling=GREEDY, *, seed=0, number=0, **options):
        self.tokens, self.tops, self.log_probs = [], [], []
        self.ended: Future = Future()
        self.last = -1  # a token that ends it
        row = Row(np.asarray(prompt), limit, seed, number)
        how = dict(take=self.take, end=self.ended.set_result)
        self.writing = Writing(row=row, sampling=sampling, **how, **options)

    def take(self, drawn) -> bool:
        self.tokens.append(drawn.token)
        self.tops.append(drawn.tops)
        self.log_probs.append(drawn.log_prob)
        return drawn.token != self.last

    def wait(self):
        assert self.ended.result(60) is None
        return self.tokens


def alone(lm, text: Text) -> list[int]:
    row, how = text.writing.row, text.writing.sampling
    found = lm.generate(
        row.prompt,
        max_new_tokens=row.limit,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p,
        repetition_penalty=how.repetition_penalty,
        num_return_sequences=row.number + 1,
        seed=row.seed,
        eos=False,
        details=True,
    )
    return found[row.number]["token_ids"].tolist()


SAMPLINGS = [
    GREEDY,
    Sampling(1.0),
    Sampling(0.7, top_k=20),
    Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.02, repetition_penalty=1.3),
    Sampling(0.0, repetition_penalty=1.5),
]


def test_a_text_is_that_of_generate_whoever_else_is_written(lm, engine):
    draw = random.Random(0)
    texts = []
    for i in range(24):
        prompt = [draw.randrange(256) for _ in range(draw.choice([1, 3, 30, 100]))]
        most = draw.choice([1, 5, 20, 50])
        how = SAMPLINGS[i % len(SAMPLINGS)]
        text = Text(prompt, most, how, seed=draw.randrange(5), number=draw.randrange(3))
        texts.append(text)
        while True:
            try:
                engine.submit([text.writing])
                break
            except FullError:
                time.sleep(0.01)
        time.sleep(draw.random() * 0.05)  # some join in the middle of others
    for text in texts:
        assert text.wait() == alone(lm, text)


def test_weights_of_8_bits_write_as_generate_does(lm):
    small = dataclasses.replace(lm, quantize="int8")
    texts = [Text(list(b"Hello"), 12), Text(list(b"GPT"), 30, seed=3)]
    with Engine(small.config, small.unstacked, lanes=2, queue=8) as engine:
        for text in texts:
            engine.submit([text.writing])
        found = [text.wait() for text in texts]
        engine.stop()
    assert found == [alone(small, text) for text in texts]


def test_equal_prompts_of_a_request_are_read_once(lm, engine, monkeypatch):
    from gpt2_jax.serve import engine as module

    reads = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda *how: reads.append(1) or read(*how))
    texts = [Text([1, 2, 3], 6, Sampling(1.0), seed=7, number=j) for j in range(4)]
    engine.submit([text.writing for text in texts])
    found = [text.wait() for text in texts]
    assert len(reads) == 1
    assert found == [alone(lm, text) for text in texts]
    assert len({tuple(tokens) for tokens in found}) == 4


def test_more_texts_than_lanes_wait_and_no_more_than_the_queue(lm, engine):
    hold = threading.Event()
    engine.call(lambda: hold.wait(20))  # nothing moves before all are in
    texts = [Text([i], 4) for i in range(12)]
    engine.submit([text.writing for text in texts[:9]])
    with pytest.raises(FullError):
        engine.submit([Text([1], 4).writing for _ in range(4)])
    engine.submit([text.writing for text in texts[9:]])
    hold.set()
    assert [text.wait() for text in texts] == [alone(lm, text) for text in texts]


def test_a_cancelled_text_frees_its_lane_within_two_steps(lm, engine):
    long = Text([5], 150)
    steps = []
    long.take = None  # replaced below
    gone = Text([6], 150)

    def take(drawn):
        steps.append(drawn.token)
        if len(steps) == 5:
            gone.writing.cancelled = True
        return True

    long.writing.take = take
    ends = []
    gone.writing.end = lambda error: ends.append(len(steps))
    engine.submit([long.writing, gone.writing])
    assert long.ended.result(60) is None
    assert ends and ends[0] - 5 <= 2
    assert len(gone.tokens) <= 7


def test_a_waiting_text_can_be_cancelled(lm, engine):
    hold = threading.Event()
    engine.call(lambda: hold.wait(20))
    text = Text([1], 4)
    engine.submit([text.writing])
    text.writing.cancelled = True
    hold.set()
    assert text.wait() == []
    assert engine.waiting == 0


def test_a_text_ends_where_its_taker_says(lm, engine):
    whole = Text([9, 9], 30)
    engine.submit([whole.writing])
    tokens = whole.wait()
    short = Text([9, 9], 30)
    short.last = tokens[3]
    engine.submit([short.writing])
    assert short.wait() == tokens[: tokens.index(tokens[3]) + 1]


def test_the_likeliest_tokens_stand_beside_each(lm, engine):
    text = Text([3, 1, 4], 8, tops=3)
    engine.submit([text.writing])
    tokens = text.wait()
    for i, tops in enumerate(text.tops):
        logits = np.asarray(lm.logits(np.array([3, 1, 4, *tokens[:i]])))[-1]
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert [token for token, _ in tops] == np.argsort(-expected)[:3].tolist()
        np.testing.assert_allclose(
            [p for _, p in tops], expected[[t for t, _ in tops]], atol=1e-4
        )
        assert tops[0][0] == tokens[i]  # greedy
        assert text.log_probs[i] == pytest.approx(tops[0][1], abs=1e-4)


def test_logit_bias_and_penalties(lm, engine):
    banned = Text([3, 1, 4], 20)
    engine.submit([banned.writing])
    usual = banned.wait()
    common = max(set(usual), key=usual.count)
    without = Text([3, 1, 4], 20, logit_bias={common: -100.0})
    engine.submit([without.writing])
    assert common not in without.wait()
    only = Text([3, 1, 4], 5, logit_bias={42: 100.0})
    engine.submit([only.writing])
    assert only.wait() == [42] * 5
    # 100 - 30 a token: the bias is used up after four times.
    spent = Text([3, 1, 4], 12, logit_bias={42: 100.0}, frequency_penalty=30.0)
    engine.submit([spent.writing])
    count = spent.wait().count(42)
    assert 3 <= count <= 6
    once = Text([3, 1, 4], 12, logit_bias={42: 100.0}, presence_penalty=200.0)
    engine.submit([once.writing])
    assert once.wait().count(42) == 1


def test_other_work_goes_between_steps_and_its_errors_to_who_asked(lm, engine):
    text = Text([1], 100)
    engine.submit([text.writing])
    assert engine.call(lambda: 7).result(60) == 7
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(60)
    assert len(text.wait()) == 100


def test_lanes_and_positions_follow_the_texts(lm, engine):
    small = Text([1], 4)
    engine.submit([small.writing])
    small.wait()
    assert (len(engine._lanes), engine._slots) == (1, 128)
    long = [Text([i], 150) for i in range(3)]
    engine.submit([text.writing for text in long])
    deadline = time.monotonic() + 60
    while engine.live < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (len(engine._lanes), engine._slots) == (4, 160)
    long[0].writing.cancelled = long[2].writing.cancelled = True
    assert long[1].wait() == alone(lm, long[1])  # in another lane than it began
    assert len(engine._lanes) == 1


def test_logits_that_are_not_finite_end_a_text_and_not_the_loop(lm):
    params = jax.tree.map(np.array, lm.params)
    params["wte"]["embedding"][200] = np.nan  # its own row, and every text's logit 200
    params = jax.tree.map(jax.numpy.asarray, params)
    unstacked = model.unstack(lm.config, params)
    with Engine(lm.config, unstacked, lanes=2) as engine:
        text = Text([1], 4)
        engine.submit([text.writing])
        assert isinstance(text.ended.result(60), FloatingPointError)
        assert engine.call(lambda: 1).result(60) == 1
    assert engine.error is None


def test_a_loop_that_dies_tells_everyone(lm, monkeypatch):
    engine = Engine(lm.config, lm.unstacked, lanes=2)

    def fail(*how):
        raise MemoryError("no more")

    monkeypatch.setattr("gpt2_jax.serve.engine._forward", fail)
    with engine:
        texts = [Text([i], 4) for i in range(3)]
        engine.submit([text.writing for text in texts])
        for text in texts:
            assert isinstance(text.ended.result(60), MemoryError)
        with pytest.raises(ClosedError):
            engine.submit([Text([1], 4).writing])
    assert isinstance(engine.error, MemoryError)


def test_closing_finishes_what_was_taken(lm):
    with Engine(lm.config, lm.unstacked, lanes=2) as engine:
        texts = [Text([i], 30) for i in range(5)]
        engine.submit([text.writing for text in texts])
        engine.close()
        with pytest.raises(ClosedError):
            engine.submit([Text([1], 4).writing])
        with pytest.raises(ClosedError):
            engine.call(lambda: 1)
    assert [len(text.wait()) for text in texts] == [30] * 5


@pytest.mark.parametrize(
    "text, said",
    [
        (lambda: Text([], 4), "prompt is '0 tokens'"),
        (lambda: Text([300], 4), "token id is 300"),
        (lambda: Text([1] * 100, 70), "by 10"),
        (lambda: Text([1], 4, Sampling(-1.0)), "temperature is -1.0"),
    ],
)
def test_refuses_what_cannot_be_written(engine, text, said):
    with pytest.raises(ConfigError, match=said):
        engine.submit([text().writing])


def test_likeliest_breaks_ties_by_id():
    assert likeliest(np.log([0.2, 0.4, 0.2, 0.2]), 3) == [
        (1, pytest.approx(np.log(0.4))),
        (0, pytest.approx(np.log(0.2))),
        (2, pytest.approx(np.log(0.2))),
    ]
    assert len(likeliest(np.log([0.5, 0.5]), 9)) == 2
