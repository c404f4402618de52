"""A small GGUF file, made here as llama.cpp's converter lays it out, rewritten to skip blocks.

That llama.cpp computes the same with it is checked by benchmarks/gguf_llama_cpp.py.
"""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, stock_config
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from gguf_models import deci_logits, random_model, write_model
from transformers import AutoModelForCausalLM

from hopscotch_common import checkpoints, scales
from hopscotch_common.errors import InputError
from hopscotch_common.export import __main__ as export
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.export.gguf import rewrite_gguf
from hopscotch_common.loading.loader import hopscotch_config
from hopscotch_common.loading.models import ModelRef

WIDTH = dict(intermediate_size=64)  # rows that blocks of 32 divide
ATTENTION = ("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")
BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


def make_checkpoint(folder, family="llama", skipped=(1, 3), **changes):
    """As much of a checkpoint as is read: its config."""
    hopscotch_config(stock_config(family, **(WIDTH | changes)), skipped).save_pretrained(folder)
    return folder


def make_folded(path, family="llama", zero=(1, 3), kind="F32", head_dim=8, **extra):
    """A GGUF file of random weights in which the attention of the blocks `zero` adds nothing."""
    model = random_model(AutoModelForCausalLM, stock_config(family, **WIDTH, head_dim=head_dim))
    for layer in zero:
        model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    extra = {"rope_freqs.weight": torch.ones(head_dim // 2), "custom_alignment": 64} | extra
    return write_model(model, path, kind, add_bos_token=False, **extra)


@pytest.fixture
def pair(tmp_path):
    """A checkpoint's folder, its folded GGUF file, and a path for the rewritten one."""
    folded = make_folded(tmp_path / "folded.gguf")
    return make_checkpoint(tmp_path / "ck"), folded, tmp_path / "skipped.gguf"


def tensors(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def metadata(path):
    """key -> (types, value), without the counts that every reader adds."""
    fields = GGUFReader(path).fields.values()
    return {f.name: (f.types, f.contents()) for f in fields if not f.name.startswith("GGUF.")}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0"])
def test_skipped_blocks_have_no_heads_and_no_tensors_and_all_else_stays(tmp_path, kind):
    checkpoint, folded = make_checkpoint(tmp_path / "ck"), make_folded(tmp_path / "folded.gguf", kind=kind)
    output = tmp_path / "new" / "skipped.gguf"
    report = rewrite_gguf(checkpoint, folded, output)

    before, after = tensors(folded), tensors(output)
    assert set(before) - set(after) == {f"blk.{i}.{name}" for i in (1, 3) for name in ATTENTION}
    assert not set(after) - set(before)
    for name, tensor in after.items():
        assert tensor.tensor_type == before[name].tensor_type and tensor.data_offset % 64 == 0
        assert list(tensor.shape) == list(before[name].shape)
        assert tensor.data.tobytes() == before[name].data.tobytes(), name

    expected = {key.replace("llama.", "deci."): value for key, value in metadata(folded).items()}
    array = [GGUFValueType.ARRAY, GGUFValueType.UINT32]
    expected |= {
        "general.architecture": ([GGUFValueType.STRING], "deci"),
        "deci.attention.head_count": (array, [4, 0, 4, 0]),
        "deci.attention.head_count_kv": (array, [2, 0, 2, 0]),
        "deci.feed_forward_length": (array, [64, 64, 64, 64]),
    }
    assert metadata(output) == expected
    assert expected["tokenizer.ggml.add_bos_token"] == ([GGUFValueType.BOOL], False)

    assert report["skipped_blocks"] == [1, 3]
    assert (report["kv_cache_blocks"], report["kv_cache_blocks_removed"]) == (2, 2)
    assert report["tensors_removed"] == 2 * len(ATTENTION)
    assert report["bytes_saved"] == folded.stat().st_size - output.stat().st_size > 0
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "kept"),
    [
        (8, [0, 2, 0, 2], {"attn_norm.weight", "attn_output.weight"}),  # a zero matrix, and no KV cache
        (16, [2, 2, 0, 2], set(ATTENTION)),  # all, where the output matrix is not square
    ],
)
def test_block_0_keeps_attention(tmp_path, head_dim, kv_heads, kept):
    checkpoint = make_checkpoint(tmp_path / "ck", skipped=[0, 2], head_dim=head_dim)
    folded = make_folded(tmp_path / "folded.gguf", zero=[0, 2], head_dim=head_dim)
    report = rewrite_gguf(checkpoint, folded, tmp_path / "skipped.gguf")
    values = metadata(tmp_path / "skipped.gguf")
    assert values["deci.attention.head_count"][1] == [4, 4, 0, 4]
    assert values["deci.attention.head_count_kv"][1] == kv_heads
    names = tensors(tmp_path / "skipped.gguf")
    assert {name for name in names if name.startswith("blk.0.attn")} == {f"blk.0.{name}" for name in kept}
    assert report["kv_cache_blocks"] == sum(map(bool, kv_heads))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_qwen2_gets_the_rotary_order_of_deci(tmp_path, kind):
    checkpoint = make_checkpoint(tmp_path / "ck", "qwen2")
    folded = make_folded(tmp_path / "folded.gguf", "qwen2", kind=kind)
    rewrite_gguf(checkpoint, folded, tmp_path / "skipped.gguf")
    before, after = tensors(folded), tensors(tmp_path / "skipped.gguf")
    assert set(before) - set(after) == {f"blk.{i}.{name}" for i in (1, 3) for name in (*ATTENTION, *BIASES)}
    reordered = {f"blk.{i}.attn_{m}.{part}" for i in (0, 2) for m in "qk" for part in ("weight", "bias")}
    for name, tensor in after.items():
        old = dequantize(before[name].data, before[name].tensor_type)
        new = dequantize(tensor.data, tensor.tensor_type)
        if name in reordered:  # dimensions i and i + 4 of each head of 8 become neighbours
            for row, source in enumerate([0, 4, 1, 5, 2, 6, 3, 7]):
                np.testing.assert_array_equal(new[row::8], old[source::8], name)
        else:
            np.testing.assert_array_equal(new, old, name)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(
    ("family", "skipped", "kind", "tolerance"),
    [("llama", [0, 2], "F32", 1e-4), ("qwen2", [1, 3], "F32", 1e-4), ("mistral", [1], "Q8_0", 0.05)],
)
def test_llama_cpp_would_compute_what_the_checkpoint_does(tmp_path, family, skipped, kind, tolerance, maps):
    """All the way: a checkpoint with scales a channel, its folded export, a GGUF of that, rewritten."""
    sizes = WIDTH | dict(hidden_size=64) | (dict(layer_types=None) if family == "qwen2" else {})
    random_model(AutoModelForCausalLM, stock_config(family, **sizes)).save_pretrained(tmp_path / "base")
    values = torch.empty(4, 2 * 64 + 2).uniform_(0.8, 1.2, generator=torch.Generator().manual_seed(0))
    values[0, -1] = -1.1  # s_mlp: the stream changes its sign
    shapes = {"down": (3, 64), "up": (64, 3)}
    placed = {
        f"model.layers.{i}.replacement_{name}": 0.3 * torch.randn(shape)
        for i in skipped
        for name, shape in shapes.items()
    }
    if not maps:
        scales.columns(values)["b_scale_attn"][skipped] = 0.0
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = ModelRef("tiny", str(tmp_path / "base"))
    checkpoint, folded = tmp_path / "checkpoint", tmp_path / "folded"
    checkpoints.save_checkpoint(checkpoint, base, skipped, values, {}, maps=placed if maps else None)
    export_checkpoint(checkpoint, "folded", folded, device="cpu", without_maps=maps)
    write_model(AutoModelForCausalLM.from_pretrained(folded), tmp_path / "folded.gguf", kind)
    report = rewrite_gguf(checkpoint, tmp_path / "folded.gguf", tmp_path / "skipped.gguf")
    assert (report["maps"], report["kv_cache_blocks"]) == (len(skipped) * maps, 4 - len(skipped))
    ids = [5, 99, 7, 42, 250, 8, 8, 130]
    with torch.inference_mode():
        expected = checkpoints.load_checkpoint(checkpoint)(torch.tensor([ids])).logits[0]
    error = (deci_logits(tmp_path / "skipped.gguf", ids) - expected).norm() / expected.norm()
    assert error < tolerance
    if maps and kind == "F32":
        values[2, -1] = 1.01  # another epoch's
        checkpoints.save_checkpoint(checkpoint, base, skipped, values, {}, maps=placed)
        with pytest.raises(InputError, match="blk.3.ffn_down.weight has other scales in it"):
            rewrite_gguf(checkpoint, tmp_path / "folded.gguf", tmp_path / "mixed.gguf")
    if maps:
        stored = {
            tensors(tmp_path / "skipped.gguf")[f"blk.{i}.attn_output.weight"].tensor_type.name
            for i in skipped
        }
        assert stored == {kind} and not (folded / "README.md").exists()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_llama_shaped_file_will_do_for_other_families(tmp_path, family):
    checkpoint, folded = make_checkpoint(tmp_path / "ck", family), make_folded(tmp_path / "folded.gguf")
    rewrite_gguf(checkpoint, folded, tmp_path / "skipped.gguf")
    query, skipped = "blk.0.attn_q.weight", tensors(tmp_path / "skipped.gguf")
    assert skipped[query].data.tobytes() == tensors(folded)[query].data.tobytes()


@pytest.mark.parametrize(
    ("checkpoint", "folded", "message"),
    [
        ({}, {"block_count": 5}, "llama.block_count is 5, but the checkpoint has 4"),
        ({}, {"embedding_length": 64}, "llama.embedding_length is 64"),
        ({}, {"head_count_kv": 1}, "llama.attention.head_count_kv is 1"),
        ({}, {"head_count_kv": [2, 0, 2, 0]}, "llama.attention.head_count_kv is \\[2, 0, 2, 0\\]"),
        ({}, {"architecture": "gemma"}, "architecture 'gemma', which no GGUF of a llama checkpoint has"),
        ({}, {"architecture": "deci"}, "is a rewritten GGUF already"),
        ({"family": "granite"}, {"architecture": "granite"}, "holds no layers of granite"),
        ({"family": "qwen3"}, {"architecture": "qwen3"}, "holds no layers of qwen3"),
        ({}, {"zero": [1]}, "blk.3.attn_output is not zero, but block 3 is skipped"),
        ({}, {"zero": [1], "kind": "Q4_0"}, "blk.3.attn_output is not zero, but block 3 is skipped"),
        ({}, {"zero": [1, 2, 3]}, "blk.2.attn_output.weight is zero, but block 2 is not skipped"),
        ({"skipped": []}, {}, "skips no attention block"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, checkpoint, folded, message):
    checkpoint = make_checkpoint(tmp_path / "ck", **checkpoint)
    folded = make_folded(tmp_path / "folded.gguf", **folded)
    with pytest.raises(InputError, match=message) as caught:
        rewrite_gguf(checkpoint, folded, tmp_path / "skipped.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "folded.gguf"]


def test_a_failure_on_the_way_leaves_nothing_behind_and_the_old_file_alone(pair, monkeypatch):
    checkpoint, folded, output = pair
    output.write_text("GGUF, an earlier one")

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    with pytest.raises(OSError, match="no space"):
        rewrite_gguf(checkpoint, folded, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["ck", "folded.gguf", "skipped.gguf"]
    assert output.read_text() == "GGUF, an earlier one"


def test_command_line(pair, capsys):
    checkpoint, folded, output = map(str, pair)
    arguments = [checkpoint, "--format", "gguf", "--output", output, "--from"]
    assert export.main([*arguments, folded]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache_blocks"] == 2
    assert export.main([*arguments, "absent.gguf"]) == 2
    assert "no such file" in capsys.readouterr().err
