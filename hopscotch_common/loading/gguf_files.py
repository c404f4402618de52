"""GGUF files: opened, checked and unpacked, once, into plain folders in the user's cache.

All Hugging Face tools and vLLM can read an unpacked folder. Its weights are bfloat16, in which models of this
kind run; with `--dtype float32` they are float32, which holds the values of quantised blocks, integers times
a 16-bit scale. They are unpacked tensor by tensor, so that a large file needs little memory.
"""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import platformdirs
import torch
from gguf import GGUFReader, dequantize
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import modeling_gguf_pytorch_utils as gguf_utils
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hopscotch_common import files
from hopscotch_common.errors import InputError, logger, reason_of
from hopscotch_common.loading import loader, tokenization, weights

UNPACKED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
UNPACKED += ("chat_template.jinja",)
LAYOUT = 6  # raised when the output of `unpack` changes, so that older folders are not used
REMEDY = "give another GGUF file"
# How byte-level BPE tokenizers (llama.cpp's names) split text before merging, if transformers has no regular
# expression for them and takes GPT-2's: that is right for some, while others first split off each digit.
SPLITS_LIKE_GPT2 = (None, "default", "gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# For these llama.cpp puts a BOS before a text if the file does not say (src/llama-vocab.cpp).
BEGIN_TEXTS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
BEGIN_TEXTS += ("jina-v5-nano", "tekken")
# llama.cpp ends an answer at these, whatever else the file says.
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
)
END_TEXTS += ("</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>")
CONTROL = 3  # token type: has no text of its own
# Fields that transformers' readers leave out for some architectures: name in the config -> in the file.
MORE_FIELDS = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}  # these scale attention differently, which no field says
DECODED_AT_ONCE = 2**22  # weights
SHARD_BYTES = 600 * 2**20  # of a weight file, which is in memory until it is complete
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 to 3.3 divide low frequencies by 8 or 32 within these bounds; a GGUF holds only the divisors.
LLAMA3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def cache_folder() -> Path:
    """The place for unpacked models: one folder each, which may be deleted at any time."""
    return platformdirs.user_cache_path("hopscotch")


def unpacked_folder(gguf: Path, dtypes: Sequence[str]) -> Path:
    """Return the folder of a GGUF file's model in the first of these dtypes that is there, or unpack it.

    Its name comes from the file's path, size and time of change and from the dtype, so that no other file of
    the same name is mistaken for it. Raises InputError if the file holds no supported instruction-tuned
    model.
    """
    files.check_input(gguf, REMEDY)
    status = gguf.stat()
    targets = {}
    for dtype in dtypes:
        identity = repr((str(gguf.resolve()), status.st_size, status.st_mtime_ns, LAYOUT, f"torch.{dtype}"))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        targets[cache_folder() / f"{gguf.stem}-{digest}"] = dtype
    target = next(filter(is_whole, targets), next(iter(targets)))
    unpack_once(gguf, target, targets[target])
    return target


def is_whole(folder: Path) -> bool:
    """Whether an unpacked model's files are all there: what cleans up old files may leave the folder."""
    try:
        return all((folder / name).is_file() for name in UNPACKED) and bool(weights.weight_files(folder))
    except InputError:
        return False


def unpack_once(gguf: Path, target: Path, dtype: str) -> None:
    """Unpack a GGUF file into the folder `target`, unless it is there; all of it, or nothing."""
    if is_whole(target):
        return
    described = read_description(gguf)
    reader = described[0]
    files.check_name(target, f"{gguf}: its folder", "set XDG_CACHE_HOME to a folder with space")
    needed = sum(int(tensor.n_elements) for tensor in reader.tensors) * getattr(torch, dtype).itemsize
    logger.info("unpacking %s into %s (once): %.2f GB", gguf.name, target, needed / 1e9)
    with files.locked(target, wait=True):  # only one of several processes does it
        if not is_whole(target):
            with files.atomic_folder(target) as temporary:
                unpack(gguf, *described, temporary, getattr(torch, dtype))


def open_gguf(path: Path, remedy: str = REMEDY) -> GGUFReader:
    """Open a GGUF file, memory mapped; raise InputError if it is not one, or is incomplete."""
    files.check_input(path, remedy)
    try:
        reader = GGUFReader(path)
    except Exception as error:  # wrong lengths and types can raise anything
        raise InputError(
            f"{path}: not a GGUF file that can be read, or a truncated one ({reason_of(error)}); {remedy}"
        ) from error
    if (value_of(reader, "split.count") or 0) > 1:
        raise InputError(
            f"{path} is one of several parts: join them with llama-gguf-split --merge, and give that"
        )
    return reader


