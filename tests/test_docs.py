"""README.md, docs/ and benchmarks/README.md: links lead somewhere, flags are the parsers', commands work."""

import importlib
import json
import os
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT

from hopscotch_common.loading import models

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
TEXTS = {page: page.read_text() for page in PAGES}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPTS = ("generate_model_gt_data", "process_gt_data", "block_selection", "param_scale", "unscaled_ckpt")
MODULES = ("hopscotch_common.report", "hopscotch_common.export")
OF_ALL, OF_TRAINING = "Flags of every script that loads a model", "Flags of training"
# Needs what the test has not: a network, several processes, llama.cpp, maps, more than one model.
NOT_RUN = {"--dataset", "accelerate", "--from", "--without_maps", "llama", "granite"}


def sections(text: str) -> dict[str, str]:
    """What stands under each heading up to the next, code blocks left out."""
    parts = re.split(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LMN")
    return "".join(kept).replace(" ", "-")


def commands(text: str) -> list[list[str]]:
    """The command lines of a page's bash blocks, as words; a variable of the block stands for its value."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S):
        values = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in values.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and (setting := re.fullmatch(r"(\w+)=(.+)", words[0])):
                values[setting[1]] = setting[2]
            elif words:
                found.append(words)
    return found


def called(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command of this project, perhaps under a launcher; None for another."""
    if words[:2] == ["python", "-m"] and words[2].startswith("hopscotch_common"):
        return words[2], words[3:]
    if words[0] not in ("python", "accelerate"):
        return None
    for place, word in enumerate(words):
        if word.endswith(".py") and not word.startswith("llama.cpp/"):
            assert (ROOT / word).is_file(), word
            return Path(word).stem, words[place + 1 :]
    return None


def program(module: str):
    return importlib.import_module(f"{module}.__main__" if module.startswith("hopscotch_common") else module)


def parser_of(module: str):
    """None for a module that has no parser of its own to ask."""
    return getattr(program(module), "build_parser", lambda: None)()


def flags_of(module: str) -> dict[str, object]:
    """The parser's flags, with their defaults."""
    actions = [action for action in parser_of(module)._actions if action.option_strings]
    return {action.option_strings[-1]: action.default for action in actions if action.dest != "help"}


def table_of(heading: str) -> dict[str, str]:
    """The flags that the table under a heading of docs/ names, with the cell of their default."""
    (section,) = [found[heading] for text in TEXTS.values() if heading in (found := sections(text))]
    return dict(re.findall(r"^\| `(--\w+)` \| (.+?) \|", section, flags=re.M))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S))
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.is_relative_to(ROOT) and to.exists(), target
        if fragment:
            assert fragment in map(anchor, sections(to.read_text())), target


def test_each_page_of_docs_is_in_the_readme_and_no_heading_twice():
    for page, text in TEXTS.items():
        assert page.name == "README.md" or f"(docs/{page.name})" in TEXTS[ROOT / "README.md"], page
        headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M)
        assert len(set(headings)) == len(headings), page


