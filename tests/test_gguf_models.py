"""`--model file.gguf`: unpacked without loss, once, and never mixed up with another file."""

import dataclasses
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import stock_config
from gguf import GGUFReader, RopeScalingType
from gguf.quants import dequantize
from gguf_models import add_tokenizer, random_model, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import block_selection
import generate_model_gt_data
import param_scale
import process_gt_data
import unscaled_ckpt
from hopscotch_common.errors import InputError
from hopscotch_common.loading import gguf_files
from hopscotch_common.loading.loader import load_model, read_config
from hopscotch_common.loading.models import ModelRef, model_ref
from hopscotch_common.loading.tokenization import load_tokenizer, stop_token_ids
from hopscotch_common.scales.modeling_hopscotch import FAMILIES

WIDE = dict(intermediate_size=64)  # rows that blocks of 32 divide
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
AS_27B = dict(
    num_hidden_layers=46,
    layer_types=["sliding_attention", "full_attention"] * 23,
    num_attention_heads=2,
    query_pre_attn_scalar=16,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, a new one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hopscotch"


def tiny(family="llama", **changes):
    return random_model(AutoModelForCausalLM, stock_config(family, **(WIDE | changes)))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
        ("qwen2", {}),
        ("qwen3", dict(head_dim=128)),
        ("gemma2", dict(final_logit_softcapping=3.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8)),
        ("gemma2", AS_27B),
        ("phi3", dict(sliding_window=4)),
        ("starcoder2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e5), vocab_size=261)),
    ],
)
def test_the_unpacked_model_is_the_original(tmp_path, family, changes):
    model = tiny(family, **changes)
    names = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    extra = {name: value for name in names if (value := getattr(model.config, name, None)) is not None}
    extra |= dict(unk_token_id=0) if family == "gemma2" else {}
    ref = exactly(write_model(model, tmp_path / f"my.{family}.gguf", **extra))
    assert ref.name == f"my.{family}" and read_config(ref).model_type == family
    unpacked = AutoModelForCausalLM.from_pretrained(ref.folder())
    if FAMILIES[family].caps_attention:  # sdpa would leave the cap out
        model.set_attn_implementation("eager")
        unpacked.set_attn_implementation("eager")
    torch.testing.assert_close(logits(unpacked), logits(model), rtol=1e-5, atol=1e-5)
    assert unpacked.dtype == torch.float32
    torch.testing.assert_close(logits(load_model(ref, device="cpu")), logits(model), rtol=1e-5, atol=1e-5)
    prompt = [{"role": "user", "content": "the ö"}]
    ids = load_tokenizer(ref).apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert ids[0] == 3 and 2 in ids and 260 in ids  # <|im_start|>, <|im_end|>, and the merged "th"
    assert json.loads((ref.folder() / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizer_is_that_of_the_file(tmp_path):
    """Digits split off as smollm does it, a text begun as the file says, and an answer ended at the end of a
    turn, too; its neighbours change nothing. A stranger reads the folder alike."""
    special = dict(add_bos_token=True, eot_token_id=5)
    path = write_model(tiny(), tmp_path / "model.gguf", tokenizer_pre="smollm", **special)
    (tmp_path / "tokenizer.json").write_text("{}")
    ref = model_ref(str(path))
    tokenizer = load_tokenizer(ref)
    assert stop_token_ids(ref.folder(), tokenizer) == {2, 5}
    assert parts(tokenizer, "\n\n12  3") == ["ĊĊ", "1", "2", "ĠĠ", "3"]  # as in SmolLM2's own tokenizer.json
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id
    stranger = AutoTokenizer.from_pretrained(ref.folder())
    assert stranger("12 the").input_ids == tokenizer("12 the").input_ids
    plain = load_tokenizer(model_ref(str(write_model(tiny(), tmp_path / "plain.gguf"))))
    assert parts(plain, "\n\n12  3") == ["Ċ", "Ċ", "12", "Ġ", "Ġ3"]
    assert plain("the").input_ids[0] != plain.bos_token_id


@pytest.mark.parametrize(
    ("template", "fields", "added"),
    [
        ("{{ messages[0].content }}", dict(add_bos_token=True), 1),
        ("{{ messages[0].content }}", dict(add_bos_token=False), 0),
        ("{{ messages[0].content }}", dict(), 0),
        ("{{ messages[0].content }}", dict(tokenizer_pre="llama-bpe"), 1),
        ("{{ bos_token }}{{ messages[0].content }}", dict(add_bos_token=True), 0),
    ],
)
def test_a_chat_begins_as_the_file_says(tmp_path, template, fields, added):
    """llama.cpp puts the token before a chat, too, and some files' templates therefore leave it out."""
    path = write_model(tiny(), tmp_path / "model.gguf", template=template, **fields)
    tokenizer = load_tokenizer(model_ref(str(path)))
    messages = [{"role": "user", "content": "the"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.bos_token * added + plain
    begins = fields.get("add_bos_token", "tokenizer_pre" in fields)  # plain text, too
    assert (tokenizer("the").input_ids[0] == tokenizer.bos_token_id) == begins


def test_a_checkpoint_stops_where_the_files_template_ends_a_turn(tmp_path):
    """Phi-3's files name the end of a text only; what ends a turn stands in the template alone."""
    template = "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"
    folder = model_ref(str(write_model(tiny(), tmp_path / "model.gguf", template=template))).folder()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_all_that_ends_an_answer_in_llama_cpp_does_here(tmp_path):
    def tokens(writer):
        add_tokenizer(writer, ["<|endoftext|>", "<|eom_id|>", "<|image|>"], eom_token_id=262)

    folder = model_ref(str(write_model(tiny(), tmp_path / "model.gguf", tokens=tokens))).folder()
    assert set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == {2, 261, 262}


@pytest.mark.parametrize(("prefix", "read"), [(None, "▁hi"), (True, "▁hi"), (False, "hi")])
def test_sentencepiece_reads_as_llama_cpp_does(tmp_path, prefix, read):
    """Which puts a space before what follows a special token, too."""
    pieces = [*"▁hi[]", "hi", "▁h", "▁hi"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = write_model(tiny(), tmp_path / "model.gguf", template=template, tokens=add)
    ref = model_ref(str(path))
    for tokenizer in (load_tokenizer(ref), AutoTokenizer.from_pretrained(ref.folder())):
        assert tokenizer.tokenize("hi</s>hi") == [read, "</s>", read]
        assert tokenizer.decode(tokenizer.encode("hi[hi]"), skip_special_tokens=True) == "hi[hi]"


def test_a_control_token_that_is_read_as_letters_is_refused(tmp_path):
    template = "{% for m in messages %}<｜User｜>{{ m.content }}<|im_end|>{% endfor %}"

    def tokens(writer):
        add_tokenizer(writer, ["<｜User｜>"])

    path = write_model(tiny(), tmp_path / "model.gguf", template=template, tokens=tokens)
    with pytest.raises(
        InputError, match=r"model.gguf: transformers reads its token 261, '<｜User｜>', as \["
    ):
        model_ref(str(path)).folder()


def parts(tokenizer, text: str) -> list[str]:
    """What merges can't cross."""
    return [part for part, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("family, kind", [("llama", "Q4_0"), ("qwen2", "Q8_0"), ("llama", "F16")])
def test_quantised_weights_are_what_the_blocks_say(tmp_path, monkeypatch, family, kind):
    monkeypatch.setattr(gguf_files, "DECODED_AT_ONCE", 1000)  # a part of a matrix, another in the last
    path = write_model(tiny(family), tmp_path / "q.gguf", kind)
    folder = exactly(path).folder()
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, key in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        tensor = stored[f"blk.2.{name}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weights[f"model.layers.2.{key}.weight"], expected)
    options = dict(dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    unquantised = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="q.gguf", **options)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(unquantised))
    in_16_bits = AutoModelForCausalLM.from_pretrained(model_ref(str(path)).folder())
    assert in_16_bits.dtype == torch.bfloat16
    expected = unquantised.to(torch.bfloat16).state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in in_16_bits.state_dict().items())


def exactly(path) -> ModelRef:
    """A GGUF's model with every weight as it is there, as `--dtype float32` asks for it."""
    return dataclasses.replace(model_ref(str(path)), float32=True)


def test_a_large_file_becomes_several(tmp_path, monkeypatch):
    """With an index, and in memory never more than those that are not complete."""
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", 20_000)
    path = write_model(tiny(), tmp_path / "large.gguf", "F32")
    parser = unscaled_ckpt.build_parser()
    common = ["--model", str(path), "--blocks_to_skip", "1"]
    assert parser.parse_args([*common, "--dtype", "float32"]).model == exactly(path)
    assert parser.parse_args(common).model == model_ref(str(path)) != exactly(path)
    whole = exactly(path).folder()
    assert len(list(whole.glob("model-*-of-*.safetensors"))) > 2
    unpacked = AutoModelForCausalLM.from_pretrained(whole)
    assert all(map(torch.equal, unpacked.parameters(), tiny().parameters()))


def rope_divisors(rope) -> torch.Tensor:
    """rope_freqs.weight, spelt out: what each frequency of a head of 8 is divided by."""
    wavelengths = [2 * torch.pi * rope["rope_theta"] ** (i / 8) for i in range(0, 8, 2)]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, divisors = rope["original_max_position_embeddings"], []
    for wavelength in wavelengths:
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(divisors)


def test_llama_3s_rotary_scaling_survives(tmp_path):
    model = tiny(rope_parameters=LLAMA3)
    extra = {"rope_freqs.weight": rope_divisors(LLAMA3)}
    folder = exactly(write_model(model, tmp_path / "l.gguf", **extra)).folder()
    unpacked = AutoModelForCausalLM.from_pretrained(folder)
    assert unpacked.config.rope_parameters == LLAMA3
    torch.testing.assert_close(logits(unpacked), logits(model), rtol=1e-5, atol=1e-5)
    unscaled = tiny(rope_parameters=dict(rope_type="default", rope_theta=500_000.0))
    assert not torch.allclose(logits(unscaled), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 5.0])}, "weight are not those of Llama 3"),
        ({"rope_scaling_type": RopeScalingType.YARN}, "does not read its rotary scaling .yarn"),
        ({"blk.1.attn_q.bias": torch.ones(32)}, "holds 56,384 weights, and .* LlamaForCausalLM .* 56,352"),
        ({"blk.1.ffn_up.weight": torch.ones(16, 128)}, "layers.1.mlp.up_proj.weight is of another shape"),
        ({"tokenizer_pre": "unheard-of"}, "splits text .tokenizer.ggml.pre: unheard-of. is not known"),
    ],
)
def test_what_would_become_another_model_is_refused(tmp_path, cache, extra, message):
    """The rest of what is refused is among the bad inputs."""
    path = write_model(tiny(), tmp_path / "bad.gguf", **extra)
    with pytest.raises(InputError, match=message) as caught:
        read_config(model_ref(str(path)))
    assert "\n" not in str(caught.value)
    assert not cache.exists() or os.listdir(cache) == []


