"""What makes input bad: each function returns one that spoils a workplace."""

import contextlib
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

Spoil = Callable[[Path], object]
REMOVED = object()  # in `edit`: the key is taken out


def nothing(work: Path) -> None:
    """Leave the workplace as it is: the command line itself is bad."""


def all_of(*spoils: Spoil) -> Spoil:
    return lambda work: [spoil(work) for spoil in spoils]


def write(name: str, content: str | bytes) -> Spoil:
    """A file of one's own, or another one in its place."""

    def spoil(work: Path) -> None:
        _free(work / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def _free(path: Path) -> Path:
    """A path at which something can be made; epochs share files by hard links, so none is written over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def change(name: str, function: Callable[[bytes], str | bytes]) -> Spoil:
    """A file with the content that a function makes of its content."""
    return lambda work: write(name, function((work / name).read_bytes()))(work)


def line(name: str, number: int, content: str | bytes | dict) -> Spoil:
    """Line `number` (from 1) of a file, replaced."""

    def replaced(old: bytes) -> bytes:
        text = json.dumps(content) if isinstance(content, dict) else content
        text = text if isinstance(text, bytes) else text.encode()
        lines = old.splitlines(keepends=True)
        return b"".join([*lines[: number - 1], text + b"\n", *lines[number:]])

    return change(name, replaced)


def edit_line(name: str, number: int, **changes) -> Spoil:
    """Some keys of the JSON record on line `number` of a file, replaced or REMOVED."""

    def spoil(work: Path) -> None:
        record = (work / name).read_bytes().splitlines()[number - 1]
        line(name, number, _changed(record, changes))(work)

    return spoil


def edit(name: str, **changes) -> Spoil:
    """Some keys of a JSON file, replaced or REMOVED."""
    return change(name, lambda old: json.dumps(_changed(old, changes), indent=2))


def _changed(old: bytes, changes: dict) -> dict:
    return {key: value for key, value in (json.loads(old) | changes).items() if value is not REMOVED}


def append(name: str, content: str | bytes) -> Spoil:
    return change(name, lambda old: old + (content if isinstance(content, bytes) else content.encode()))


def cut(name: str, keep: float) -> Spoil:
    """A file that ends too early: after a share of its bytes."""
    return change(name, lambda old: old[: int(len(old) * keep)])


def head(name: str, content: bytes) -> Spoil:
    """A file whose first bytes are others."""
    return change(name, lambda old: content + old[len(content) :])


def remove(*names: str) -> Spoil:
    return lambda work: [(work / name).unlink() for name in names]


def folder(name: str) -> Spoil:
    """A folder where a file should be."""
    return lambda work: _free(work / name).mkdir()


def link(name: str, target: str) -> Spoil:
    return lambda work: _free(work / name).symlink_to(target)


def loop(name: str) -> Spoil:
    """A link that leads to itself where a file or folder should be."""
    return link(name, Path(name).name)


def copy(source: str, target: str) -> Spoil:
    """A copy of a file or folder."""

    def spoil(work: Path) -> None:
        (shutil.copytree if (work / source).is_dir() else shutil.copy2)(work / source, _free(work / target))

    return spoil


def special_file(name: str) -> Spoil:
    """Something that is neither a file nor a folder, as a device node is; nothing can be written to it."""

    def spoil(work: Path) -> None:
        with contextlib.chdir(work), socket.socket(socket.AF_UNIX) as server:  # its path must be short
            server.bind(name)

    return spoil


def tensors(name: str, function: Callable[[dict], dict]) -> Spoil:
    """A safetensors file with the tensors that a function makes of its tensors."""
    from safetensors.torch import load, save

    return change(name, lambda old: save(function(load(old)), metadata={"format": "pt"}))


def without(key: str) -> Callable[[dict], dict]:
    return lambda found: {name: tensor for name, tensor in found.items() if name != key}


def sharded(work: Path) -> None:
    """The model's weights in two files with an index, as large models have them."""
    from safetensors.torch import load, save

    whole = work / "model/model.safetensors"
    found = load(whole.read_bytes())
    whole.unlink()
    names, weight_map = sorted(found), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        content = save({name: found[name] for name in part}, metadata={"format": "pt"})
        (work / "model" / file).write_bytes(content)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (work / "model/model.safetensors.index.json").write_text(json.dumps(index))


def index(function: Callable[[dict], object], name: str = "model/model.safetensors.index.json") -> Spoil:
    """An index whose weight map (tensor -> file) is another."""

    def spoil(work: Path) -> None:
        edit(name, weight_map=function(json.loads((work / name).read_text())["weight_map"]))(work)

    return spoil


def old_bin(work: Path) -> None:
    """Weights as torch saved them before 1.6: a bare pickle, whose loading cannot be mapped."""
    import torch
    from safetensors.torch import load

    whole = work / "model/model.safetensors"
    found = load(whole.read_bytes())
    whole.unlink()
    torch.save(found, work / "model/pytorch_model.bin", _use_new_zipfile_serialization=False)


def more_tokens(count: int) -> Spoil:
    """A tokenizer with more tokens than the model has embeddings; the template uses the last of them."""

    def spoil(work: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(work / "model", trust_remote_code=False)
        tokenizer.add_tokens([f"<extra {number}>" for number in range(count)])
        tokenizer.chat_template = f"<extra {count - 1}>" + tokenizer.chat_template
        tokenizer.save_pretrained(work / "model")

    return spoil


def remote_code(name: str, entry: Sequence[str], marker: Path) -> Spoil:
    """Code in the model's folder, named by `auto_map` in the JSON file `name`; running it makes `marker`."""
    references = {key: ["evil.Evil"] * 2 if key == "AutoTokenizer" else "evil.Evil" for key in entry}
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('it ran')\nclass Evil: pass\n"
    return all_of(edit(name, auto_map=references), write("model/evil.py", code))


def gguf(name: str, **changes) -> Spoil:
    """The workplace's model as a GGUF file; `changes` are those of `gguf_models.write_model`."""

    def spoil(work: Path) -> None:
        from gguf_models import write_model
        from transformers import AutoModelForCausalLM

        write_model(AutoModelForCausalLM.from_pretrained(work / "model"), work / name, **changes)

    return spoil
