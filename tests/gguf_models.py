"""Tiny models as GGUF files, laid out as llama.cpp's converter does it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from conftest import CHAT_TEMPLATE, byte_tokenizer
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize, quantize
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}  # llama.cpp's names where they are others
PERMUTED = ("llama",)  # their q and k rows are stored with both halves of a head interleaved


def add_tokenizer(writer: GGUFWriter, control: Sequence[str] = (), **ids: int) -> None:
    """The tests' tokenizer, with a merged "th" and more control tokens behind it. ids: of tokens, by name."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "th", *control])
    writer.add_token_types(
        [3 if i in tokenizer.all_special_ids or i < 4 else 1 for i in range(len(tokens) + 1)]
        + [3] * len(control)
    )
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    for name, token in ids.items():
        getattr(writer, f"add_{name}")(token)


def write_model(
    model,
    path: Path,
    kind: str = "F32",
    template: str = CHAT_TEMPLATE,
    tokens: Callable | None = add_tokenizer,
    **extra,
) -> Path:
    """Write a model with the tests' tokenizer; the path.

    kind: how matrices are stored; norms and biases are F32. tokens: adds a tokenizer to a writer.
    extra: further metadata, by the writer's name or the file's, and tensors by a name that ends in .weight or
    .bias; None leaves one out.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architecture]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(path, extra.pop("architecture", architecture))
    metadata = dict(
        block_count=config.num_hidden_layers,
        context_length=config.max_position_embeddings,
        embedding_length=config.hidden_size,
        feed_forward_length=config.intermediate_size,
        head_count=config.num_attention_heads,
        head_count_kv=config.num_key_value_heads,
        key_length=head_dim,
        **_epsilon(config),
        rope_dimension_count=head_dim,
        rope_freq_base=config.rope_parameters.get("rope_theta", 1e4),
        vocab_size=config.vocab_size,
    )
    tensors = {key: value for key, value in extra.items() if key.endswith((".weight", ".bias"))}
    for name, value in (metadata | {k: v for k, v in extra.items() if k not in tensors}).items():
        if "." in name:
            writer.add_uint32(name, value)
        elif value is not None:
            getattr(writer, f"add_{name}")(value)
    if tokens:
        tokens(writer)
    if template:
        writer.add_chat_template(template)
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    for key, weight in model.state_dict().items():
        if key in tied:
            continue
        module, _, part = key.rpartition(".")
        name = f"{names.get_name(module)}.{part}"
        if architecture in PERMUTED and module.endswith(("q_proj", "k_proj")):
            weight = (
                weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
            )
        if config.model_type.startswith("gemma") and "norm" in name:
            weight = weight + 1
        tensors.setdefault(name, weight)
    for name, weight in tensors.items():
        if weight is not None:
            stored = GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
            values = weight.detach().float().contiguous().numpy()
            writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _epsilon(config) -> dict[str, float]:
    eps = getattr(config, "rms_norm_eps", None)
    return dict(layer_norm_eps=config.norm_epsilon) if eps is None else dict(layer_norm_rms_eps=eps)


def random_model(stock_class, config) -> torch.nn.Module:
    """A random model of which no norm is all 1 and no bias all 0."""
    torch.manual_seed(0)
    model = stock_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def deci_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of a `deci` file, computed as llama.cpp's graph of that architecture does it.

    Read in its source, src/models/deci.cpp; the embeddings are the output matrix where that is missing.
    """
    reader = GGUFReader(path)
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    said = {key.removeprefix("deci."): field.contents() for key, field in reader.fields.items()}
    eps, base = said["attention.layer_norm_rms_epsilon"], said["rope.freq_base"]
    dim, width = said["attention.key_length"], said["embedding_length"]
    angles = torch.arange(len(ids))[:, None] * base ** (-torch.arange(0, dim, 2) / dim)

    def rotated(heads):  # [heads, tokens, dim]: neighbours are a pair
        even, odd = heads[..., 0::2], heads[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, -1).flatten(-2)

    def mul(name, x):
        return linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    stream = tensors["token_embd.weight"][ids]
    counts = zip(said["attention.head_count"], said["attention.head_count_kv"], strict=True)
    for layer, (heads, heads_kv) in enumerate(counts):
        block = f"blk.{layer}"
        normed = rms_norm(stream, [width], tensors[f"{block}.attn_norm.weight"], eps) if heads else None
        if heads and not heads_kv:
            stream = stream + linear(normed, tensors[f"{block}.attn_output.weight"])
        elif heads:
            q, k, v = (
                mul(f"{block}.attn_{n}", normed).unflatten(-1, (-1, dim)).transpose(0, 1) for n in "qkv"
            )
            k, v = (x.repeat_interleave(heads // heads_kv, 0) for x in (k, v))
            mixed = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
            stream = stream + mul(f"{block}.attn_output", mixed.transpose(0, 1).flatten(1))
        normed = rms_norm(stream, [width], tensors[f"{block}.ffn_norm.weight"], eps)
        gated = silu(mul(f"{block}.ffn_gate", normed)) * mul(f"{block}.ffn_up", normed)
        stream = stream + mul(f"{block}.ffn_down", gated)
    stream = rms_norm(stream, [width], tensors["output_norm.weight"], eps)
    return linear(stream, tensors.get("output.weight", tensors["token_embd.weight"]))
