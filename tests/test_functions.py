"""benchmarks/functions: the functions that models write, and how what they wrote is judged."""

import doctest
import importlib
import inspect
import textwrap

import functions
import pytest

EARLIEST = """\
def earliest(days: list[str]) -> str:
    return min(days, default="")
"""
PAIRS = ((([],), ""), ((["02-01", "01-31"],), "01-31"))


def is_right(answer: str) -> bool:
    return functions.FunctionProblem("earliest", "", PAIRS).is_right(answer)


def blocks(*codes: str) -> str:
    return "Here it is:\n" + "\nand\n".join(f"```python\n{code}```" for code in codes) + "\nThat is all."


@pytest.mark.parametrize("name", functions.MODULES)
def test_functions_do_what_they_say(name):
    module = importlib.import_module(f"functions.{name}")
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted >= 40
    for function in functions.written(name):
        calls = [repr(arguments) for arguments in function.cases]
        results = [function(*arguments) for arguments in function.cases]
        assert [repr(arguments) for arguments in function.cases] == calls, "arguments were changed"
        assert len(calls) >= 4 and len({repr(result) for result in results}) > 1
        # literals, which arrive in the process of the answer as they are
        assert eval(", ".join(calls)) == function.cases
        assert eval(repr(results)) == results


def test_a_question_shows_signature_and_docstring_alone():
    asked = functions.functions()
    assert len(asked) == len({problem.name for problem in asked}) == 120
    assert asked[:7] == functions.functions(7)
    of = {function.__name__: function for name in functions.MODULES for function in functions.written(name)}
    for problem in asked:
        source = inspect.getsource(of[problem.name])
        assert problem.question.count('"""') == 2 and "cases" not in problem.question
        shown = problem.question.partition("```python\n")[2].removesuffix("\n```")
        assert shown in source and shown.startswith(f"def {problem.name}(") and shown.endswith('"""')
    assert {problem.name in dir(functions.text) for problem in asked[::3]} == {True}  # the modules in turn


def test_a_wrong_answer_to_the_shown_example_is_wrong():
    text = {function.__name__: function for function in functions.written("text")}["fits_mask"]
    source = inspect.getsource(text)
    wrong = source[source.index("def ") :].replace("character == sign)", "False)")
    assert wrong.count("sign, False") == 1
    assert not functions.problem_of(text).is_right(blocks(wrong))


def test_what_is_written_here_is_right():
    for name in functions.MODULES:
        for function in functions.written(name)[::8]:
            source = inspect.getsource(function)
            problem = functions.problem_of(function)
            assert problem.is_right(blocks(source[source.index("def ") :]))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (blocks(EARLIEST), True),
        (EARLIEST, True),
        (blocks("print(earliest(['a']))\n", EARLIEST, "earliest = None\n"), True),
        ("```\n" + EARLIEST, True),  # cut off, or the fence forgotten
        (blocks(f"import sys\n\n{EARLIEST}\nprint(sys.argv)\n"), True),
        (blocks(f"from __future__ import annotations\n\n{EARLIEST}"), True),
        ("1. So:\n" + textwrap.indent(f"```python\n{EARLIEST}```\n", "   "), True),
        (blocks('def earliest(days):\n    """The question."""\n', EARLIEST), True),
        (blocks('def earliest(days):\n    """The question."""\n'), False),
        (blocks(EARLIEST.replace("min", "max")) + "</think>" + blocks(EARLIEST), True),
        (blocks(EARLIEST.replace("min", "max")), False),
        (blocks(EARLIEST.replace(', default=""', "")), False),
        (blocks(EARLIEST.replace("earliest", "first")), False),
        (blocks(EARLIEST + "raise SystemExit(0)\n"), False),
        (blocks("import os\n" + EARLIEST + "os._exit(0)\n"), False),
        (blocks(EARLIEST.replace("return", "while True: pass\n    return")), False),
        (blocks(EARLIEST.replace("return", "input()\n    return")), False),
        (blocks(EARLIEST[:-5]), False),
        (EARLIEST + "\0", False),
        ("It is the minimum.", False),
        ("", False),
    ],
)
def test_what_a_model_wrote_is_judged_by_running_it(answer, right, monkeypatch):
    if "while True" in answer:  # to the others a busy machine may take longer
        monkeypatch.setattr(functions, "SECONDS", 1)
    assert is_right(answer) is right
