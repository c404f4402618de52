"""The files in the folder of a checkpoint or an export, and whether the folder may be overwritten."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR, GENERATION_CONFIG_NAME

from hopscotch_common.checkpoints.card import CARD_FILE
from hopscotch_common.errors import InputError
from hopscotch_common.files import check_name
from hopscotch_common.loading.weights import INDEX_FILE
from hopscotch_common.scales.modeling_hopscotch import CODE, SCALES_FILE

STATE_FILE = "training_state.adam"  # in safetensors format; with that suffix engines would load it, too
OLD_STATE_FILE = "training_state.safetensors"
RUN_FILE = "hopscotch.json"
OWN_FILES = (SCALES_FILE, STATE_FILE, OLD_STATE_FILE, RUN_FILE, CARD_FILE)  # of each checkpoint
SHARED_FILES = "base-*.safetensors"
DESCRIPTION_FILES = ("config.json", CODE.name, INDEX_FILE)  # the same in all checkpoints of a run
HASH = re.compile("[0-9a-f]{30}")
# Left by `hf download --local-dir`, the hub, macOS, notebooks, file servers and Windows.
HARMLESS = (".cache", ".gitattributes", ".DS_Store", "._*", ".ipynb_checkpoints", ".nfs*", "Thumbs.db")
# Not every file of a model folder: Mistral's tekken.json would hide tokenizer.json.
COMPANION_FILES = (
    GENERATION_CONFIG_NAME,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence from a model folder."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)


def companions(folder: Path) -> list[Path]:
    """Return a model folder's files besides config, code and weights.

    Raises InputError for a link to a file of another name elsewhere, whose content a checkpoint would
    publish. Caches (the hub's, DVC's) name files by hashes.
    """
    found = [path for pattern in COMPANION_FILES for path in folder.glob(pattern) if path.is_file()]
    for path in found:
        real = path.resolve()
        inside = bool(HASH.search(real.name)) or real.is_relative_to(folder.resolve())
        if real.name != path.name and not inside:
            raise InputError(
                f"{path}: is a link to {real}, which would be copied into checkpoints; put the file itself "
                "there, or remove the link"
            )
    return found


def check_replaceable(folder: Path) -> None:
    """Raise InputError unless a checkpoint may be written there: a new folder, or an earlier one's."""
    own = (*DESCRIPTION_FILES, SHARED_FILES, *OWN_FILES)
    check_folder(folder, "--output_dir", "a checkpoint of ours", RUN_FILE, own)


def check_folder(folder: Path, flag: str, what: str, marker: str, own: Iterable[str]) -> None:
    """Raise InputError unless a folder is new, or an earlier one with nothing in it that would be lost.

    flag: what names it; what: it should be, which its file `marker` shows. own: patterns of the files that
    are written there, besides COMPANION_FILES such as a tokenizer's.
    """
    if not folder.name:  # "." and "/"
        raise InputError(f"{flag} {folder}: is a folder without a name of its own; name another")
    check_name(folder, flag)
    empty = folder.is_dir() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not empty and not (folder / marker).is_file():
        raise InputError(f"{folder} exists and is not {what}: name another {flag}, or move it away")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = any(path.match(pattern) for pattern in (*own, *COMPANION_FILES)) and path.is_file()
        if not (known or any(path.match(pattern) for pattern in HARMLESS) or holds_templates(path)):
            raise InputError(
                f"{path}: is not of this script, and would be deleted with the folder; move it away, "
                f"or name another {flag}"
            )


def holds_templates(folder: Path) -> bool:
    """Whether a folder is the one where transformers keeps further chat templates, and holds nothing else."""
    if folder.name != CHAT_TEMPLATE_DIR or not folder.is_dir():
        return False
    return all(path.suffix == ".jinja" and not path.is_symlink() for path in folder.iterdir())


def check_outside(output: Path, checkpoint: Path) -> None:
    """Raise InputError for an export's output inside the checkpoint's own folder."""
    if output.absolute().parent.resolve().is_relative_to(checkpoint.resolve()):
        raise InputError(f"--output {output}: lies in the checkpoint; name a place elsewhere")