def value_of(reader, key: str, default=None):
    """A value of a GGUF file's metadata."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_description(gguf: Path) -> tuple:
    """Return a GGUF's reader, its model without weights, and its tokenizer; no weight is read.

    Raises InputError unless it is a supported model with a chat template, of which transformers reads all
    that matters.
    """
    reader = open_gguf(gguf)
    with _reading(gguf) as where:
        config = AutoConfig.from_pretrained(**where)
    loader.check_supported(config.model_type, gguf)
    if not value_of(reader, "tokenizer.chat_template"):
        raise InputError(f"{gguf}: holds no chat template; give the GGUF of an instruction-tuned model")
    _set_more_fields(config, reader)
    _set_rope(config, reader, gguf)
    with _reading(gguf) as where, torch.device("meta"):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_config(config)
    _set_tokenizer(tokenizer, reader, gguf)
    in_file = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in NOT_WEIGHTS)
    in_model = sum(weight.numel() for weight in model.parameters())
    if in_file != in_model:
        raise InputError(
            f"{gguf}: holds {in_file:,} weights, and transformers' {type(model).__name__} of this config "
            f"{in_model:,}; {REMEDY}"
        )
    return reader, model, tokenizer


@contextlib.contextmanager
def _reading(gguf: Path) -> Iterator[dict[str, str]]:
    """Yield the arguments with which `from_pretrained` reads a GGUF; any error becomes an InputError.

    They name a folder with nothing else in it: transformers would prefer a tokenizer.json beside the file.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / gguf.name).symlink_to(gguf.resolve())
            yield {"pretrained_model_name_or_path": folder, "gguf_file": gguf.name}
    except Exception as error:
        raise InputError(
            f"{gguf}: transformers cannot read this GGUF file ({reason_of(error)}); {REMEDY}"
        ) from error


def unpack(gguf: Path, reader: GGUFReader, model, tokenizer, target: Path, dtype: torch.dtype) -> None:
    """Write a GGUF's model and tokenizer to a folder, tensor by tensor.

    reader, model, tokenizer: from `read_description`. Raises InputError if transformers cannot read all
    of the weights.
    """
    wanted = {
        key: weight.to(dtype)
        for key, weight in model.state_dict().items()
        if key not in (model.all_tied_weights_keys or ())
    }
    plan = split_torch_state_dict_into_shards(wanted, max_shard_size=SHARD_BYTES)

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        missing = {key: weight.shape for key, weight in wanted.items()}
        for key, weight in converted_tensors(gguf, reader, model):
            if key not in missing or missing.pop(key) != weight.shape:
                raise InputError(f"{gguf}: {key} is of another shape there, or twice; {REMEDY}")
            yield key, weight.to(dtype)
        if missing:
            raise InputError(f"{gguf}: {min(missing)} is not in the file ({len(missing)} such); {REMEDY}")

    weights.save_in_shards(target, plan, checked())
    config = model.config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    named = (value_of(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))
    vocabulary = {text: i for i, text in enumerate(value_of(reader, "tokenizer.ggml.tokens"))}
    ends = (vocabulary.get(text) for text in END_TEXTS)
    stops = dict.fromkeys((config.eos_token_id, tokenization.end_of_turn(tokenizer), *named, *ends))
    if "<|return|>" in vocabulary:  # gpt-oss: it ends an answer, <|end|> only a part of one
        stops.pop(vocabulary.get("<|end|>"), None)
    stops = [token for token in stops if token is not None]
    generation = GenerationConfig(  # an answer ends at the end of the text or of a turn
        bos_token_id=config.bos_token_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=config.pad_token_id,
    )
    config.save_pretrained(target)
    generation.save_pretrained(target)
    tokenization.save_as_it_is(tokenizer, target)
    if tokenization.probe(tokenization.read_tokenizer(target)) != tokenization.probe(tokenizer):
        raise InputError(f"{gguf}: its tokenizer cannot be written so that transformers reads it; {REMEDY}")


