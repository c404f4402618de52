"""What a case is."""

from collections.abc import Iterable
from dataclasses import dataclass

from .makers import Spoil, nothing
from .workplace import GGUF, GO_ON, GOOD

# A message says what to do: one of these, or a limit that was not kept.
REMEDY = (
    r"\b(give|fetch|mend|name|make|repeat|remove|delete|move|use|lower|raise|check|train|install|download|try|choose|fix"
    r"|shorten|process|export|convert|restore|replace|copy|rename|see|write|save|leave|set|start|supported"
    r"|must|needs?|at most|at least)\b"
)


@dataclass(frozen=True)
class Case:
    """A command line that must be refused: good arguments and `more`, over a workplace that `spoil` broke.

    about: the flag whose value is bad. message: a regular expression for the one line on stderr.
    """

    script: str
    about: str
    name: str
    message: str
    more: tuple[str, ...] = ()
    spoil: Spoil = nothing

    def __str__(self) -> str:
        return f"{self.script} {self.about} {self.name}"

    def arguments(self) -> list[str]:
        """The whole command line; of a flag given twice, argparse takes the last."""
        if self.script == "export" and "gguf" in self.more:
            return [*GGUF, *self.more]
        if self.script == "report" and self.more:
            return list(self.more)
        return [*GOOD[self.script], *self.more]


def points_to(*places: str) -> str:
    """A regular expression for a line that names all these places (regular expressions), and a remedy."""
    return "".join(f"(?=.*{place})" for place in places) + f"(?=.*{REMEDY})"


def going_on(case: Case) -> Case:
    """The case, with the arguments that take up the workplace's earlier output."""
    more = (*GO_ON[case.script], *case.more)
    return Case(case.script, case.about, case.name, case.message, more, case.spoil)


def for_scripts(
    scripts: Iterable[str], about: str, name: str, message: str, *more: str, spoil: Spoil = nothing
) -> list[Case]:
    """The same case for several scripts."""
    return [Case(script, about, name, message, more, spoil) for script in scripts]
