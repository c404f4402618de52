"""Fixtures of the tests that use the corpus; they name this module in `pytest_plugins`."""

import contextlib
import shutil
import sys

import pytest

from .running import script
from .workplace import GO_ON, GOOD, write_inputs


@pytest.fixture(scope="session")
def workplace(tiny_folder, tmp_path_factory):
    """A folder with good input for every command line, as workplace.py describes it."""
    from gguf_models import write_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_folder(), folder / "model")
    write_inputs(folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        for name, more in (
            ("generate_model_gt_data", GO_ON["generate_model_gt_data"]),
            ("block_selection", GO_ON["block_selection"]),
            ("param_scale", ("--output_dir", "scaled", "--num_epochs", "2")),
            ("export", ("--output", "folded")),
        ):
            assert script(name).main([*GOOD[name], *more]) == 0
    write_model(AutoModelForCausalLM.from_pretrained(folder / "folded"), folder / "folded.gguf")
    shutil.rmtree(folder / "folded")
    return folder


@pytest.fixture
def work(workplace, tmp_path, monkeypatch):
    """A workplace of one's own, the working folder, with a cache of its own; removed afterwards."""
    import matplotlib.font_manager  # noqa: F401 - else the first picture's list of fonts would lie there

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)
