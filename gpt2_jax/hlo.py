"""What a compiled program costs, read from its HLO text: cycles and collectives.

`cost_analysis` counts the body of a loop once. Here every computation counts as often
as it runs: bodies of `while` loops times their trip counts.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
)
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """All collectives of one kind."""

    times: int  # how often in one run
    bytes: int  # of one device's part: the operand, or the result of an all-gather


class Cost(NamedTuple):
    """What one device does when the program runs once."""

    cycles: int  # sum of the compiler's `estimated_cycles`, where an op has them
    collectives: dict[str, Collective]  # by kind; a start and its done count once
    kernel_cycles: int = 0  # of the cycles, those of custom calls

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """Return this cost and `times` the other."""
        sums = dict(self.collectives)
        for kind, more in other.collectives.items():
            old = sums.get(kind, Collective(0, 0))
            often, size = old.times + times * more.times, old.bytes + times * more.bytes
            sums[kind] = Collective(often, size)
        kernels = self.kernel_cycles + times * other.kernel_cycles
        return Cost(self.cycles + times * other.cycles, sums, kernels)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str  # all that follows the type
    is_root: bool  # its value is the computation's


def program_cost(text: str, kernels: Mapping[str, int] | None = None) -> Cost:
    """Return the cost of one run of the program whose compiled text this is.

    `kernels` has the cycles of custom calls, by a part of their names.

    Raises
    ------
    ValueError
        If a loop does not show how often it runs.
    """
    computations, entry = parse_program(text)

    @functools.cache
    def cost(name: str) -> Cost:
        total = Cost(0, {})
        for instruction in computations.get(name, {}).values():
            total = total.plus(
                _own_cost(name, instruction, computations, kernels or {})
            )
            times = 1
            if instruction.opcode == "while":
                times = _trip_count(instruction, computations[name], computations)
            if not instruction.opcode.endswith(("-done", "-update")):
                for called in _called(instruction):
                    total = total.plus(cost(called), times)
        return total

    return cost(entry)


def parse_program(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return computation -> instruction name -> instruction, and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (found := INSTRUCTION.match(line)):
            name, rest = found[2], found[3]
            computations[current][name] = _parse_instruction(name, rest, found[1])
    return computations, entry


def _parse_instruction(name, rest, root):
    kind, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    rest = rest.strip()
    opcode = rest.partition("(")[0]
    inside, _ = _split(rest[len(opcode) :])
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, kind, opcode, operands, rest, bool(root))


def _split(text):
    """Return the leading parenthesis of a text and what follows it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _own_cost(computation, instruction, computations, kernels):
    cycles = sum(int(n) for n in CYCLES.findall(instruction.text))
    if instruction.opcode == "custom-call":
        own = sum(n for name, n in kernels.items() if name in instruction.name)
        return Cost(cycles + own, {}, own)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return Cost(cycles, {})
    within = computations[computation]
    given = sum(_bytes(within[name].type) for name in instruction.operands)
    size = given
    if kind == "all-gather":  # a start's type is a tuple of operand and result
        started = instruction.opcode.endswith("-start")
        size = _bytes(instruction.type) - (given if started else 0)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # libtpu's name for the fusion with a slice
    return Cost(cycles, {kind: Collective(1, size)})


def _called(instruction):
    found = CALLED.findall(instruction.text)
    for names in BRANCHES.findall(instruction.text):
        found += re.findall(r"[\w.\-]+", names)
    return found


def _trip_count(loop, within, computations):
    """Return how often a loop runs that counts up to a constant, as every scan does."""
    if known := TRIPS.search(loop.text):
        return int(known[1])
    condition = computations[re.findall(r"\bcondition=%?([\w.\-]+)", loop.text)[0]]
    body = computations[re.findall(r"\bbody=%?([\w.\-]+)", loop.text)[0]]
    test, after = (next(filter(_is_root, c.values())) for c in (condition, body))
    try:
        counter, bound = (condition[name] for name in test.operands)
        index = int(re.findall(r"index=(\d+)", counter.text)[0])
        before, step = within[loop.operands[0]], body[after.operands[index]]
        start = _constant(within[before.operands[index]], within)
        stride = _constant(body[step.operands[1]], body)
        if "direction=LT" not in test.text or step.opcode != "add":
            raise ValueError(test.text)
        return -(-(_constant(bound, condition) - start) // stride)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"loop {loop.name} does not show how often it runs") from error


def _is_root(instruction):
    return instruction.is_root


def _constant(instruction, within):
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = within[instruction.operands[0]]
    return int(re.findall(r"^constant\((-?\d+)\)", instruction.text)[0])


def _bytes(kind):
    total = 0
    for letters, digits, lengths in ARRAY.findall(kind):
        bits = 8 if letters == "pred" else int(digits or 0)
        count = math.prod(int(n) for n in lengths.split(",") if n)
        total += -(-bits * count // 8)
    return total
