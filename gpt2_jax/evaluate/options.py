"""What an evaluation can be asked. The defaults are the paper's protocol, as known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2_jax.config import check, check_name
from gpt2_jax.evaluate.table import UNITS

# Others' arithmetic, for comparison with their figures.
MODES = ["hf_wikitext2", "lm_eval_lambada", "lm_eval_wikitext"]
Detok = Literal["none", "invertible", "megatron"]
Unit = Literal["word+eos", "word", "byte", "char", "token"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Which tasks, on which files, by which protocol. None: as the column's paper."""

    tasks: str = ",".join(UNITS)  # names with commas between
    data_dir: Path = Path("data/zero-shot")
    any_data: bool = False  # run files of another checksum too, marked
    window: int | None = None  # tokens read at once; None: the model's context
    stride: int | None = None  # tokens from window to window; None: 32 (the paper's
    # first author, second hand), for hf_wikitext2 the window
    detok: Detok | None = None  # de-tokenizer of the text columns
    unit: Unit | None = None  # what perplexity and bits are counted in
    start: Literal["none", "eot", "newline"] = "none"  # token before a text
    lambada_text: Literal["paper", "none"] = "paper"  # straight quotes, leading newline
    lambada_target: Literal["word", "last-token"] = "word"
    stop_filter: bool = True  # LAMBADA's accuracy: no stop word as an answer
    cbt_split: Literal["valid", "test"] = "valid"
    cbt_text: Literal["plain", "passage"] = "plain"  # passage: as lm-eval v0.3.0
    ptb_split: Literal["test", "valid"] = "test"
    lm1b_text: Literal["sentences", "stream"] = "sentences"

    def task_names(self) -> list[str]:
        """Return the tasks asked for, in their order.

        Raises
        ------
        ConfigError
            If one is not known: the message names the nearest.
        """
        names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        check(bool(names), "--tasks", self.tasks, ", ".join([*UNITS, *MODES]))
        for name in names:
            check_name(name, [*UNITS, *MODES], "--tasks")
        return names

    def sizes(self, n_ctx: int, stride: int = 32) -> tuple[int, int]:
        """Return window and stride for a model of `n_ctx` positions.

        `stride` is taken where none is stated, or the window if that is shorter.

        Raises
        ------
        ConfigError
            If one is out of range.
        """
        window = n_ctx if self.window is None else self.window
        check(1 <= window <= n_ctx, "--window", window, f"1 to the context of {n_ctx}")
        if self.stride is None:
            return window, min(stride, window)
        allowed = f"1 to the window of {window}"
        check(1 <= self.stride <= window, "--stride", self.stride, allowed)
        return window, self.stride
