"""What others send runs no code, leaves no folder, and reaches neither a shell nor a terminal unescaped."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from math import nan
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  makes its cache now, and not among what a test watches
import pytest
import torch
from bad_inputs.cases import COPY_AND_LOAD, points_to
from bad_inputs.makers import (
    Spoil,
    all_of,
    append,
    cut,
    edit,
    index,
    link,
    nothing,
    remote_code,
    remove,
    sharded,
    tensors,
    without,
    write,
)
from bad_inputs.models import ALL, KEY, WITH_WEIGHTS
from bad_inputs.running import Outcome, check_refused, check_untouched, run, snapshot
from bad_inputs.workplace import CHECKPOINT, GOOD
from conftest import ROOT
from safetensors.torch import load
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

pytest_plugins = ["bad_inputs.fixtures"]

CONTROL = {chr(code) for code in [*range(32), 127, *range(128, 160)]} - set("\n\r")  # bars return


def check_printable(outcome: Outcome) -> None:
    """Nothing that a terminal would obey."""
    for text in (outcome.out, outcome.err):
        assert not CONTROL & set(text), ascii(text)


# Code in weights ---------------------------------------------------------------------------------


class Payload:
    """Unpickling it makes a file, as it could do anything else."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def malicious_weights(work: Path, old: bool = False, name: str = "pytorch_model.bin") -> Path:
    """The model's weights as a pickle that holds a Payload, too; the file that it would make."""
    marker = work / "it-ran"
    found = load((work / "model/model.safetensors").read_bytes())
    (work / "model/model.safetensors").unlink()
    content = {"payload": Payload(marker)} | found
    torch.save(content, work / "model" / name, _use_new_zipfile_serialization=not old)
    if name == "weights.pkl":
        weight_map = json.dumps({"metadata": {}, "weight_map": {KEY: name}})
        (work / "model/model.safetensors.index.json").write_text(weight_map)
    return marker


def test_the_payload_is_armed(work):
    """Without `weights_only` it runs, so the tests below can fail."""
    marker = malicious_weights(work)
    torch.load(work / "model/pytorch_model.bin", weights_only=False)
    assert marker.exists()


PICKLES = {
    "zip": {},
    "of before torch 1.6": {"old": True},
    "named by the index": {"name": "weights.pkl"},
    "called safetensors": {"name": "model.safetensors"},
}


@pytest.mark.parametrize(
    "command, arguments, kind",
    [
        *((command, GOOD[command], kind) for command in WITH_WEIGHTS for kind in PICKLES),
        # as the original system wrote checkpoints: a stock config, and the scales among the weights
        ("export", ["model", *GOOD["export"][1:]], "zip"),
        ("checkpoints", ["verify", "model"], "zip"),
    ],
)
def test_a_malicious_pickle_is_refused_and_does_not_run(command, arguments, kind, work, capsys):
    marker = malicious_weights(work, **PICKLES[kind])
    before = snapshot(work)
    outcome = run(command, arguments, capsys)
    assert not marker.exists()
    name = PICKLES[kind].get("name", "pytorch_model.bin") if command in WITH_WEIGHTS else ""
    check_refused(outcome, points_to("model", name))
    check_untouched(before, snapshot(work))


# Code beside weights -----------------------------------------------------------------------------

MODEL, TOKENIZER = "model/config.json", "model/tokenizer_config.json"
REMOTE_CODE = {
    "tokenizer": (TOKENIZER, ["AutoTokenizer"], {}),
    "tokenizer of an unknown class": (TOKENIZER, ["AutoTokenizer"], {"tokenizer_class": "EvilTokenizer"}),
    "model": (MODEL, ["AutoConfig", "AutoModelForCausalLM", "AutoModel"], {}),
    "model of an unknown type": (
        MODEL,
        ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"],
        {"model_type": "evil"},
    ),
}


