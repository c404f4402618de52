"""Model folders: configs, tokenizers and weights that are broken, or lie."""

from .cases import Case, for_scripts, points_to
from .flags import ALL, LOADING
from .makers import (
    REMOVED,
    Spoil,
    all_of,
    cut,
    edit,
    folder,
    gguf,
    head,
    index,
    loop,
    more_tokens,
    old_bin,
    remove,
    sharded,
    template,
    tensors,
    without,
    write,
)
from .workplace import CHECKPOINT

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
WITH_WEIGHTS = LOADING  # those that read or copy the weights
NO_WEIGHTS = "model: no weights|" + points_to("model", "(weights|safetensors)")
WITH_TOKENIZER = ("generate_model_gt_data", "process_gt_data")
UP = "blk.2.ffn_up.weight"
KEY = "model.layers.2.mlp.up_proj.weight"


def _config(name: str, place: str, scripts=("unscaled_ckpt", "block_selection"), **changes) -> list[Case]:
    return for_scripts(scripts, "--model", name, points_to("model", place), spoil=edit(CONFIG, **changes))


def _weights(name: str, place: str, spoil: Spoil, scripts=WITH_WEIGHTS) -> list[Case]:
    return for_scripts(scripts, "--model", name, points_to("model", place), spoil=spoil)


def _tokenizer(name: str, place: str, spoil: Spoil, scripts=WITH_TOKENIZER) -> list[Case]:
    return for_scripts(scripts, "--model", name, points_to("model", place), spoil=spoil)


def _gguf(name: str, place: str, spoil: Spoil, scripts=("unscaled_ckpt", "process_gt_data")) -> list[Case]:
    """A GGUF file in the model's place."""
    message = points_to("tiny.gguf", place)
    return for_scripts(scripts, "--model", f"GGUF {name}", message, "--model", "tiny.gguf", spoil=spoil)


def _move_shards(work) -> None:
    """The shards lie beside the model's folder, where the index says."""
    (work / "outside").mkdir()
    for path in (work / "model").glob("model-0*"):
        path.rename(work / "outside" / path.name)


def _template(name: str, spoil: Spoil, scripts=WITH_TOKENIZER) -> list[Case]:
    return for_scripts(
        scripts, "--model", f"template {name}", "(line 1: .*|model: .*)chat template", spoil=spoil
    )


