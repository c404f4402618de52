"""Weight files: which are read, and that all that a model needs are there."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import check_refused, stock_config
from safetensors.torch import load_file, save_file
from test_checkpoints import save
from transformers import AutoModelForCausalLM

import unscaled_ckpt
from hopscotch_common import checkpoints
from hopscotch_common.checkpoints.__main__ import verify
from hopscotch_common.errors import InputError
from hopscotch_common.loading import weights
from hopscotch_common.loading.loader import load_model, read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales.modeling_hopscotch import attention_blocks

EXPERTS = ["mixtral", "qwen3_moe", "qwen3_next", "phimoe", "olmoe", "granitemoehybrid"]
NORM = "model.norm.weight"


def rewrite(folder, change) -> None:
    """The single weight file of a model folder, as `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(dict(tensors)), folder / "model.safetensors", metadata={"format": "pt"})


def write_forms(folder, forms) -> None:
    """A model folder's weights in several forms; their final norms tell which is which."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, form in enumerate(forms):
        own = tensors | {NORM: torch.full_like(tensors[NORM], 1.0 + number)}
        name = f"{form}.of-index.{'bin' if 'bin' in form else 'safetensors'}" if "index" in form else form
        torch.save(own, folder / name) if "bin" in form else save_file(own, folder / name, {"format": "pt"})
        if "index" in form:
            (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(own, name)}))


@pytest.mark.parametrize("forms", list(itertools.combinations(weights.WEIGHT_NAMES, 2)), ids=" and ".join)
def test_of_several_weight_files_those_are_read_that_transformers_reads(tiny_folder, tmp_path, forms):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    write_forms(tmp_path / "model", forms)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.norm.weight
    ref = model_ref(str(tmp_path / "model"))
    weights.check_weights(ref.folder(), read_config(ref))
    (path,) = weights.weight_files(tmp_path / "model")
    assert torch.equal(weights.read_tensors(path)[NORM], stock)
    save(tmp_path / "ckpt", tmp_path / "model")
    assert torch.equal(checkpoints.load_checkpoint(tmp_path / "ckpt").model.norm.weight, stock)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_missing_weight_beside_experts_is_found(tiny_folder, tmp_path, family):
    base = tiny_folder(family)
    read = load_file(base / "model.safetensors")
    attention = next(key for key in sorted(read) if "self_attn" in key)
    expert = next(key for key in sorted(read) if "expert" in key or "input_linear" in key)
    config = read_config(model_ref(str(base)))
    block, values = attention_blocks(config)[-1], torch.ones(config.num_hidden_layers, 4)
    values[block, 0] = 0
    run = {"epoch": 0}
    checkpoints.save_checkpoint(tmp_path / "ckpt", model_ref(str(base)), [block], values, run)
    verify(tmp_path / "ckpt")
    for lost in (attention, expert):
        folder = tmp_path / f"without {lost}"
        shutil.copytree(base, folder)
        rewrite(folder, lambda tensors, lost=lost: {k: t for k, t in tensors.items() if k != lost})
        ref = model_ref(str(folder))
        with pytest.raises(InputError, match="missing|another shape"):
            weights.check_weights(folder, read_config(ref))
        checkpoint = tmp_path / f"checkpoint without {lost}"
        shutil.copytree(tmp_path / "ckpt", checkpoint)
        (shard,) = checkpoint.glob("base-*")
        kept = {k: t for k, t in load_file(shard).items() if k != lost}
        save_file(kept, shard, metadata={"format": "pt"})
        index = json.loads((checkpoint / weights.INDEX_FILE).read_text())
        del index["weight_map"][lost]
        (checkpoint / weights.INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(InputError, match="missing|another shape"):
            verify(checkpoint)
    folder = tmp_path / "with one more"
    shutil.copytree(base, folder)
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.odd": torch.ones(2)})
    with pytest.raises(InputError, match="odd is among its weights, but no part"):
        weights.check_weights(folder, read_config(model_ref(str(folder))))


def test_an_index_may_name_what_no_model_needs(tiny_folder, tmp_path):
    """As transformers has it; a weight that is needed is missed, and a checkpoint's index is exact."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    write_forms(base, [weights.INDEX_FILE])
    config = read_config(model_ref(str(base)))
    index, shard = base / weights.INDEX_FILE, next(base.glob("*.safetensors"))
    names = dict.fromkeys([*load_file(shard), "model.layers.3.self_attn.rotary_emb.inv_freq"], shard.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    weights.check_weights(base, config)
    save(tmp_path / "ckpt", base)
    verify(tmp_path / "ckpt")
    stock = AutoModelForCausalLM.from_pretrained(base).model.norm.weight
    assert torch.equal(checkpoints.load_checkpoint(tmp_path / "ckpt").model.norm.weight, stock)
    save_file({k: t for k, t in load_file(shard).items() if k != NORM}, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match="norm.weight is missing from its weights"):
        weights.check_weights(base, config)
    named = json.loads((tmp_path / "ckpt" / weights.INDEX_FILE).read_text())
    named["weight_map"]["model.odd"] = "scales.safetensors"
    (tmp_path / "ckpt" / weights.INDEX_FILE).write_text(json.dumps(named))
    with pytest.raises(InputError, match="model.odd is not in scales.safetensors"):
        checkpoints.read_checkpoint(tmp_path / "ckpt")
    assert not checkpoints.has_weights(tmp_path / "ckpt")


def test_an_adapter_beside_the_weights_is_refused(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text('{"peft_type": "LORA"}')
    arguments = ["--model", str(tmp_path / "model"), "--blocks_to_skip", "1"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    check_refused(unscaled_ckpt, arguments, "adapter_config.json: an adapter .*merge", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_without_read_permission_is_named(tiny_folder, tmp_path, capsys, monkeypatch, name):
    access = os.access  # a stand-in: root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name and access(path, mode))
    arguments = ["--model", str(tiny_folder()), "--blocks_to_skip", "1"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    check_refused(unscaled_ckpt, arguments, f"{name}: no permission to read it; make it readable", capsys)


def test_the_weights_of_a_model_without_a_head_are_refused(tiny_folder, tmp_path):
    """transformers would take them, but a checkpoint's weights have the names that they have here."""
    shutil.copytree(tiny_folder(tie_word_embeddings=True), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {k.removeprefix("model."): t for k, t in tensors.items()})
    with pytest.raises(InputError, match="layers.0.* of a model without a head"):
        weights.check_weights(tmp_path / "model", stock_config("llama", tie_word_embeddings=True))


def test_weight_files_of_other_names_are_refused(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(
        json.dumps(values | {"transformers_weights": "other.safetensors"})
    )
    arguments = ["--model", str(tmp_path / "model"), "--blocks_to_skip", "1"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    check_refused(unscaled_ckpt, arguments, "transformers_weights", capsys)


def test_tied_weights_of_a_bin_file(tiny_folder, tmp_path):
    base = tiny_folder(tie_word_embeddings=True)
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
    arguments = ["--model", str(tmp_path / "model"), "--blocks_to_skip", "1"]
    assert unscaled_ckpt.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    ids = torch.tensor([[5, 6, 7]])
    skipped = load_model(model_ref(str(base)))
    skipped.model.layers[1].skip_attention = True
    found = checkpoints.load_checkpoint(tmp_path / "out/model_unscaled")
    assert torch.equal(found(ids).logits, skipped(ids).logits)


def test_a_config_without_a_dtype_is_exported_in_that_of_its_weights(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder(), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: {k: t.bfloat16() for k, t in tensors.items()})
    values = json.loads((tmp_path / "model/config.json").read_text())
    values = {name: value for name, value in values.items() if "dtype" not in name}
    (tmp_path / "model/config.json").write_text(json.dumps(values))
    arguments = ["--model", str(tmp_path / "model"), "--blocks_to_skip", "1", "--export", "nemotron_nas"]
    assert unscaled_ckpt.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/model_unscaled_nemotron_nas/config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_a_linked_folder_goes_by_the_links_name(tiny_folder, tmp_path):
    (tmp_path / "qwen05").symlink_to(tiny_folder(), target_is_directory=True)
    assert model_ref(str(tmp_path / "qwen05")).name == "qwen05"
    assert model_ref(str(tmp_path / "qwen05") + "/.").name == "qwen05"


def test_capped_attention_never_runs_in_sdpa(tiny_folder, capsys):
    """sdpa leaves the cap out; eager and this project's `auto` have it."""
    folder = tiny_folder("gemma2")
    ids = torch.arange(3, 40)[None]
    stock = {
        kernel: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel)(ids).logits
        for kernel in ("eager", "sdpa")
    }
    assert not torch.allclose(stock["eager"], stock["sdpa"], atol=1e-3)
    assert torch.equal(load_model(model_ref(str(folder)))(ids).logits, stock["eager"])
    with pytest.raises(InputError, match="caps its attention"):
        weights.check_weights(folder, stock_config("gemma2"), "sdpa")
