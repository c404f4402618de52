"""Problems with exact answers, and how a number is read out of a model's answer."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from hopscotch_common.files import read_jsonl

# Digits with thousands commas, or without; decimals. A minus belongs to a number unless it stands behind
# a number or a bracket, where it subtracts.
NUMBER = re.compile(r"((?<![\w)\]])[-−])?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?")
EXPONENT = re.compile(r"(?<=[A-Za-z}])\^\{?\d+\}?")  # of a unit: ft^2
HEADING = re.compile(r"####(?=\s*(?:\d+[.)])?\s*[A-Za-z])")  # "#### Step 2", "#### 2. Add"
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: Decimal

    def is_right(self, text: str) -> bool:
        """Whether an answer's number is the problem's."""
        return parse_answer(text) == self.answer


def parse_answer(text: str) -> Decimal | None:
    r"""The number that an answer gives, or None where it holds none.

    The last number in the last \boxed{…}; where there is none, the first number after the last "####";
    where there is none, the last number of the text. Thousands commas, currency signs, and what follows
    a number (%, units, a full stop) do not count, nor do "####" before a heading and the exponent of a unit.
    "5 - 3" ends with 3, "is -3" with -3.
    """
    text = text.replace("\\$", "$").replace("{,}", ",").replace("\\,", ",")
    text = HEADING.sub("", EXPONENT.sub("", text))
    boxed = BOXED.findall(text)
    if boxed and (numbers := _numbers(boxed[-1])):
        return numbers[-1]
    _, marker, tail = text.rpartition("####")
    if marker and (numbers := _numbers(tail)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if minus else "") + whole.replace(",", "") + decimals)
        for minus, whole, decimals in NUMBER.findall(text)
    ]


def gsm8k(path: Path, count: int | None = None) -> list[Problem]:
    """The first problems of a GSM8K file: `question`, and `answer` that ends with "#### number"."""
    problems = []
    for number, record in read_jsonl(path):
        answer = parse_answer(record.get("answer", ""))
        if answer is None or not record.get("question"):
            raise SystemExit(f"{path}, line {number}: needs a 'question' and an 'answer' with a number")
        problems.append(Problem(record["question"], answer))
    return problems[:count]


def _product(numbers: random.Random) -> tuple[str, int]:
    a, b, c = numbers.randint(11, 99), numbers.randint(11, 99), numbers.randint(2, 9)
    return f"What is ({a} + {b}) * {c}?", (a + b) * c


def _remainder(numbers: random.Random) -> tuple[str, int]:
    a, b = numbers.randint(50, 400), numbers.randint(3, 12)
    return f"What is the remainder when {a} is divided by {b}?", a % b


def _sequence(numbers: random.Random) -> tuple[str, int]:
    first, step = numbers.randint(1, 40), numbers.randint(3, 17)
    shown = ", ".join(str(first + i * step) for i in range(5))
    return f"Which number comes next in this sequence: {shown}?", first + 5 * step


def _second_largest(numbers: random.Random) -> tuple[str, int]:
    values = numbers.sample(range(10, 1000), 6)
    return f"What is the second largest of these numbers: {_listed(values)}?", sorted(values)[-2]


def _even(numbers: random.Random) -> tuple[str, int]:
    values = numbers.sample(range(1, 100), 7)
    return f"How many of these numbers are even: {_listed(values)}?", sum(v % 2 == 0 for v in values)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


PUZZLES: tuple[Callable[[random.Random], tuple[str, int]], ...] = (
    _product,
    _remainder,
    _sequence,
    _second_largest,
    _even,
)


def puzzles(count: int, seed: int = 0) -> list[Problem]:
    """So many generated problems, the kinds of PUZZLES in turn: arithmetic and small logic, no stories."""
    numbers = random.Random(seed)
    problems = []
    for index in range(count):
        question, answer = PUZZLES[index % len(PUZZLES)](numbers)
        problems.append(Problem(f"{question} Think step by step, then give the answer.", Decimal(answer)))
    return problems