CASES = [
    # config.json
    *for_scripts(
        ["param_scale"], "--model", "no config", "folder model holds no config.json", spoil=remove(CONFIG)
    ),
    *for_scripts(
        ALL, "--model", "config is not JSON", points_to("model", "config.json"), spoil=write(CONFIG, "{")
    ),
    *for_scripts(
        ["unscaled_ckpt", "block_selection"],
        "--model",
        "config is a list",
        points_to("model", "config.json"),
        spoil=write(CONFIG, "[]"),
    ),
    *for_scripts(
        ["unscaled_ckpt"],
        "--model",
        "config is not UTF-8",
        points_to("model", "config.json"),
        spoil=write(CONFIG, b'{"model_type": "\xff"}'),
    ),
    *for_scripts(
        ["unscaled_ckpt", "process_gt_data"],
        "--model",
        "config is a folder",
        points_to("model", "config.json"),
        spoil=folder(CONFIG),
    ),
    *for_scripts(
        ["unscaled_ckpt"],
        "--model",
        "config is a link to itself",
        points_to("model", "config.json"),
        spoil=loop(CONFIG),
    ),
    *for_scripts(
        ALL,
        "--model",
        "unsupported architecture",
        "model: architecture 'gpt2' is not supported; supported are llama.*; give another model",
        spoil=edit(CONFIG, model_type="gpt2"),
    ),
    *_config("no model type", "", model_type=REMOVED),
    *_config("model type with escapes", "", model_type="\x1b[31mllama\n"),
    *for_scripts(
        ["unscaled_ckpt"],
        "--model",
        "a checkpoint of ours",
        "Hopscotch checkpoint already: give its base",
        "--model",
        CHECKPOINT,
    ),
    *_config("layers are text", "num_hidden_layers", num_hidden_layers="four"),
    *_config("layers are null", "num_hidden_layers", num_hidden_layers=None),
    *_config("layers are 4.5", "num_hidden_layers", num_hidden_layers=4.5),
    *_config("layers are below 0", "num_hidden_layers", ("unscaled_ckpt",), num_hidden_layers=-4),
    *_config("more layers than weights", "(missing|lacks|no )", WITH_WEIGHTS, num_hidden_layers=6),
    *_config("fewer layers than weights", "model.layers", WITH_WEIGHTS, num_hidden_layers=3),
    *_config("vocabulary too large", "(vocab|embed_tokens|lm_head)", WITH_WEIGHTS, vocab_size=400),
    *_config("hidden size too small", "(size|shape)", WITH_WEIGHTS, hidden_size=16),
    *_config("heads that do not divide", "head", num_attention_heads=5),
    *_config("KV heads that do not divide", "k_proj", num_key_value_heads=3),
    *_config("no heads", "config.json", num_attention_heads=0),
    *_config("unknown layer types", "layer_types", layer_types=["full_attention"] * 3 + ["mamba"]),
    *_config("too few layer types", "layer_types", layer_types=["full_attention"] * 3),
    *_config("unknown dtype", "float99", dtype="float99"),
    *_config("unknown rope", "rope", rope_parameters={"rope_type": "round", "rope_theta": 1e4}),
    *_config("rope of text", "rope", rope_parameters="round"),
    *_config("unknown activation", "swish9", hidden_act="swish9"),
    *_config("context of text", "max_position_embeddings", WITH_WEIGHTS, max_position_embeddings="long"),
    *_config("eps of text", "rms_norm_eps", rms_norm_eps="small"),
    *_config("unknown quantisation", "quantization_config", quantization_config={"quant_method": "magic"}),
    *_config(
        "negative sliding window",
        "sliding_window",
        ("block_selection", "generate_model_gt_data"),
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=-5,
    ),
    # weights
    *for_scripts(WITH_WEIGHTS, "--model", "no weights", NO_WEIGHTS, spoil=remove(WEIGHTS)),
    *_weights("cut short", "model.safetensors", cut(WEIGHTS, 0.6)),
    *_weights("empty", "model.safetensors", write(WEIGHTS, "")),
    *_weights(
        "not safetensors",
        "model.safetensors",
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        ("unscaled_ckpt", "block_selection"),
    ),
    *_weights(
        "header of 2^60 bytes",
        "model.safetensors",
        write(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
        ("unscaled_ckpt", "block_selection"),
    ),
    *for_scripts(["param_scale"], "--model", "weights are a folder", NO_WEIGHTS, spoil=folder(WEIGHTS)),
    *for_scripts(
        ["unscaled_ckpt", "block_selection"],
        "--model",
        "weights are a link to itself",
        NO_WEIGHTS,
        spoil=loop(WEIGHTS),
    ),
    *_weights("a tensor missing", KEY, tensors(WEIGHTS, without(KEY))),
    *_weights(
        "a tensor too many",
        "odd",
        tensors(WEIGHTS, lambda found: found | {"model.odd.weight": found[KEY].clone()}),
        ("unscaled_ckpt", "block_selection"),
    ),
    *_weights(
        "a tensor of another shape",
        KEY,
        tensors(WEIGHTS, lambda found: found | {KEY: found[KEY][:-1].clone()}),
    ),
    *_weights(
        "cut .bin",
        "pytorch_model.bin",
        all_of(old_bin, cut("model/pytorch_model.bin", 0.5)),
        ("unscaled_ckpt", "block_selection"),
    ),
    # shards
    *_weights(
        "a shard missing",
        "model-00002-of-00002.safetensors",
        all_of(sharded, remove("model/model-00002-of-00002.safetensors")),
    ),
    *_weights(
        "a shard cut short",
        "model-00002-of-00002.safetensors",
        all_of(sharded, cut("model/model-00002-of-00002.safetensors", 0.7)),
    ),
    *_weights("index is not JSON", INDEX.split("/")[1], all_of(sharded, write(INDEX, "{"))),
    *_weights(
        "index is a list",
        INDEX.split("/")[1],
        all_of(sharded, write(INDEX, "[]")),
        ("unscaled_ckpt", "param_scale"),
    ),
    *_weights(
        "index without a map",
        INDEX.split("/")[1],
        all_of(sharded, write(INDEX, "{}")),
        ("unscaled_ckpt", "generate_model_gt_data"),
    ),
    *_weights(
        "index of numbers",
        INDEX.split("/")[1],
        all_of(sharded, index(lambda found: dict.fromkeys(found, 7))),
        ("unscaled_ckpt", "block_selection"),
    ),
    *_weights(
        "index out of the folder",
        r"\.\./",
        all_of(
            sharded,
            index(lambda found: {key: f"../outside/{file}" for key, file in found.items()}),
            _move_shards,
        ),
    ),
    *_weights(
        "index to an absolute path",
        "/etc/passwd",
        all_of(sharded, index(lambda found: dict.fromkeys(found, "/etc/passwd"))),
        ("unscaled_ckpt", "block_selection"),
    ),
    *_weights(
        "index that swaps the shards",
        "(index|shard|model-0000)",
        all_of(sharded, index(lambda found: dict(zip(found, reversed(found.values()), strict=True)))),
        ("unscaled_ckpt", "block_selection"),
    ),
    *_weights(
        "index without one tensor",
        KEY,
        all_of(sharded, index(without(KEY))),
        ("unscaled_ckpt", "block_selection"),
    ),
    # tokenizer and chat template
    *_tokenizer("no tokenizer files", "tokenizer", remove(TOKENIZER, TOKENIZER_CONFIG)),
    *_tokenizer("tokenizer.json missing", "tokenizer", remove(TOKENIZER)),
    *_tokenizer("tokenizer.json is not JSON", "tokenizer", write(TOKENIZER, "{")),
    *_tokenizer("tokenizer.json cut short", "tokenizer", cut(TOKENIZER, 0.5)),
    *_tokenizer(
        "tokenizer.json is another's",
        "tokenizer",
        write(TOKENIZER, '{"version": "1.0"}'),
        ("process_gt_data",),
    ),
    *_tokenizer("tokenizer_config.json is not JSON", "tokenizer", write(TOKENIZER_CONFIG, "{")),
    *_tokenizer(
        "tokenizer_config.json is a list", "tokenizer", write(TOKENIZER_CONFIG, "[]"), ("process_gt_data",)
    ),
    *_tokenizer("tokenizer a folder", "tokenizer", folder(TOKENIZER), ("process_gt_data",)),
    *_tokenizer(
        "no chat template", "chat template; give an instruction-tuned", remove("model/chat_template.jinja")
    ),
    *_tokenizer("ids beyond the vocabulary", "(vocabulary|300)", more_tokens(60)),
    *_template("that refuses", template("{{ raise_exception('not\nme') }}")),
    *_template("that is none", template("{% for message in %}")),
    *_template("that divides by 0", template("{{ 1 // 0 }}")),
    *_template("that adds text and number", template("{{ 'a' + 1 }}")),
    *_template("of 99 terabytes", template("{{ 'x' * 99999999999999 }}"), ("generate_model_gt_data",)),
    *_template("that changes messages", template("{{ messages.append(messages[0]) }}")),
    *_template("that leaves all out", template("hello")),
    *_template(
        "that rewrites",
        template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}<|im_end|>{% endfor %}"),
    ),
    # GGUF files
    *_gguf("missing", "no such file", write("other.gguf", ""), ALL),
    *_gguf("a folder", "holds no config.json", folder("tiny.gguf"), ALL),
    *_gguf("empty", "not a GGUF file", write("tiny.gguf", ""), ALL),
    *_gguf("is a link to itself", "tiny.gguf", loop("tiny.gguf")),
    *_gguf("text", "not a GGUF file", write("tiny.gguf", "{}" * 100)),
    *_gguf("wrong magic", "not a GGUF file", all_of(gguf("tiny.gguf"), head("tiny.gguf", b"GGML"))),
    *_gguf("version 1", "GGUF", all_of(gguf("tiny.gguf"), head("tiny.gguf", b"GGUF\x01\0\0\0"))),
    *_gguf("cut in the header", "truncated", all_of(gguf("tiny.gguf"), cut("tiny.gguf", 0.00005))),
    *_gguf("cut in the metadata", "truncated", all_of(gguf("tiny.gguf"), cut("tiny.gguf", 0.01))),
    *_gguf("cut in the weights", "truncated", all_of(gguf("tiny.gguf"), cut("tiny.gguf", 0.9)), ALL),
    *_gguf("first of two parts", "llama-gguf-split --merge", gguf("tiny.gguf", **{"split.count": 2}), ALL),
    *_gguf("without chat template", "chat template", gguf("tiny.gguf", template=""), ALL),
    *_gguf("of an unknown architecture", "gptj", gguf("tiny.gguf", architecture="gptj")),
    *_gguf("of parallel blocks", "falcon.*side by side", gguf("tiny.gguf", architecture="falcon"), ALL),
    *_gguf("of an encoder", "'t5' is an encoder-decoder model", gguf("tiny.gguf", architecture="t5")),
    *_gguf("architecture with escapes", "cannot read", gguf("tiny.gguf", architecture="\x1b[31mllama\n")),
    *_gguf("without its heads", "tiny.gguf", gguf("tiny.gguf", head_count=None)),
    *_gguf("without a tensor", "holds [0-9,]+ weights", gguf("tiny.gguf", **{UP: None})),
    *_gguf("without a tokenizer", "", gguf("tiny.gguf", tokens=False)),
]