def test_all_five_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tiny(), tmp_path / "tiny.gguf")
    questions = "".join(json.dumps({"question": f"What is {i} + {i}?"}) + "\n" for i in range(4))
    (tmp_path / "prompts.jsonl").write_text(questions)
    data = "--data_path data/tiny-processed-data/data.jsonl --device cpu"
    blocks = "--blocks_to_skip tiny_block_selection.json"
    for script, arguments in (
        (
            generate_model_gt_data,
            "--input_file prompts.jsonl --max_tokens 12 --backend transformers --device cpu --keep_truncated",
        ),
        (process_gt_data, "--num_cpu_procs 1"),
        (block_selection, data),
        (param_scale, f"{data} {blocks} --num_epochs 1 --export folded"),
        (unscaled_ckpt, blocks),
    ):
        assert script.main(["--model", "tiny.gguf", *arguments.split()]) == 0
    for checkpoint in ("scaled_tiny_ckpts/tiny_scaled_epoch_0", "unscaled_tiny_ckpts/tiny_unscaled"):
        config = json.loads((tmp_path / checkpoint / "config.json").read_text())
        assert config["model_type"] == "hopscotch_llama" and len(config["skipped_attention_blocks"]) == 1


def test_a_file_is_unpacked_once_and_another_is_never_taken_for_it(tmp_path, cache):
    path = write_model(tiny(), tmp_path / "one.gguf")
    first = model_ref(str(path)).folder()
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert model_ref(os.path.relpath(path)).folder() == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    (tmp_path / "elsewhere").mkdir()
    other = model_ref(str(write_model(tiny("qwen2"), tmp_path / "elsewhere" / "one.gguf"))).folder()
    path.unlink()
    replaced = model_ref(str(write_model(tiny("qwen3", head_dim=128), path))).folder()
    for folder, kind in ((first, "llama"), (other, "qwen2"), (replaced, "qwen3")):
        assert json.loads((folder / "config.json").read_text())["model_type"] == kind
        assert folder.parent == cache and folder.name.startswith("one-")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "chat_template.jinja"])