@pytest.mark.parametrize("module", [*SCRIPTS, *MODULES])
def test_tables_name_each_flag_and_no_other(module):
    flags = flags_of(module)
    file = module if module in MODULES else f"{module}.py"
    tables = [table_of(f"Flags of {file}")]
    if module in SCRIPTS and module != "process_gt_data":
        tables.append(table_of(OF_ALL))
    if module in ("block_selection", "param_scale"):
        tables.append(table_of(OF_TRAINING))
    named = [flag for table in tables for flag in table]
    assert sorted(named) == sorted(flags)
    for flag, cell in (item for table in tables for item in table.items()):
        if isinstance(flags[flag], (bool, list)):
            assert cell in ("off", "none"), flag
        elif flags[flag] is not None:
            assert cell.strip("`") == str(flags[flag]), flag


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that commands name, empty ones."""
    monkeypatch.chdir(tmp_path)
    Path("qwen05").mkdir()
    Path("qwen05", "config.json").write_text("{}")
    for name in ("qwen", "qwen05", "qwen15"):
        Path(f"{name}.gguf").write_text("GGUF")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_flags_that_are_there(folder, page):
    makefile, pipeline = ((ROOT / name).read_text() for name in ("Makefile", "pipeline.sh"))
    for words in commands(TEXTS[page]):
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif "pipeline.sh" in words:
            settings = words[: words.index("bash")]
            assert all(f"${{{setting.partition('=')[0]}:-" in pipeline for setting in settings), words
        elif words[:3] == ["pip", "install", "-r"]:
            assert (ROOT / words[3]).is_file()
        elif (command := called(words)) and (parser := parser_of(command[0])):
            parser.parse_args(command[1])


def test_the_settings_of_pipeline_sh_are_those_in_its_table():
    section = sections(TEXTS[ROOT / "docs" / "steps.md"])["pipeline.sh"]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, flags=re.M)
    named = [name for row in rows for name in re.findall(r"[A-Z_]+", row)]
    there = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "pipeline.sh").read_text())) - {"MINUTES"}
    assert sorted(named) == sorted(there) == sorted({*DEFAULTS, *SETTINGS, "EXPORT", "LAUNCH"})


# Of pipeline.sh, by step and flag: what every run has, and what each variable sets, with its default.
DATA, PICKED = "data/qwen-processed-data", "./qwen_block_selection.json"
ALWAYS = {
    "generate_model_gt_data": {},
    "process_gt_data": {},
    "block_selection": {"--data_path": f"{DATA}/data.jsonl"},
    "param_scale": {"--data_path": f"{DATA}/data.jsonl", "--blocks_to_skip": PICKED}
    | {"--validation_split": "0.2", "--resume": ""},
    "unscaled_ckpt": {"--blocks_to_skip": PICKED},
}
DEFAULTS = {"MAX_TOKENS": "4096", "BATCH_SIZE": "32", "SEARCH": "race", "NUM_BLOCKS": "4", "NUM_EPOCHS": "10"}
DEFAULTS |= {"GRANULARITY": "channel", "LOSS": "kl", "REPLACEMENT_RANK": "16"}
SETTINGS = {
    "INPUT_FILE": [("generate_model_gt_data", "--input_file")],
    "NUM_SAMPLES": [("generate_model_gt_data", "--num_samples")],
    "MAX_TOKENS": [("generate_model_gt_data", "--max_tokens")],
    "MAX_SAMPLES": [("block_selection", "--max_samples")],
    "BATCH_SIZE": [("block_selection", "--batch_size"), ("param_scale", "--batch_size")],
    "SEARCH": [("block_selection", "--search")],
    "NUM_BLOCKS": [("block_selection", "--num_blocks")],
    "NUM_EPOCHS": [("param_scale", "--num_epochs")],
    "LEARNING_RATE": [("param_scale", "--learning_rate")],
    "GRANULARITY": [("param_scale", "--granularity")],
    "LOSS": [("param_scale", "--loss")],
    "REPLACEMENT_RANK": [
        (step, "--replacement_rank") for step in ("block_selection", "param_scale", "unscaled_ckpt")
    ],
}


@pytest.mark.parametrize(
    "settings",
    [{}, *({name: "a b"} for name in SETTINGS), {"REPLACEMENT_RANK": "0"}]
    + [{"EXPORT": "folded nemotron_nas", **more} for more in ({}, {"REPLACEMENT_RANK": "7"})]
    + [{"LAUNCH": "python -m launcher"}],
    ids=str,
)
def test_the_steps_of_pipeline_sh_get_what_its_variables_say(tmp_path, settings):
    """With a `python` that writes down what it is given, and names the best epoch."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
