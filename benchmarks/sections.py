"""A benchmark in sections: as many as a time limit allows, the figures kept as they come."""

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """run: measures; its figures by name. expected: seconds, generously; by it what still fits is judged.

    missing: what the section needs and this machine lacks.
    """

    expected: float
    run: Callable[[], dict]
    missing: str | None = None


@dataclass
class Results:
    """By section: its figures, or why it was skipped, or how it failed."""

    figures: dict[str, dict] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, section: Section, expected: float, left: float) -> None:
        """Measure one section if its expected seconds are left."""
        if section.missing:
            self.skipped[name] = f"no {section.missing} here"
        elif expected > left:
            self.skipped[name] = f"may take {expected:.0f} s, and {max(left, 0):.0f} s are left"
        else:
            try:
                self.figures[name] = section.run()
            except Exception as error:  # whatever it is, the other sections' figures are wanted
                traceback.print_exc()
                self.failed[name] = f"{type(error).__name__}: {error}"

    def table(self) -> str:
        """A line for each section."""
        lines = []
        for name, figures in self.figures.items():
            numbers = [
                f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, int | float)
            ]
            lines.append(f"{name}: {', '.join(numbers)}")
        lines += [f"{name}: skipped, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines + [f"{name}: failed, {why}" for name, why in self.failed.items()])


def run(sections: Mapping[str, Section], minutes: float, results: Results, keep: Callable[[], None]) -> None:
    """Take the sections in turn and call `keep` after each.

    A machine on which sections take longer than expected is taken to need as much more for the rest.
    """
    start = time.perf_counter()
    spent = planned = 0.0
    for name, section in sections.items():
        begun = time.perf_counter()
        pace = max(1.0, spent / planned) if planned else 1.0
        results.take(name, section, pace * section.expected, start + 60 * minutes - begun)
        ended = time.perf_counter()
        if name in results.figures:
            spent, planned = spent + ended - begun, planned + section.expected
        print(f"{ended - start:4.0f} s  {name}", file=sys.stderr, flush=True)
        keep()