def test_it_is_unpacked_again_where_a_clean_up_left_a_part(tmp_path, cache, name):
    path = write_model(tiny(), tmp_path / "one.gguf")
    folder = exactly(path).folder()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / name).unlink()
    assert exactly(path).folder() == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_step_2_takes_what_step_1_unpacked_to(tmp_path, cache):
    path = write_model(tiny(), tmp_path / "one.gguf")
    step_2 = process_gt_data.build_parser().parse_args(["--model", str(path)]).model
    whole = exactly(path).folder()
    assert step_2.folder(weights=False) == whole and os.listdir(cache) == [whole.name]
    step_4b = ["--model", str(path), "--blocks_to_skip", "1"]
    in_16_bits = unscaled_ckpt.build_parser().parse_args(step_4b).model
    assert in_16_bits.folder(weights=False) == in_16_bits.folder() != whole
    shutil.rmtree(whole)
    assert step_2.folder(weights=False) == in_16_bits.folder()


def test_a_failure_on_the_way_leaves_nothing_and_the_next_run_starts_over(tmp_path, cache, monkeypatch):
    path = write_model(tiny(), tmp_path / "one.gguf")

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full_disk)
        with pytest.raises(OSError, match="no space"):
            model_ref(str(path)).folder()
    assert os.listdir(cache) == []
    folder = model_ref(str(path)).folder()
    shutil.copytree(folder, cache / f".{folder.name}.tmp")  # as a killed run leaves it
    shutil.rmtree(folder)
    (cache / f".{folder.name}.tmp" / "model.safetensors").write_bytes(b"half of it")
    assert model_ref(str(path)).folder() == folder
    assert AutoTokenizer.from_pretrained(folder).chat_template
    AutoModelForCausalLM.from_pretrained(folder)
    assert os.listdir(cache) == [folder.name]


def test_a_cache_that_cannot_be_written_is_refused_with_what_names_another(tmp_path, cache):
    path = write_model(tiny(), tmp_path / "one.gguf")
    cache.parent.write_text("a file in its place")
    with pytest.raises(InputError, match="cannot write to .*; set XDG_CACHE_HOME to a folder with space"):
        model_ref(str(path)).folder()


def test_two_at_once_unpack_it_once(tmp_path, cache, monkeypatch):
    path = write_model(tiny(), tmp_path / "one.gguf")
    unpack, read, calls, meet = gguf_files.unpack, gguf_files.read_description, [], threading.Barrier(2)

    def counted(*arguments):
        calls.append(arguments)
        unpack(*arguments)

    def both_there(gguf):
        meet.wait(60)
        return read(gguf)

    monkeypatch.setattr(gguf_files, "unpack", counted)
    monkeypatch.setattr(gguf_files, "read_description", both_there)
    with ThreadPoolExecutor(2) as threads:
        folders = list(threads.map(lambda _: model_ref(str(path)).folder(), range(2)))
    assert len(calls) == 1 and folders[0] == folders[1]
    assert os.listdir(cache) == [folders[0].name]
