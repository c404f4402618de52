"""Verify a checkpoint: its code is this project's, its files are whole, and its scales are finite.

    python -m hopscotch_common.checkpoints verify scaled_smollm_ckpts/smollm_scaled_epoch_9

No code of the checkpoint runs: it is compared byte by byte, never imported.
"""

import sys
from pathlib import Path

from hopscotch_common import cli
from hopscotch_common.checkpoints import read_checkpoint, read_run
from hopscotch_common.checkpoints.folders import OLD_STATE_FILE, RUN_FILE, SCALES_FILE, holds_templates
from hopscotch_common.errors import InputError
from hopscotch_common.files import as_object, read_json
from hopscotch_common.loading.tokenization import check_tokens
from hopscotch_common.loading.weights import INDEX_FILE, weight_map
from hopscotch_common.scales.modeling_hopscotch import CODE, FAMILIES, PREFIX, auto_map

FETCHED = (".cache", ".git")  # left by `hf download --local-dir` and `git clone`; no loader looks there
EXECUTABLE = {".py", ".pyc", ".pyd", ".so", ".sh", ".bin", ".pt", ".pth", ".ckpt"}
EXECUTABLE |= {".pkl", ".pickle", ".joblib"}


def verify(folder: Path) -> None:
    """Raise InputError, naming the first thing that is wrong, unless a checkpoint is sound."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give that of a checkpoint")
    config = read_json(folder / "config.json", "give the folder of a checkpoint")
    kind = str(config.get("model_type"))
    if not kind.startswith(PREFIX) or kind.removeprefix(PREFIX) not in FAMILIES:
        raise InputError(f"{folder}: config.json is not a checkpoint's; give the folder of one")
    classes = auto_map(kind.removeprefix(PREFIX))
    _check_code(folder, config, classes)
    *_, wanted = classes["AutoModelForCausalLM"].split(".")
    if config.get("architectures") != [wanted]:  # vLLM goes by it
        raise InputError(
            f"{folder / 'config.json'}: architectures is {config.get('architectures')}, not {[wanted]}; "
            "make the checkpoint again"
        )
    if config.get("transformers_weights"):
        raise InputError(f"{folder / 'config.json'}: transformers_weights names other weights; do not use it")
    named = {*weight_map(folder / INDEX_FILE).values(), OLD_STATE_FILE}
    unnamed = {path.name for path in folder.glob("*.safetensors")} - named
    if unnamed or SCALES_FILE not in named:
        name = min(unnamed, default=SCALES_FILE)
        raise InputError(f"{folder / INDEX_FILE}: does not name {name}; make the checkpoint again")
    read_checkpoint(folder)
    if (probe := read_run(folder).get("tokenizer")) is not None:
        kinds = {"text": str, "ids": list}
        if not (isinstance(probe, dict) and all(isinstance(probe.get(k), kinds[k]) for k in kinds)):
            raise InputError(f"{folder / RUN_FILE}: tokenizer is no probe; make the checkpoint again")
        check_tokens(folder, probe)


def _check_code(folder: Path, config: dict, known: dict[str, str]) -> None:
    """Raise InputError unless the only code that could run from a folder is a known modeling_hopscotch.py."""
    code = folder / CODE.name
    for path in sorted(folder.iterdir()):
        if path.name.startswith("._"):
            raise InputError(f"{path}: left by macOS; remove the folder's ._* files")
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link, and what it leads to may change; copy the file itself, or fetch the "
                "folder by `hf download --local-dir`"
            )
        if path.name in FETCHED and path.is_dir():
            continue
        may_run = bool(EXECUTABLE & {suffix.lower() for suffix in path.suffixes})  # x.pkl.gz, too
        if may_run and path != code or path.is_dir() and not holds_templates(path):
            raise InputError(
                f"{path}: is no part of a checkpoint, and may run; do not trust it, give another folder"
            )
    if not code.is_file():
        raise InputError(f"{code}: is missing; make the checkpoint again")
    if code.read_bytes() != CODE.read_bytes():
        raise InputError(
            f"{code}: is of another version of this project, or was changed; verify with the version that "
            "made it, and do not run it before"
        )
    for name, target in as_object(config.get("auto_map"), f"{folder / 'config.json'}: auto_map").items():
        if target != known.get(name):  # "repo--module.Class" is code from elsewhere
            raise InputError(f"{folder / 'config.json'}: auto_map names {target!r} for {name}; do not run it")
    if config.get("custom_pipelines"):
        raise InputError(
            f"{folder / 'config.json'}: custom_pipelines name code of another place; do not run it"
        )
    for other in sorted(folder.glob("*_config.json")):
        if "auto_map" in read_json(other):
            raise InputError(f"{other}: has an auto_map, so it names code to run; do not trust it")


@cli.command
def main(argv: list[str] | None = None) -> int:
    purpose = "Verify that a checkpoint is whole, and that the code in it is this project's."
    parser = cli.ArgumentParser(purpose)
    parser.add_argument("action", choices=["verify"])
    parser.add_argument("folder", type=cli.path, help="folder of a checkpoint")
    folder = parser.parse_args(argv).folder
    verify(folder)
    cli.result(f"{folder}: whole, with this project's code and finite scales")
    return 0


if __name__ == "__main__":
    sys.exit(main())
