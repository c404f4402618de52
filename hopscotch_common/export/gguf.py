"""Leave skipped attention blocks out of a GGUF file, for llama.cpp.

    python llama.cpp/convert_hf_to_gguf.py folded --outfile folded.gguf      # then quantise, if you like
    python -m hopscotch_common.export CKPT --format gguf --from folded.gguf --output skipped.gguf

llama.cpp's converter makes `folded.gguf` from the `folded` export, whose skipped blocks add zero. Its
`deci` architecture is `llama` with heads and widths given layer by layer: a layer with 0 heads has
no attention and takes no KV cache. So the metadata is rewritten, the skipped blocks' attention
tensors are left out, and every other tensor passes through unchanged, quantised or not.

A layer with heads but no KV heads has only its norm and output matrix ("linear attention"), and takes no KV
cache either. That is where maps go, each multiplied out to [hidden, hidden]; `folded` is then written with
`--without_maps`.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from hopscotch_common import checkpoints
from hopscotch_common.checkpoints.folders import check_outside
from hopscotch_common.errors import InputError, logger
from hopscotch_common.export.folding import (
    Folding,
    StreamFactors,
    as_one_matrix,
    fold_factors,
    skipped_blocks,
)
from hopscotch_common.files import atomic_path, check_output
from hopscotch_common.loading import weights
from hopscotch_common.loading.gguf_files import open_gguf, value_of
from hopscotch_common.scales.modeling_hopscotch import stock_type

ARCHITECTURE = "deci"
# model family -> architectures of its GGUF files that `deci` can stand in for. It has q/k/v biases,
# but neither the norms of q and k that Qwen3 has nor Granite's multipliers.
SOURCES = {
    "llama": ("llama",),
    "mistral": ("llama",),
    "qwen2": ("qwen2", "llama"),
}
# These pair dimension i of a head with i + head_dim / 2 in the rotary embedding; `deci` pairs
# neighbours, as `llama` does.
HALF_ROTATED = ("qwen2",)
UNQUANTISED = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def rewrite_gguf(checkpoint: Path, folded_gguf: Path, output: Path) -> dict:
    """Write `output`: `folded_gguf`, made from this checkpoint's folded export, without its skipped blocks.

    The file is written atomically. Returns a report: blocks skipped, KV cache, tensors and bytes saved.
    Raises InputError for a file that is not the folded export of the checkpoint, and for a model that
    llama.cpp's `deci` cannot run.
    """
    config = checkpoints.checkpoint_config(checkpoint)
    skipped = skipped_blocks(config)
    if not skipped:
        raise InputError(f"{checkpoint} skips no attention block: use {folded_gguf} as it is")
    check_output(output, "--output", [folded_gguf])
    check_outside(output, checkpoint)
    if output.exists() and output.open("rb").read(4) != b"GGUF":
        raise InputError(f"--output {output}: exists and is no GGUF; name another file")
    reader = open_gguf(folded_gguf, "make it with llama.cpp's convert_hf_to_gguf.py")
    _check_model(reader, folded_gguf, config)
    _check_skipped_add_zero(reader, folded_gguf, config.num_hidden_layers, skipped)

    layers = _Layers(reader, skipped, _maps(checkpoint, config, reader, folded_gguf))
    with atomic_path(output) as temporary:
        kept = _write(reader, layers, temporary)
    before, after = folded_gguf.stat().st_size, output.stat().st_size
    return {
        "format": "gguf",
        "architecture": ARCHITECTURE,
        "skipped_blocks": skipped,
        "maps": len(layers.maps),
        "kv_cache_blocks": sum(heads > 0 for heads in layers.head_counts_kv),
        "kv_cache_blocks_removed": sum(heads == 0 for heads in layers.head_counts_kv),
        "tensors": kept,
        "tensors_removed": len(reader.tensors) - kept,
        "bytes": after,
        "bytes_saved": before - after,
    }


def _maps(checkpoint: Path, config, reader, path: Path) -> dict:
    """Return the file's output matrices that become maps [hidden, hidden] in attention's place, by name.

    They keep their type or, if it is a quantised one, take Q8_0: maps are few.
    """
    if not config.replacement_rank:
        return {}
    values, maps = checkpoints.load_scales(checkpoint, config)
    if reader.endianess is not GGUFEndian.LITTLE:
        raise InputError(f"{path}: maps go into little-endian files only; convert without --bigendian")
    found, blocks, tensors = {}, skipped_blocks(config), _tensors(reader)
    factors = fold_factors(values, blocks, replaced=blocks)
    _check_scales(checkpoint, config, factors, reader)
    for block in blocks:
        tensor = tensors[f"blk.{block}.attn_output.weight"]
        kind = tensor.tensor_type if tensor.tensor_type in UNQUANTISED else GGMLQuantizationType.Q8_0
        matrix = as_one_matrix(block, maps, factors).float().numpy()
        found[tensor.name] = tensor._replace(tensor_type=kind, data=quantize(matrix, kind))
    return found


def _check_scales(checkpoint: Path, config, factors: StreamFactors, reader) -> None:
    """Raise InputError if a file was made with other scales: those of another epoch, say, than the maps.

    The file's last down projection shows it, as all s and the last b are in it, unless its weights are
    quantised.
    """
    layer = config.num_hidden_layers - 1
    stored = _tensors(reader)[f"blk.{layer}.ffn_down.weight"]
    if stored.tensor_type not in UNQUANTISED:
        return
    key = f"model.layers.{layer}.mlp.down_proj.weight"
    files = map(weights.read_tensors, weights.weight_files(checkpoint))
    ours = Folding(config, factors).fold(key, next(file[key] for file in files if key in file)).float()
    ours = dequantize(quantize(ours.numpy(), stored.tensor_type), stored.tensor_type)
    difference = np.linalg.norm(ours - dequantize(stored.data, stored.tensor_type))
    if difference > 1e-6 * np.linalg.norm(ours):
        raise InputError(
            f"{stored.name} has other scales in it than {checkpoint} has: give the GGUF made of this very "
            "checkpoint's folded export"
        )


class _Layers:
    """What each layer of the rewritten file has: its head counts, and which tensors it loses.

    maps: from `_maps`. Block 0 is special: llama.cpp takes the size of a head from the number of heads of
    layer 0, which therefore cannot be 0. Without a map, block 0 keeps only its output matrix, which is zero,
    or, if that is not square, its attention, which adds zero.
    """

    def __init__(self, reader, skipped: list[int], maps: dict):
        self.maps = maps
        self.architecture = value_of(reader, "general.architecture")
        count = value_of(reader, f"{self.architecture}.block_count")
        self.heads = value_of(reader, f"{self.architecture}.attention.head_count")
        self.heads_kv = value_of(reader, f"{self.architecture}.attention.head_count_kv", self.heads)
        width = value_of(reader, f"{self.architecture}.feed_forward_length")
        self.head_counts = [0 if i in skipped else self.heads for i in range(count)]
        self.head_counts_kv = [0 if i in skipped else self.heads_kv for i in range(count)]
        self.widths = [width] * count
        self.removed = tuple(f"blk.{i}.attn_" for i in skipped)
        linear = skipped if maps else [0] if 0 in skipped else []
        for block in linear:
            self.head_counts[block] = self.heads
        if linear and not maps:
            shape = _tensors(reader)["blk.0.attn_output.weight"].shape
            if shape[0] != shape[1]:
                linear = []
                self.head_counts_kv[0] = self.heads_kv
                self.removed = self.removed[1:]
                logger.warning("block 0 keeps its attention, which adds zero: deci cannot leave it out")
        self.kept = tuple(f"blk.{i}.attn_{name}.weight" for i in linear for name in ("norm", "output"))

    def has(self, name: str) -> bool:
        return name in self.kept or not name.startswith(self.removed)

    def data(self, tensor) -> np.ndarray:
        """Return a tensor's data for `deci`: unchanged, or with the rows of a q or k matrix reordered.

        Rows are quantised one by one, so reordering them changes none of their bytes.
        """
        name = tensor.name.split(".")
        if self.architecture not in HALF_ROTATED or name[0] != "blk" or name[2] not in ("attn_q", "attn_k"):
            return tensor.data
        heads = self.heads if name[2] == "attn_q" else self.heads_kv
        halves = tensor.data.reshape(heads, 2, -1, *tensor.data.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.data.shape)


def _tensors(reader) -> dict:
    return {tensor.name: tensor for tensor in reader.tensors}


def _check_model(reader, path: Path, config) -> None:
    """Raise InputError unless the file holds a model of the checkpoint's shape that `deci` can run."""
    family = stock_type(config)
    architecture = value_of(reader, "general.architecture")
    if architecture == ARCHITECTURE:
        raise InputError(f"{path} is a rewritten GGUF already: give the one made of the folded export")
    if family not in SOURCES:
        raise InputError(
            f"llama.cpp's `deci` holds no layers of {family}, so no GGUF can skip its blocks; {path} runs as "
            "it is, no faster"
        )
    if architecture not in SOURCES[family]:
        raise InputError(
            f"{path} has architecture {architecture!r}, which no GGUF of a {family} checkpoint has; "
            "give the one made of this checkpoint's folded export"
        )
    expected = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for name, value in expected.items():
        found = value_of(reader, f"{architecture}.{name}")
        if found is None and name == "attention.head_count_kv":
            found = value_of(reader, f"{architecture}.attention.head_count")  # as llama.cpp reads it
        if found != value:
            raise InputError(
                f"{path}: {architecture}.{name} is {found}, but the checkpoint has {value}: "
                "give the GGUF made of this checkpoint's folded export"
            )
    fused = [tensor.name for tensor in reader.tensors if ".attn_qkv." in tensor.name]
    if fused and architecture in HALF_ROTATED:
        raise InputError(f"{path}: {fused[0]} holds q, k and v in one: convert without fusing them")


