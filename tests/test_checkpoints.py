"""What is written: atomic, shared between epochs, complete, and read back exactly."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hopscotch_common import checkpoints, scales
from hopscotch_common.checkpoints import folders
from hopscotch_common.checkpoints.__main__ import verify
from hopscotch_common.errors import InputError
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading.loader import load_model
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales.modeling_hopscotch import CODE

VALUES = 1 + 0.1 * torch.arange(16.0).view(4, 4)
SKIPPED = [0, 2]


def save(folder, base, **options):
    values = VALUES.clone()
    values[SKIPPED, 0] = 0
    checkpoints.save_checkpoint(folder, model_ref(str(base)), SKIPPED, values, {"epoch": 0}, **options)
    return values


def test_what_a_killed_writer_left_is_removed(tiny_folder, tmp_path):
    leftover = tmp_path / ".ckpt.tmp"
    leftover.mkdir()
    (leftover / "base.safetensors").write_text("half")
    save(tmp_path / "ckpt", tiny_folder())
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite", "mistral", "qwen3"])
def test_round_trip(tiny_folder, tmp_path, family):
    values = save(tmp_path / "ckpt", tiny_folder(family))
    model = checkpoints.load_checkpoint(tmp_path / "ckpt")
    assert torch.equal(scales.snapshot(model), values)
    checkpoints.check_replaceable(tmp_path / "ckpt")
    assert [i for i, layer in enumerate(model.model.layers) if layer.skip_attention] == SKIPPED
    searched = load_model(model_ref(str(tiny_folder(family))), device="cpu")
    scales.reset(searched, SKIPPED)
    scales.restore(searched, values)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, searched(ids).logits)


def test_weights_are_the_base_weights_without_skipped_attention(tiny_folder, tmp_path):
    save(tmp_path / "ckpt", tiny_folder())
    base = load_file(tiny_folder() / "model.safetensors")
    (shard,) = (tmp_path / "ckpt").glob("base-*.safetensors")
    kept = load_file(shard)
    gone = {
        key
        for key in base
        for layer in SKIPPED
        if key.startswith((f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.input_layernorm."))
    }
    assert len(gone) == 10 and kept.keys() == base.keys() - gone
    assert all(torch.equal(kept[key], base[key]) for key in kept)
    run = checkpoints.read_run(tmp_path / "ckpt")
    assert run["weights"]["parameters_removed"] == sum(base[key].numel() for key in gone)


def test_what_the_hubs_tools_leave_in_a_checkpoint_is_replaced_with_it(tiny_folder, tmp_path):
    save(tmp_path / "ckpt", tiny_folder())
    (tmp_path / "ckpt/.cache/huggingface").mkdir(parents=True)
    left = (".gitattributes", "._config.json", ".nfs0001", "Thumbs.db", "LICENSE", "README.md")
    for name in (".cache/huggingface/.gitignore", *left):
        (tmp_path / "ckpt" / name).write_text("*")
    save(tmp_path / "ckpt", tiny_folder())
    assert not {".cache", ".gitattributes", "LICENSE"} & {path.name for path in (tmp_path / "ckpt").iterdir()}


def test_what_a_config_says_of_generation_is_kept(tiny_folder, tmp_path):
    """Of a base without generation_config.json; also what transformers does not save, a temperature alone."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    (base / "generation_config.json").unlink()
    save(tmp_path / "nothing", base)
    assert not (tmp_path / "nothing" / "generation_config.json").exists()
    config = json.loads((base / "config.json").read_text())
    config |= {"max_length": 30, "repetition_penalty": 1.3, "temperature": 0.6, "eos_token_id": [2, 7]}
    (base / "config.json").write_text(json.dumps(config))
    save(tmp_path / "e0", base)
    save(tmp_path / "e1", base, share_with=tmp_path / "e0")
    export_checkpoint(tmp_path / "e1", "folded", tmp_path / "folded", device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(base).generation_config.to_dict()
    for name in ("e0", "e1", "folded"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert loaded.generation_config.to_dict() == expected | {"_from_model_config": None}


def test_packed_weights_are_counted_as_what_they_stand_for(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        rows, columns = tensors.pop(key).shape
        tensors[key.replace("weight", "qweight")] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    save(tmp_path / "quantised", base)
    save(tmp_path / "whole", tiny_folder())
    found, expected = (checkpoints.read_run(tmp_path / name)["weights"] for name in ("quantised", "whole"))
    assert found == expected


def test_epochs_share_weights_and_outlive_one_another(tiny_folder, tmp_path):
    first, second = tmp_path / "e0", tmp_path / "e1"
    save(first, tiny_folder())
    written = {path.name for path in first.iterdir()}
    for name in ("model-q8_0.gguf", "eval.json"):  # a user's, of this epoch alone
        (first / name).write_text("{}")
    (first / CODE.name).write_text("an earlier version's")
    save(second, tiny_folder(), share_with=first)
    assert (second / CODE.name).read_bytes() == CODE.read_bytes()
    shared = [path.name for path in second.iterdir() if path.stat().st_nlink > 1]
    assert shared == ["base-00001-of-00001.safetensors"]
    (second / "config.json").write_text("edited")
    checkpoints.load_checkpoint(first)
    (second / "config.json").write_bytes((first / "config.json").read_bytes())
    assert {path.name for path in second.iterdir()} == written
    for path in first.iterdir():
        path.unlink()
    assert checkpoints.load_checkpoint(second)(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_links_fall_back_to_copies(tiny_folder, tmp_path, monkeypatch, caplog):
    def no_links(*args):
        raise OSError("no links on this file system")

    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path / "e0", tiny_folder())
    save(tmp_path / "e1", tiny_folder(), share_with=tmp_path / "e0")
    (shard,) = (tmp_path / "e1").glob("base-*")
    assert shard.stat().st_nlink == 1
    assert "hard links" not in caplog.text  # so little is not worth a word
    monkeypatch.setattr(checkpoints, "MANY_BYTES", shard.stat().st_size - 1)
    for epoch in (2, 3):
        save(tmp_path / f"e{epoch}", tiny_folder(), share_with=tmp_path / "e1")
    message = f"{tmp_path}: no hard links here, so each epoch takes {shard.stat().st_size / 1e9:.2f} GB of"
    assert caplog.text.count("hard links") == caplog.text.count(message) == 1
    assert shard.read_bytes() == (tmp_path / "e0" / shard.name).read_bytes()


def test_a_process_without_this_project_loads_and_generates(tiny_folder, tmp_path):
    save(tmp_path / "ckpt", tiny_folder())
    expected = checkpoints.load_checkpoint(tmp_path / "ckpt").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, use_cache=False
    )
    code = """
import sys, torch
sys.modules["hopscotch_common"] = None  # it may be installed: any import of it fails
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
    sys.exit("loaded without trust_remote_code: that would be the wrong model")
except ValueError:
    pass
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False).tolist())
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ckpt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(expected.tolist())


def test_tokenizer_travels_along(tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    save(tmp_path / "ckpt", tiny_folder())
    there, here = (
        AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        for path in (tiny_folder(), tmp_path / "ckpt")
    )
    assert there.chat_template == here.chat_template and there("a b").input_ids == here("a b").input_ids


def test_only_what_a_checkpoint_needs_travels_along(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    needed = {"LICENSE.txt", "USE_POLICY.md", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model"}
    others = {"trainer_state.json", "train_config.json", "params.json", "image_config.json", "notes.txt"}
    for name in needed | others:
        (base / name).write_text('{"loss": NaN}')
    (base / "LICENSES").mkdir()
    (base / "LICENSES" / "MIT.txt").write_text("Yours.")
    save(tmp_path / "ckpt", base)
    found = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert found >= needed and not found & {*others, "LICENSES"}
    verify(tmp_path / "ckpt")
    checkpoints.check_replaceable(tmp_path / "ckpt")
    assert "license_link: LICENSE.txt" in (tmp_path / "ckpt" / "README.md").read_text()


def test_what_a_link_leads_to_is_not_published(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    (tmp_path / "token").write_text("private")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("0123" * 10)).write_text("of the hub's cache")
    (base / "LICENSE").symlink_to("../blobs/" + "0123" * 10)
    (base / "NOTICE").symlink_to("LICENSE")
    assert {"LICENSE", "NOTICE"} <= {path.name for path in folders.companions(base)}
    (base / "USE_POLICY.md").symlink_to("../token")
    with pytest.raises(InputError, match=r"USE_POLICY\.md: is a link to .*token, which would be copied into"):
        folders.companions(base)


def test_a_model_saved_again_wants_a_new_folder(tiny_folder, tmp_path):
    """In the old one its index would stay, by which vLLM would go on with the weights of before."""
    save(tmp_path / "c", tiny_folder())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", trust_remote_code=True)
    with pytest.raises(ValueError, match="holds a checkpoint with scales.safetensors; name a new folder"):
        model.save_pretrained(tmp_path / "c")
    verify(tmp_path / "c")
    with torch.no_grad():
        model.model.layers[0].s_scale_mlp.fill_(3.0)
    for _ in range(2):  # into a new folder, and into the same again
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ours = checkpoints.load_checkpoint(tmp_path / "again")
    assert again.model.layers[0].s_scale_mlp == ours.model.layers[0].s_scale_mlp == 3


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_a_cast_model_keeps_its_scales_exact(tiny_folder, tmp_path, cast):
    values = save(tmp_path / "c", tiny_folder())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c", trust_remote_code=True)
    getattr(model, cast)().save_pretrained(tmp_path / "cast")
    assert model.lm_head.weight.dtype.itemsize == 2
    assert torch.equal(checkpoints.load_scales(tmp_path / "cast")[0], values)


def test_the_code_is_uploaded_with_a_model(tiny_folder, tmp_path, monkeypatch):
    hub = Mock()
    for place in ("modeling_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{place}.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", Mock())
    model = load_model(model_ref(str(tiny_folder())), device="cpu")
    for _ in range(2):  # into a new folder, and into the same again
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
        sent = {operation.path_in_repo for operation in hub.create_commit.call_args.kwargs["operations"]}
        assert sent >= {"config.json", "model.safetensors", CODE.name}


def test_modeling_file_imports_nothing_of_the_project():
    source = CODE.read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    assert imports and all(line.split()[1].split(".")[0] in allowed for line in imports)
