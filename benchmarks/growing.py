"""A result file that grows: written again after each figure, and taken up by the next run."""

import json
from collections.abc import Callable
from pathlib import Path

import measuring


class GrowingResults:
    """Figures of long runs, each under the setting that it was measured with.

    settings: what all figures depend on. A file of other settings is refused, with what differs.
    The file holds command, machine, `settings`, and `figures`, a list of {"of": …} | what was measured.
    """

    def __init__(self, path: Path, settings: dict):
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they read back
        self.path, self.settings, self.figures = path, settings, []
        if path.exists():
            content = json.loads(path.read_text())
            different = [name for name in settings if content["settings"].get(name) != settings[name]]
            if different:
                raise SystemExit(f"{path}: made with another {', '.join(different)}; move it away")
            self.figures = content["figures"]

    def find(self, **of) -> dict | None:
        """What was measured with exactly this setting, or None."""
        return next((figure for figure in self.figures if figure["of"] == of), None)

    def measure(self, work: Callable[[], dict], **of) -> dict:
        """The figures of a setting: from the file, or else of `work`, which are written at once."""
        found = self.find(**of)
        if found is None:
            found = {"of": of} | work()
            self.figures.append(found)
            measuring.save_as(self.path, {"settings": self.settings, "figures": self.figures})
        return found