def _check_skipped_add_zero(reader, path: Path, num_layers: int, skipped: list[int]) -> None:
    """Raise InputError unless the attention of the skipped blocks, and of no other block, adds zero."""
    tensors = _tensors(reader)
    remedy = "this is not the folded export of this checkpoint"
    for layer in range(num_layers):
        name = f"blk.{layer}.attn_output"
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        if weight is None:
            raise InputError(f"{path}: {name}.weight is missing: {remedy}")
        if layer not in skipped:
            # One row is enough to tell: no row of a trained matrix is all zero.
            if _is_zero(weight, path, rows=1) and _is_zero(weight, path):
                raise InputError(f"{path}: {name}.weight is zero, but block {layer} is not skipped: {remedy}")
        elif not _is_zero(weight, path) or (bias is not None and not _is_zero(bias, path)):
            raise InputError(f"{path}: {name} is not zero, but block {layer} is skipped: {remedy}")


def _is_zero(tensor, path: Path, rows: int | None = None) -> bool:
    """Whether the first rows (None: all) of a tensor stand for zeros."""
    try:
        return not dequantize(tensor.data[:rows], tensor.tensor_type).any()
    except NotImplementedError:
        raise InputError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which this gguf package cannot "
            "decode; update it, or quantise to another type"
        ) from None