def plant_remote_code(work: Path, kind: str, monkeypatch) -> Path:
    """Code in the model's folder, and whatever would make transformers run it; the file that it makes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(work / "modules"))
    monkeypatch.syspath_prepend(work)
    marker = work / "it-ran"
    file, classes, changes = REMOTE_CODE[kind]
    all_of(edit(file, **changes), remote_code(file, classes, marker))(work)
    return marker


@pytest.mark.parametrize("kind", REMOTE_CODE)
def test_the_remote_code_is_armed(kind, work, monkeypatch):
    """With `trust_remote_code` it runs, so the tests below can fail."""
    marker = plant_remote_code(work, kind, monkeypatch)
    loader = AutoTokenizer if kind.startswith("tokenizer") else AutoConfig
    with pytest.raises(AttributeError):  # its class is good for nothing else
        loader.from_pretrained("model", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("kind", REMOTE_CODE)
@pytest.mark.parametrize("command", ALL)
def test_remote_code_does_not_run_whatever_is_typed(command, kind, work, monkeypatch, capsys):
    marker = plant_remote_code(work, kind, monkeypatch)
    outcome = run(command, GOOD[command], capsys, stdin="y\n" * 99)
    assert not marker.exists()
    assert "[y/N]" not in outcome.out + outcome.err
    if outcome.code != 0:  # what needs no code may go on without it
        check_refused(outcome, points_to("model"))


@pytest.mark.parametrize("file", ["modeling_hopscotch.py", "evil.py"])
def test_code_in_a_checkpoint_does_not_run_in_an_export(file, work, monkeypatch, capsys):
    """An export reads a checkpoint with this project's own code, and its tokenizer with none."""
    marker = plant_remote_code(work, "tokenizer of an unknown class", monkeypatch)
    write(f"{CHECKPOINT}/{file}", (work / "model/evil.py").read_text())(work)
    if file == "evil.py":
        write(f"{CHECKPOINT}/tokenizer_config.json", (work / "model/tokenizer_config.json").read_text())(work)
    outcome = run("export", GOOD["export"], capsys, stdin="y\n" * 99)
    assert not marker.exists() and "[y/N]" not in outcome.out + outcome.err
    if outcome.code != 0:
        check_refused(outcome, points_to(CHECKPOINT))


# Names -------------------------------------------------------------------------------------------

NAMES = ["\x1b[31mred\x1b[0m\x9b31m\x07", "$(touch pwned) `touch pwned` $\\frac$"]
ONE_BY_ONE = ["\x1b[31mred", "\x9b31mc1", "$(touch pwned)", "`touch pwned`", "$\\frac$", "\rover"]
DATA = ("--data_path", "data.jsonl", "--device", "cpu", "--batch_size", "3")
WITH_DEFAULTS = {  # the outputs carry the model's name
    "generate_model_gt_data": (
        *("--input_file", "prompts.jsonl", "--backend", "transformers", "--device", "cpu"),
        *("--max_tokens", "8", "--keep_truncated"),
    ),
    "process_gt_data": ("--input_file", "answers.jsonl", "--num_cpu_procs", "1"),
    "block_selection": (*DATA, "--plot", "losses.png"),
    "param_scale": (*DATA, "--blocks_to_skip", "1", "--num_epochs", "1", "--export", "folded"),
    "unscaled_ckpt": ("--blocks_to_skip", "1", "--export", "folded"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=ascii(name)) for name in [*NAMES, "two\nlines"]]
    + [pytest.param(name, id=f"only {ascii(name)}", marks=pytest.mark.slow) for name in ONE_BY_ONE],
)
@pytest.mark.parametrize("command", ALL)
def test_a_models_name_stays_where_it_belongs(command, name, work, capsys):
    """It is refused, or it names outputs in the working folder and is escaped where it is shown."""
    (work / "model").rename(work / name)
    before = snapshot(work.parent)
    outcome = run(command, [f"--model=./{name}", *WITH_DEFAULTS[command]], capsys)
    after = snapshot(work.parent)
    assert not outcome.error
    check_printable(outcome)
    assert name.isprintable() or name not in outcome.out + outcome.err
    made = after.keys() - before.keys()
    assert {path: after[path] for path in before} == before
    assert all(path.startswith("work/") for path in made)
    assert not [path for path in made if Path(path).name == "pwned"]
    if outcome.code != 0:
        check_refused(outcome, points_to("(model|name)"))
        check_untouched(before, after)
    else:
        assert made


@pytest.mark.parametrize(
    "changes", [{"skipped_blocks": ["\x1b]0;title\x07"]}, {"best_epoch": "\x1b[2J"}], ids=ascii
)
def test_the_table_shows_no_escapes(changes, work, capsys):
    edit("scaled/report.json", **changes)(work)
    check_refused(run("report", ["scaled"], capsys), points_to("scaled/report.json"))


def test_escapes_in_a_report_do_not_reach_the_terminal(work, capsys):
    edit("scaled/report.json", model="\x1b[2J\n", checkpoint="\x1b[2J\n")(work)
    outcome = run("report", ["scaled"], capsys)
    assert not outcome.error
    check_printable(outcome)


@pytest.mark.parametrize("command", WITH_WEIGHTS)
def test_escapes_in_the_name_of_a_tensor_do_not_reach_the_terminal(command, work, capsys):
    change = tensors("model/model.safetensors", lambda found: found | {"\x1b[2J\nx": found[KEY].clone()})
    change(work)
    outcome = run(command, GOOD[command], capsys)
    assert not outcome.error
    check_printable(outcome)


