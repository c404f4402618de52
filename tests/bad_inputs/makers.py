"""What makes input bad: each function returns one that spoils a workplace."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

Spoil = Callable[[Path], None]
REMOVED = object()  # in `edit`: the key is taken out


def nothing(work: Path) -> None:
    """Leave the workplace as it is: the command line itself is bad."""


def all_of(*spoils: Spoil) -> Spoil:
    def spoil(work: Path) -> None:
        for one in spoils:
            one(work)

    return spoil


def write(name: str, content: str | bytes) -> Spoil:
    """A file of one's own, or another one in its place."""

    def spoil(work: Path) -> None:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # epochs share files by hard links
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def line(name: str, number: int, content: str | bytes | dict) -> Spoil:
    """Line `number` (from 1) of a file, replaced."""

    def spoil(work: Path) -> None:
        lines = (work / name).read_bytes().splitlines(keepends=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        lines[number - 1] = (text if isinstance(text, bytes) else text.encode()) + b"\n"
        (work / name).write_bytes(b"".join(lines))

    return spoil


def edit_line(name: str, number: int, **changes) -> Spoil:
    """Some keys of the JSON record on line `number` of a file, replaced."""

    def spoil(work: Path) -> None:
        record = json.loads((work / name).read_bytes().splitlines()[number - 1])
        line(name, number, _changed(record, changes))(work)

    return spoil


def append(name: str, content: str | bytes) -> Spoil:
    def spoil(work: Path) -> None:
        added = content if isinstance(content, bytes) else content.encode()
        write(name, (work / name).read_bytes() + added)(work)

    return spoil


def edit(name: str, **changes) -> Spoil:
    """Some keys of a JSON file, replaced or REMOVED."""

    def spoil(work: Path) -> None:
        values = _changed(json.loads((work / name).read_text()), changes)
        write(name, json.dumps(values, indent=2))(work)

    return spoil


def _changed(values: dict, changes: dict) -> dict:
    merged = {**values, **changes}
    return {key: value for key, value in merged.items() if value is not REMOVED}


def cut(name: str, keep: float) -> Spoil:
    """A file that ends too early: after a share of its bytes."""

    def spoil(work: Path) -> None:
        content = (work / name).read_bytes()
        write(name, content[: int(len(content) * keep)])(work)

    return spoil


def head(name: str, content: bytes) -> Spoil:
    """A file whose first bytes are others."""

    def spoil(work: Path) -> None:
        write(name, content + (work / name).read_bytes()[len(content) :])(work)

    return spoil


def remove(*names: str) -> Spoil:
    def spoil(work: Path) -> None:
        for name in names:
            (work / name).unlink()

    return spoil


def folder(name: str) -> Spoil:
    """A folder where a file should be."""

    def spoil(work: Path) -> None:
        (work / name).unlink(missing_ok=True)
        (work / name).mkdir(parents=True)

    return spoil


def loop(name: str) -> Spoil:
    """A link that leads to itself where a file or folder should be."""

    def spoil(work: Path) -> None:
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(Path(name).name)

    return spoil


def link(name: str, target: str) -> Spoil:
    def spoil(work: Path) -> None:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(target)

    return spoil


def copy(source: str, target: str) -> Spoil:
    def spoil(work: Path) -> None:
        (work / target).parent.mkdir(parents=True, exist_ok=True)
        if (work / source).is_dir():
            shutil.copytree(work / source, work / target)
        else:
            shutil.copy2(work / source, work / target)

    return spoil


def special_file(name: str) -> Spoil:
    """Something that is neither a file nor a folder, as a device node is; nothing can be written to it."""

    def spoil(work: Path) -> None:
        earlier = os.getcwd()
        os.chdir(work)  # the path of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        finally:
            os.chdir(earlier)

    return spoil


def tensors(name: str, change: Callable[[dict], dict]) -> Spoil:
    """A safetensors file with other tensors."""

    def spoil(work: Path) -> None:
        from safetensors.torch import load, save

        content = save(change(load((work / name).read_bytes())), metadata={"format": "pt"})
        write(name, content)(work)

    return spoil


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


def index(change: Callable[[dict], object], name: str = "model/model.safetensors.index.json") -> Spoil:
    """An index whose weight map (tensor -> file) is another."""

    def spoil(work: Path) -> None:
        content = json.loads((work / name).read_text())
        write(name, json.dumps(content | {"weight_map": change(content["weight_map"])}))(work)

    return spoil


def old_bin(work: Path) -> None:
    """Weights as torch saved them before 1.6: a bare pickle, whose loading cannot be mapped."""
    import torch
    from safetensors.torch import load

    whole = work / "model/model.safetensors"
    found = load(whole.read_bytes())
    whole.unlink()
    torch.save(found, work / "model/pytorch_model.bin", _use_new_zipfile_serialization=False)


def template(text: str) -> Spoil:
    """Another chat template."""
    return write("model/chat_template.jinja", text)


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

    def spoil(work: Path) -> None:
        values = json.loads((work / name).read_text())
        values["auto_map"] = {key: _reference(key) for key in entry}
        write(name, json.dumps(values))(work)
        code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('it ran')\n"
        code += "class Evil: pass\n"
        (work / "model/evil.py").write_text(code)

    return spoil


def _reference(key: str):
    return ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"


def gguf(name: str, **changes) -> Spoil:
    """The workplace's model as a GGUF file; `changes` are those of `gguf_models.write_model`."""

    def spoil(work: Path) -> None:
        from gguf_models import write_model
        from transformers import AutoModelForCausalLM

        write_model(AutoModelForCausalLM.from_pretrained(work / "model"), work / name, **changes)

    return spoil