def _write(reader, layers: _Layers, path: Path) -> int:
    """Write the rewritten file; return the number of tensors in it."""
    # The writer adds version, counts and general.architecture itself.
    writer = GGUFWriter(path, ARCHITECTURE, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    per_layer = {
        "attention.head_count": layers.head_counts,
        "attention.head_count_kv": layers.head_counts_kv,
        "feed_forward_length": layers.widths,
    }
    prefix = f"{layers.architecture}."
    for field in reader.fields.values():
        name = field.name.removeprefix(prefix)
        written_by_us = name in per_layer or name == "general.architecture" or name.startswith("GGUF.")
        values = field.contents()
        if written_by_us or values == []:  # the writer refuses an empty array, which says nothing
            continue
        key = f"{ARCHITECTURE}.{name}" if name != field.name else name
        kind, of_what = field.types[0], field.types[-1]
        writer.add_key_value(key, values, kind, of_what if kind == GGUFValueType.ARRAY else None)
    for name, values in per_layer.items():
        key = f"{ARCHITECTURE}.{name}"
        writer.add_key_value(key, values, GGUFValueType.ARRAY, GGUFValueType.UINT32)

    kept = [layers.maps.get(t.name, t) for t in reader.tensors if layers.has(t.name)]
    for tensor in kept:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in kept:
            writer.write_tensor_data(layers.data(tensor), tensor_endianess=reader.endianess)
    finally:
        writer.close()
    return len(kept)