printf '%s\\037' "$@" >> calls
echo >> calls
if [ "$2" = -c ]; then echo 3; fi
""")
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "pipeline.sh"), "qwen"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | settings
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *steps, report, _ = [line.split("\037")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]

    exports = settings.get("EXPORT", "")
    values = DEFAULTS | ({"REPLACEMENT_RANK": "0"} if exports else {}) | settings
    expected = {step: {"--model": "qwen"} | flags for step, flags in ALWAYS.items()}
    for name in SETTINGS.keys() & values.keys():
        for step, flag in SETTINGS[name]:
            expected[step] |= {flag: values[name]}
    if "MAX_SAMPLES" not in settings:  # the search leaves out what step 4a holds out
        expected["block_selection"] |= {"--validation_split": "0.2"}
    if values["REPLACEMENT_RANK"] == "0":
        del expected["unscaled_ckpt"]["--replacement_rank"]
    else:
        expected["unscaled_ckpt"] |= {"--data_path": f"{DATA}/data.jsonl"}
    if exports:
        expected["param_scale"] |= {"--export": exports}
    found = {}
    for words in steps:
        number, script = next((i, Path(word)) for i, word in enumerate(words) if word.endswith(".py"))
        launcher = ["-m", "launcher"] if script.stem in ("block_selection", "param_scale") else []
        assert script.parent == ROOT and words[:number] == (launcher if "LAUNCH" in settings else [])
        flags = found[script.stem] = {}
        for word in words[number + 1 :]:
            if word.startswith("--"):
                flag, _, value = word.partition("=")
                flags[flag] = value
            else:
                flags[flag] = f"{flags[flag]} {word}".strip()
    assert found == expected and list(found) == list(ALWAYS)
    runs = ["./qwen_math_final_report.json", DATA, PICKED, "scaled_qwen_ckpts"]
    assert report == ["-P", "-m", "hopscotch_common.report", *runs]  # no json.py of the folder
    uploaded = [shlex.split(line)[3] for line in ran.stdout.splitlines()]
    folders = [f"./scaled_qwen_ckpts/qwen_scaled_{kind}" for kind in ("epoch_3", *exports.split())]
    assert uploaded == folders


def test_pipeline_sh_refuses_another_export_before_any_step(tmp_path):
    command = ["bash", str(ROOT / "pipeline.sh"), "qwen"]
    settings = {"PATH": os.environ["PATH"], "EXPORT": "folded gguf"}
    ran = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == (
        "pipeline.sh: EXPORT: gguf is not one of: folded, nemotron_nas\n"
    )


def test_tests_that_a_page_names_are_there():
    for path, name in set(re.findall(r"(tests/\w+\.py)(?:::(\w+))?", "".join(TEXTS.values()))):
        assert (ROOT / path).is_file(), path
        assert f"def {name}(" in (ROOT / path).read_text() if name else True, f"{path}::{name}"


def test_commands_run_as_they_stand(tiny_folder, folder, monkeypatch):
    """The README's and docs/' commands, each once, and its lines of Python, on a tiny model named qwen."""
    monkeypatch.setitem(models.ALIASES, "qwen", str(tiny_folder(num_hidden_layers=16, hidden_size=16)))
    asked = [{"question": f"What is {number} + {number}?"} for number in range(6)]
    answered = [record | {"answer": "An answer that is long enough."} for record in asked]
    for name, records in (("gsm8k", asked), ("prompts", asked), ("answers", answered)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("scaled_smollm_ckpts").mkdir()
    epoch = Path("scaled_qwen_ckpts", "qwen_scaled_epoch_9").absolute()
    Path("scaled_smollm_ckpts", "smollm_scaled_epoch_2").symlink_to(epoch)
    quick = {
        "generate_model_gt_data": ["--max_tokens", "16", "--keep_truncated", "--backend", "transformers"],
        "block_selection": ["--max_samples", "2"],
    }
    run = {}  # in order, without doubles
    for name in ("README.md", "docs/steps.md", *NAMES[:-1]):
        for words in commands(TEXTS[ROOT / name]):
            if (command := called(words)) and not NOT_RUN & set(words):
                run[tuple(words)] = command
    assert {module for module, _ in run.values()} == {*SCRIPTS, *MODULES, "hopscotch_common.checkpoints"}
    for module, arguments in run.values():
        assert program(module).main([*arguments, *quick.get(module, ())]) == 0, (module, arguments)
    (lines,) = re.findall(r"^```python\n(.*?)^```$", TEXTS[ROOT / "README.md"], flags=re.M | re.S)
    loaded = {}
    exec(lines, loaded)
    skipped = json.loads(Path("qwen_block_selection.json").read_text())["skipped_blocks"]
    assert loaded["model"].config.skipped_attention_blocks == [8, 15] and skipped != [8, 15]