@pytest.mark.parametrize("target", ["../outside/model.safetensors", "/etc/passwd", "model/../../outside/x"])
@pytest.mark.parametrize("command", [*COPY_AND_LOAD, "export"])
def test_an_index_leads_nowhere_else(command, target, work, capsys):
    """Whoever hands on a model does not choose which files of this machine go into a checkpoint."""
    folder = "model" if command != "export" else CHECKPOINT
    (work / "outside").mkdir()
    shutil.copy("model/model.safetensors", "outside")
    sharded(work)
    index(lambda found: dict.fromkeys(found, target), f"{folder}/model.safetensors.index.json")(work)
    before = snapshot(work)
    check_refused(run(command, GOOD[command], capsys), points_to(folder, f"({target}|index)"))
    check_untouched(before, snapshot(work))


# The shell ---------------------------------------------------------------------------------------


def run_pipeline(model: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "pipeline.sh"), model],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
    )


@pytest.mark.parametrize(
    "model",
    ["x'; touch pwned; '$(touch pwned) `touch pwned`; touch pwned\ntouch pwned", "*", "-x"],
    ids=ascii,
)
def test_the_pipeline_hands_a_models_name_to_no_shell(model, work):
    before = snapshot(work)
    result = run_pipeline(model)
    check_untouched(before, snapshot(work))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("generate_model_gt_data.py: error: argument --model: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["it's a $(touch pwned)", '"; touch pwned; "', "-rf"])
def test_the_whole_pipeline_runs_on_a_folder_with_such_a_name(name, work, tiny_folder):
    # vLLM, where it is installed, needs heads of at least 32
    shutil.copytree(tiny_folder(hidden_size=64, num_attention_heads=2, num_key_value_heads=1), work / name)
    eos = list(range(4, 260, 4))  # so that a random model comes to an end
    write(f"{name}/generation_config.json", json.dumps({"eos_token_id": eos, "pad_token_id": 0}))(work)
    (work / "prompts.jsonl").rename(work / "gsm8k.jsonl")
    sizes = {"NUM_BLOCKS": "1", "NUM_EPOCHS": "1", "BATCH_SIZE": "3", "MAX_TOKENS": "64"}
    result = run_pipeline(f"./{name}", EXPORT="folded", **sizes)
    assert result.returncode == 0, result.stderr
    assert not list(work.rglob("pwned"))
    assert (work / f"scaled_{name}_ckpts" / f"{name}_scaled_folded/config.json").is_file()
    assert (work / f"unscaled_{name}_ckpts" / f"{name}_unscaled/config.json").is_file()
    for command, kind in zip(result.stdout.splitlines()[-2:], ("", "-folded"), strict=True):
        hf, upload, repository, folder, *_ = shlex.split(command)
        assert (hf, upload, repository) == ("hf", "upload", f"OWNER/{name}-hopscotch{kind}")
        assert "hopscotch" in (work / folder / "README.md").read_text()


# A checkpoint that is verified -------------------------------------------------------------------

CODE, CONFIG = f"{CHECKPOINT}/modeling_hopscotch.py", f"{CHECKPOINT}/config.json"
SCALES, BASE = f"{CHECKPOINT}/scales.safetensors", f"{CHECKPOINT}/base-00001-of-00001.safetensors"
INDEX = f"{CHECKPOINT}/model.safetensors.index.json"
SCALE = "model.layers.2.b_scale_mlp"


def code_elsewhere(work: Path) -> None:
    """The project's own file is there, and the config names another one."""
    shutil.copy(work / CODE, work / CHECKPOINT / "modeling_other.py")
    values = json.loads((work / CONFIG).read_text())
    auto_map = {key: name.replace("hopscotch.", "other.") for key, name in values["auto_map"].items()}
    edit(CONFIG, auto_map=auto_map)(work)


def code_of_a_repository(work: Path) -> None:
    """transformers takes what stands before "--" for a repository, or a folder, that holds the code."""
    values = json.loads((work / CONFIG).read_text())
    name = values["auto_map"]["AutoModelForCausalLM"]
    evil = {"AutoModelForCausalLM": f"{name}/evil--modeling_evil.{name.split('.')[1]}"}
    edit(CONFIG, auto_map=values["auto_map"] | evil)(work)


UNTRUE: dict[str, tuple[str, Spoil]] = {
    "code with a line more": (
        "modeling_hopscotch.py: is of another version .*, or was changed; verify with the version that made",
        append(CODE, "\nopen('it-ran', 'w')\n"),
    ),  # nor does it run
    "no code": ("modeling_hopscotch.py", remove(CODE)),
    "code behind a link": ("modeling_hopscotch.py", link(CODE, "../../elsewhere.py")),
    "code by another name": ("(auto_map|modeling_other)", code_elsewhere),
    "code of another repository": ("auto_map", code_of_a_repository),
    "a pipeline of another repository": (
        "custom_pipelines",
        edit(CONFIG, custom_pipelines={"text-generation": {"impl": "evil/repo--mod.Class", "pt": []}}),
    ),
    "an adapter": ("adapter_config.json", write(f"{CHECKPOINT}/adapter_config.json", "{}")),
    "code of a tokenizer": (
        "tokenizer_config.json",
        edit(f"{CHECKPOINT}/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    ),
    "code's shadow on macOS": (r"\._a\.py: left by macOS; remove", write(f"{CHECKPOINT}/._a.py", b"\0\xff")),
    "a config's shadow": (r"\._a_config\.json: left by", write(f"{CHECKPOINT}/._a_config.json", b"\0\xff")),
    "code besides": (r"evil\.py", write(f"{CHECKPOINT}/evil.py", "")),
    "a pickle, packed": (r"X\.PKL\.gz: is no part", write(f"{CHECKPOINT}/X.PKL.gz", "")),
    "another class for vLLM": (
        r"config\.json: architectures is \['LlamaForCausalLM'\]",
        edit(CONFIG, architectures=["LlamaForCausalLM"]),
    ),
    "weights of other names": ("transformers_weights", edit(CONFIG, transformers_weights="x.safetensors")),
    "code named by a list": ("config.json: auto_map: a JSON object", edit(CONFIG, auto_map=["a"])),
    "half a probe": (
        "hopscotch.json: tokenizer is no probe",
        edit(f"{CHECKPOINT}/hopscotch.json", tokenizer={"text": "a", "ids": 5}),
    ),
    "config is not JSON": ("config.json", write(CONFIG, "{")),
    "a scale is NaN": (
        f"b_scale_mlp of layer 2|{SCALE}",
        tensors(SCALES, lambda found: found | {SCALE: found[SCALE] * nan}),
    ),
    "no scales": ("scales.safetensors", remove(SCALES)),
    "a scale missing": ("b_scale_mlp", tensors(SCALES, without(SCALE))),
    "scales cut short": ("scales.safetensors", cut(SCALES, 0.5)),
    "a shard cut short": ("base-00001-of-00001.safetensors", cut(BASE, 0.7)),
    "a shard missing": ("base-00001-of-00001.safetensors", remove(BASE)),
    "a tensor missing": (KEY, tensors(BASE, without(KEY))),
    "a tensor of another shape": (KEY, tensors(BASE, lambda found: found | {KEY: found[KEY][:-1].clone()})),
    "a tensor that no index names": (KEY, index(without(KEY), INDEX)),
    "an index that names too much": ("odd", index(lambda all: all | {"odd": "scales.safetensors"}, INDEX)),
    "an index out of the folder": (r"\.\./", index(lambda found: found | {KEY: "../x.safetensors"}, INDEX)),
    "an index to the wrong shard": (KEY, index(lambda found: found | {KEY: "scales.safetensors"}, INDEX)),
    "an index that is not JSON": ("index.json", write(INDEX, "[")),
    "skips that the weights deny": (CHECKPOINT, edit(CONFIG, skipped_attention_blocks=[2])),
    "not a checkpoint": ("scaled", remove(CONFIG)),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_verify_refuses(name, work, capsys):
    message, spoil = UNTRUE[name]
    write("elsewhere.py", (work / CODE).read_bytes())(work)
    spoil(work)
    before = snapshot(work)
    check_refused(run("checkpoints", ["verify", CHECKPOINT], capsys), message)
    check_untouched(before, snapshot(work))


@pytest.mark.parametrize(
    "spoil",
    [
        nothing,
        remove(f"{CHECKPOINT}/training_state.adam"),
        lambda work: (work / CHECKPOINT / "training_state.adam").rename(
            work / CHECKPOINT / "training_state.safetensors"  # as it was named before
        ),
        write(f"{CHECKPOINT}/.cache/huggingface/download/config.json.metadata", "0123"),  # of `hf download`
    ],
)
def test_verify_confirms(spoil, work, capsys):
    spoil(work)
    assert run("unscaled_ckpt", GOOD["unscaled_ckpt"], capsys).code == 0
    for folder in (CHECKPOINT, "scaled/model_scaled_epoch_1", "new/model_unscaled"):
        before = snapshot(work)
        outcome = run("checkpoints", ["verify", folder], capsys)
        assert outcome.code == 0 and folder in outcome.out and outcome.err == "", outcome
        check_untouched(before, snapshot(work))


@pytest.mark.parametrize(
    "arguments", [[], ["verify"], ["verify", "none"], ["verify", "data.jsonl"], ["delete", "x"]]
)
def test_verify_names_what_is_wrong_with_its_arguments(arguments, work, capsys):
    check_refused(run("checkpoints", arguments, capsys), "verify|none|data.jsonl|delete|folder")


def test_verify_is_a_command(work):
    result = subprocess.run(
        [sys.executable, "-m", "hopscotch_common.checkpoints", "verify", CHECKPOINT],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and CHECKPOINT in result.stdout, result.stderr
