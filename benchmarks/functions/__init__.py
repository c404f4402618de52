"""Small functions to write, in HumanEval's form (arXiv 2107.03374): an exam that no scales are trained on.

A model sees a function's signature and docstring, and writes the whole function. Its code is right if it
returns what the function here returns, for all of its cases. The functions were written for this project, so
no model has seen them.
"""

import ast
import doctest
import importlib
import inspect
import itertools
import re
import secrets
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

MODULES = ("text", "numbers", "records")
SECONDS = 5  # of an answer's code
QUESTION = (
    "Write this Python function. Answer with its whole code in one block, and nothing else.\n\n"
    "```python\n{signature}\n```"
)
BLOCK = re.compile(r"[ ]*```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# In front of what a model wrote. Against accidents: it is not a sandbox.
LIMITS = """\
import resource as _resource
for _which, _most in (("CPU", {seconds}), ("FSIZE", 0), ("AS", 2**30)):
    try:
        _resource.setrlimit(getattr(_resource, "RLIMIT_" + _which), (_most, _most))
    except (ValueError, OSError):  # macOS has no limit of the address space
        pass
"""
CHECKS = """
for _arguments, _expected in {pairs!r}:
    assert {name}(*_arguments) == _expected
print({sign!r})
"""


def cases(*arguments: tuple) -> Callable[[Callable], Callable]:
    """Mark a function with the arguments of the calls that judge it, a tuple a call."""

    def mark(function: Callable) -> Callable:
        function.cases = arguments
        return function

    return mark


@dataclass(frozen=True)
class FunctionProblem:
    """A function to write. pairs: (arguments, result) of the calls that judge it."""

    name: str
    question: str
    pairs: tuple[tuple[tuple, object], ...]

    def is_right(self, text: str) -> bool:
        """Whether the code in a model's answer returns all results. It runs in a process of its own."""
        code = code_of(text, self.name)
        if code is None:
            return False
        sign = secrets.token_hex()  # which code that ends the process early cannot print
        checks = CHECKS.format(pairs=self.pairs, name=self.name, sign=sign)
        run = f"exec(compile({code!r}, 'answer', 'exec'), globals())\n"  # it may begin with __future__
        program = LIMITS.format(seconds=SECONDS) + run + checks
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-c", program],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=2 * SECONDS,
                )
            except subprocess.TimeoutExpired:
                return False
        return done.returncode == 0 and done.stdout.decode(errors="replace").endswith(f"{sign}\n")


def code_of(text: str, name: str) -> str | None:
    """The first block of code in an answer that defines the function, or the whole answer; None without.

    What a model thought before it answered does not count, nor does the question said once more.
    """
    text = text.rpartition("</think>")[2]
    for code in map(textwrap.dedent, (*BLOCK.findall(text), text)):
        try:
            body = ast.parse(code).body
        except (SyntaxError, ValueError):  # no Python; a null byte
            continue
        defined = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
        if any(not all(isinstance(line, ast.Expr | ast.Pass) for line in node.body) for node in defined):
            return code
    return None


def shown(function: Callable) -> str:
    """A function's signature and docstring, as its module has them."""
    source = inspect.getsource(function)
    (node,) = ast.parse(source).body
    return "\n".join(source.splitlines()[node.lineno - 1 : node.body[0].end_lineno])


def examples(function: Callable) -> list[tuple]:
    """The arguments of the calls that a function's docstring shows."""
    shown = doctest.DocTestParser().get_examples(inspect.getdoc(function))
    nodes = [node for example in shown for node in ast.walk(ast.parse(example.source))]
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == function.__name__]
    return [tuple(map(ast.literal_eval, call.args)) for call in calls]


def problem_of(function: Callable) -> FunctionProblem:
    question = QUESTION.format(signature=shown(function))
    called = (*function.cases, *examples(function))
    pairs = tuple((arguments, function(*arguments)) for arguments in called)
    return FunctionProblem(function.__name__, question, pairs)


def written(module: str) -> list[Callable]:
    """The functions of a module, in its order."""
    of = vars(importlib.import_module(f"{__name__}.{module}"))
    return [value for value in of.values() if hasattr(value, "cases")]


def functions(count: int | None = None) -> list[FunctionProblem]:
    """The first so many functions to write, the modules in turn."""
    found = [f for row in itertools.zip_longest(*map(written, MODULES)) for f in row if f is not None]
    return [problem_of(function) for function in found[:count]]
