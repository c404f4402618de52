"""What a case is."""

from collections.abc import Sequence
from dataclasses import dataclass

from .makers import Spoil, all_of
from .workplace import GGUF, GOOD

ALL = ("generate_model_gt_data", "process_gt_data", "block_selection", "param_scale", "unscaled_ckpt")
LOADING = ("generate_model_gt_data", "block_selection", "param_scale", "unscaled_ckpt")
TRAINING = ("block_selection", "param_scale")
COPY_AND_LOAD = ("unscaled_ckpt", "block_selection")  # the weights' two ways: file by file, and as a model

# A message says what to do: one of these, or what was not kept and so must be.
REMEDY = (
    r"\b(give|fetch|name|make|repeat|remove|delete|move|use|lower|raise|check|train|install|download|try|choose|fix"
    r"|shorten|process|export|convert|restore|replace|copy|rename|see|write|save|leave|set|start|supported"
    r"|must|needs?|at most|at least)\b|block \S+ (does not exist|is named twice)|is not one of|not text"
    r"|only (text|assistant)|no content|no label counts|but \d+ labels|beyond the model's vocabulary"
    r"|tokens or more|losses, but the model|so not a checkpoint|invalid (choice|\w+ value)"
    r"|expected (one|at least one) argument|not allowed with|explicit argument"  # argparse's own
)


@dataclass(frozen=True)
class Case:
    """A command line that must be refused: good arguments and `more`, over a workplace that `spoil` broke.

    about: the flag whose value is bad. message: what the one line on stderr says besides a remedy, a
    regular expression.
    """

    script: str
    about: str
    name: str
    message: str
    more: tuple[str, ...]
    spoil: Spoil

    def __str__(self) -> str:
        return f"{self.script} {self.about} {self.name}"

    def arguments(self) -> list[str]:
        """The whole command line; of a flag given twice, argparse takes the last, but adds to a list."""
        if self.script == "export" and "gguf" in self.more:
            return [*GGUF, *self.more]
        if self.script == "report" and self.more:
            return list(self.more)
        good = list(GOOD[self.script])
        if "--blocks_to_skip" in good and "--blocks_to_skip" in self.more:
            place = good.index("--blocks_to_skip")
            del good[place : place + 2]
        return [*good, *self.more]


def points_to(*places: str) -> str:
    """A regular expression for a line that names all these places (regular expressions), and a remedy."""
    return "".join(f"(?=.*(?:{place}))" for place in (*places, REMEDY))


def cases(scripts: str | Sequence[str], about: str, *rows: tuple, more: Sequence[str] = ()) -> list[Case]:
    """Cases of one flag, a row each: a name, the message, and in any order further arguments (as one text
    with spaces between, or a tuple) and what spoils the workplace. more: arguments before a row's."""
    made = []
    for name, message, *rest in rows:
        words = [
            word
            for item in rest
            if not callable(item)
            for word in (item.split(" ") if isinstance(item, str) else item)
        ]
        spoil = all_of(*filter(callable, rest))
        for script in [scripts] if isinstance(scripts, str) else scripts:
            made.append(Case(script, about, name, message, (*more, *words), spoil))
    return made


def values(scripts: str | Sequence[str], about: str, *rows: tuple) -> list[Case]:
    """Cases of a flag's own value, a row each: the value, further arguments after it if any, the message."""
    return [
        case
        for value, *others, message in rows
        for case in cases(
            scripts, about, (f"= {value[:30]!r} {' '.join(others)}".strip(), message, (about, value, *others))
        )
    ]