def converted_tensors(gguf: Path, reader: GGUFReader, model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, float32 weight) of each tensor of a GGUF, as transformers would load it into a model.

    Parts of one tensor (experts), all in one layer, are put together.
    """
    architecture = value_of(reader, "general.architecture")
    processor_class = gguf_utils.TENSOR_PROCESSORS.get(architecture, gguf_utils.TensorProcessor)
    processor = processor_class(config=model.config.to_dict())
    kind = "llama" if model.config.model_type == "mistral" else None  # it has no names of its own in GGUF
    names = gguf_utils.get_gguf_hf_weights_map(model, processor, kind)
    for _, tensors in groupby(sorted(reader.tensors, key=_layer_of), key=_layer_of):
        joined: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            if tensor.name in NOT_WEIGHTS:
                continue
            try:
                found = processor.process(
                    weights=_dequantized(tensor),
                    name=tensor.name,
                    tensor_key_mapping=names,
                    parsed_parameters={"tensors": joined},
                )
            except (NotImplementedError, ValueError) as error:  # a type or shape that gguf cannot decode
                raise InputError(
                    f"{gguf}: {tensor.name} cannot be read ({reason_of(error)}); {REMEDY}"
                ) from error
            if found.name in names:
                yield names[found.name], torch.from_numpy(np.ascontiguousarray(found.weights))
        while joined:
            yield joined.popitem()


def _layer_of(tensor) -> int:
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(match[1]) if match else -1


def _dequantized(tensor) -> np.ndarray:
    """Decode a GGUF tensor to float32, a few rows at a time: decoding takes several times what it yields."""
    decoded = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    rows = max(1, DECODED_AT_ONCE * len(decoded) // decoded.size)
    for start in range(0, len(decoded), rows):
        part = slice(start, start + rows)
        decoded[part] = dequantize(tensor.data[part], tensor.tensor_type)
    return decoded


def _set_more_fields(config, reader) -> None:
    """Set config fields that are in the file but that transformers leaves at its classes' defaults."""
    architecture = value_of(reader, "general.architecture")
    for name, key in MORE_FIELDS.items():
        value = value_of(reader, f"{architecture}.{key}")
        if value is not None and hasattr(config, name):
            setattr(config, name, value or None)
    base = value_of(reader, f"{architecture}.rope.freq_base")
    if base is not None and "rope_theta" in (config.rope_parameters or {}):
        config.rope_parameters["rope_theta"] = base
    if config.model_type in LAYERS_OF_27B:
        heads = config.hidden_size // config.num_attention_heads
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[config.model_type]
        config.query_pre_attn_scalar = heads if is_27b else config.head_dim


def _set_tokenizer(tokenizer, reader, gguf: Path) -> None:
    """Set what transformers leaves out; raise InputError if it would split text differently from the file."""
    split = value_of(reader, "tokenizer.ggml.pre")
    begins = value_of(reader, "tokenizer.ggml.add_bos_token")
    if begins is None:  # as llama.cpp then assumes
        begins = value_of(reader, "tokenizer.ggml.model") == "llama" or split in BEGIN_TEXTS
    tokenizer.add_bos_token = begins
    _check_control_tokens(tokenizer, reader, gguf)
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):  # sentencepiece
        # llama.cpp also puts a space before what follows a special token, transformers only at the start
        spaces = [normalizers.Replace(" ", "▁")]
        if value_of(reader, "tokenizer.ggml.add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend("▁"))
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), None
    if begins and tokenization.leaves_out_beginning(tokenizer):  # llama.cpp also puts it before a chat
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    if value_of(reader, "tokenizer.ggml.model") != "gpt2" or split in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if split in SPLITS_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif split not in SPLITS_LIKE_GPT2:
        raise InputError(
            f"{gguf}: how its tokenizer splits text (tokenizer.ggml.pre: {split}) is not known; {REMEDY}"
        )


def _check_control_tokens(tokenizer, reader, gguf: Path) -> None:
    """Raise InputError if a control token that the chat template writes is not read as that token."""
    texts, kinds = (value_of(reader, f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    for index, (text, kind) in enumerate(zip(texts, kinds, strict=False)):
        if kind == CONTROL and text and text in tokenizer.chat_template:
            found = tokenizer.encode(text, add_special_tokens=False)
            if found != [index]:
                raise InputError(
                    f"{gguf}: transformers reads its token {index}, {text!r}, as {found}; {REMEDY}, or the "
                    "model's own folder"
                )


def _set_rope(config, reader, gguf: Path) -> None:
    """Set Llama 3's rotary scaling, which transformers leaves out; raise InputError for other such things."""
    architecture = value_of(reader, "general.architecture")
    factors = ("rope.scaling.factor", "rope.scale_linear")
    scaled = any(value_of(reader, f"{architecture}.{name}", 1.0) not in (0.0, 1.0) for name in factors)
    kind = value_of(reader, f"{architecture}.rope.scaling.type", "linear" if scaled else "none")
    read = config.rope_parameters or {}
    if kind != "none" and read.get("rope_type", "default") == "default":
        raise InputError(f"{gguf}: transformers does not read its rotary scaling ({kind}); {REMEDY}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if NOT_WEIGHTS[1] in tensors and read.get("rope_type") != "longrope":
        raise InputError(f"{gguf}: transformers does not read its {NOT_WEIGHTS[1]}; {REMEDY}")
    if NOT_WEIGHTS[0] not in tensors:
        return
    divisors = torch.from_numpy(tensors[NOT_WEIGHTS[0]].data.copy()).flatten().float()
    if bool((divisors == 1).all()):
        return
    theta = read["rope_theta"]

    def frequencies(factor: float) -> torch.Tensor:
        config.rope_parameters = dict(rope_type="llama3", rope_theta=theta, factor=factor) | LLAMA3_ROPE
        return ROPE_INIT_FUNCTIONS["llama3"](config)[0]

    expected = frequencies(1.0) / frequencies(divisors.max().item())
    if len(divisors) != len(expected) or not torch.allclose(expected, divisors, rtol=1e-4):
        raise InputError(f"{gguf}: its {NOT_WEIGHTS[0]} are not those of Llama 3, so not known; {REMEDY}")
