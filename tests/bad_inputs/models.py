"""Model folders: configs, tokenizers and weights that are broken, or lie."""

from .cases import ALL, COPY_AND_LOAD, LOADING, Case, cases
from .makers import (
    REMOVED,
    Spoil,
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
    tensors,
    without,
    write,
)
from .workplace import CHECKPOINT

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
WITH_WEIGHTS = LOADING  # those that read or copy the weights
GENERATION = "model/generation_config.json"
NO_WEIGHTS = "model.*(weights|safetensors)"
UP = "blk.2.ffn_up.weight"
KEY = "model.layers.2.mlp.up_proj.weight"
REWRITES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}<|im_end|>{% endfor %}"


def _models(scripts, *rows: tuple) -> list[Case]:
    """A row each: a name, a place in the model that the message points to, and what spoils the model."""
    return cases(scripts, "--model", *((name, f"model.*(?:{place})", *rest) for name, place, *rest in rows))


def _configs(scripts, **rows: tuple) -> list[Case]:
    """name=(place, change of the config)"""
    named = (
        (name.replace("_", " "), place, edit(CONFIG, **changes)) for name, (place, changes) in rows.items()
    )
    return _models(scripts, *named)


def _templates(scripts, *rows: tuple) -> list[Case]:
    """A row each: a name and the text of a chat template."""
    message = "(line 1: .*|model: .*)chat template"
    file = "model/chat_template.jinja"
    return cases(
        scripts, "--model", *((f"template {name}", message, write(file, text)) for name, text in rows)
    )


def _ggufs(scripts, *rows: tuple) -> list[Case]:
    """A row each: a name, a place that the message points to, and what makes tiny.gguf, the model here."""
    rows = ((f"GGUF {name}", f"tiny.gguf.*(?:{place})", *rest) for name, place, *rest in rows)
    return cases(scripts, "--model", *rows, more=("--model", "tiny.gguf"))


def _types(**messages: str) -> list[Case]:
    """Types of models that are none for this project, and what is said of each."""
    rows = (
        (f"of type {kind}", f"{kind!r} {message}", edit(CONFIG, model_type=kind))
        for kind, message in messages.items()
    )
    return cases("unscaled_ckpt", "--model", *rows)


def _spoilt(change: Spoil, **written) -> tuple[Spoil, Spoil]:
    """A GGUF file of the model, then changed."""
    return gguf("tiny.gguf", **written), change


def _move_shards(work) -> None:
    """The shards lie beside the model's folder, where the index says."""
    (work / "outside").mkdir()
    for path in (work / "model").glob("model-0*"):
        path.rename(work / "outside" / path.name)


CASES = [
    # config.json
    *_models(
        ALL,
        ("config is not JSON", "config.json", write(CONFIG, "{")),
        ("unsupported architecture", "architecture 'gpt2' is not supported", edit(CONFIG, model_type="gpt2")),
    ),
    *_types(
        qwen2_moe="is not supported; supported are llama, .*FAMILIES in",
        t5="is not supported; .*; give such a decoder-only language model",
        cohere="is not supported: attention and MLP stand side by side",
    ),
    *_models(
        ("generate_model_gt_data", "process_gt_data"),
        ("generation config is not JSON", "generation_config.json: not JSON", write(GENERATION, "{")),
        ("generation config is a list", "generation_config.json: a JSON object", write(GENERATION, "[]")),
        ("end is text", "generation_config.json: 'eos_token_id'", write(GENERATION, '{"eos_token_id": "2"}')),
        ("an end is text", "'eos_token_id' must be", write(GENERATION, '{"eos_token_id": [2, "3"]}')),
    ),
    *_models(
        "unscaled_ckpt",
        ("no config", "holds no config.json", remove(CONFIG)),
        ("config is a list", "config.json", write(CONFIG, "[]")),
        ("config is not UTF-8", "config.json", write(CONFIG, b'{"model_type": "\xff"}')),
        ("config is a folder", "config.json", folder(CONFIG)),
        ("config is a link to itself", "config.json", loop(CONFIG)),
        ("a checkpoint of ours", "Hopscotch checkpoint already: give its base", f"--model {CHECKPOINT}"),
    ),
    *_configs(
        "unscaled_ckpt",
        no_model_type=("", dict(model_type=REMOVED)),
        model_type_with_escapes=("", dict(model_type="\x1b[31mllama\n")),
        layers_are_text=("num_hidden_layers", dict(num_hidden_layers="four")),
        layers_are_null=("num_hidden_layers", dict(num_hidden_layers=None)),
        layers_are_half=("num_hidden_layers", dict(num_hidden_layers=4.5)),
        too_few_layer_types=("layer_types", dict(layer_types=["full_attention"] * 3)),
        unknown_dtype=("float99", dict(dtype="float99")),
        rope_of_text=("rope", dict(rope_parameters="round")),
        context_of_text=("max_position_embeddings", dict(max_position_embeddings="long")),
        eps_of_text=("rms_norm_eps", dict(rms_norm_eps="small")),
    ),
    *_configs(
        COPY_AND_LOAD,
        more_layers_than_weights=("(missing|lacks|no )", dict(num_hidden_layers=6)),
        fewer_layers_than_weights=("model.layers", dict(num_hidden_layers=3)),
        vocabulary_too_large=("(vocab|embed_tokens|lm_head)", dict(vocab_size=400)),
        hidden_size_too_small=("(size|shape)", dict(hidden_size=16)),
        heads_that_do_not_divide=("head", dict(num_attention_heads=5)),
        KV_heads_that_do_not_divide=("k_proj", dict(num_key_value_heads=3)),
        no_heads=("config.json", dict(num_attention_heads=0)),
        unknown_rope=("KeyError: 'round'", dict(rope_parameters={"rope_type": "round", "rope_theta": 1e4})),
        unknown_activation=("swish9", dict(hidden_act="swish9")),
        unknown_quantisation=("quantization_config", dict(quantization_config={"quant_method": "magic"})),
    ),
    # weights
    *cases(WITH_WEIGHTS, "--model", ("no weights", NO_WEIGHTS, remove(WEIGHTS))),
    *cases(COPY_AND_LOAD, "--model", ("weights are a folder", NO_WEIGHTS, folder(WEIGHTS))),
    *cases(COPY_AND_LOAD, "--model", ("weights are a link to itself", NO_WEIGHTS, loop(WEIGHTS))),
    *_models(WITH_WEIGHTS, ("cut short", "model.safetensors", cut(WEIGHTS, 0.6))),
    *_models(
        COPY_AND_LOAD,
        ("empty", "model.safetensors", write(WEIGHTS, "")),
        (
            "not safetensors",
            "model.safetensors",
            write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        ),
        ("header of 2^60 bytes", "model.safetensors", write(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}")),
        ("a tensor missing", KEY, tensors(WEIGHTS, without(KEY))),
        (
            "a tensor too many",
            "odd",
            tensors(WEIGHTS, lambda found: found | {"model.odd.weight": found[KEY].clone()}),
        ),
        (
            "a tensor of another shape",
            KEY,
            tensors(WEIGHTS, lambda found: found | {KEY: found[KEY][:-1].clone()}),
        ),
        ("cut .bin", "pytorch_model.bin", old_bin, cut("model/pytorch_model.bin", 0.5)),
        # shards
        ("a shard missing", "model-00002-of", sharded, remove("model/model-00002-of-00002.safetensors")),
        ("a shard cut short", "model-00002-of", sharded, cut("model/model-00002-of-00002.safetensors", 0.7)),
        ("index is not JSON", "index.json", sharded, write(INDEX, "{")),
        ("index is a list", "index.json", sharded, write(INDEX, "[]")),
        ("index without a map", "index.json", sharded, write(INDEX, "{}")),
        ("index of numbers", "index.json", sharded, index(lambda found: dict.fromkeys(found, 7))),
        (
            "index out of the folder",
            r"\.\./",
            sharded,
            index(lambda found: {key: f"../outside/{file}" for key, file in found.items()}),
            _move_shards,
        ),
        ("index to a file", "/etc/passwd", sharded, index(lambda found: dict.fromkeys(found, "/etc/passwd"))),
        (
            "index that swaps the shards",
            "(index|shard|model-0000)",
            sharded,
            index(lambda found: dict(zip(found, reversed(found.values()), strict=True))),
        ),
        ("index without one tensor", KEY, sharded, index(without(KEY))),
    ),
    # tokenizer and chat template
    *_models(
        ("generate_model_gt_data", "process_gt_data"),
        ("tokenizer.json missing", "tokenizer", remove(TOKENIZER)),
        ("no chat template", "give an instruction-tuned", remove("model/chat_template.jinja")),
        ("ids beyond the vocabulary", "(vocabulary|300)", more_tokens(60)),
    ),
    *_models(
        "process_gt_data",
        ("no tokenizer files", "tokenizer", remove(TOKENIZER, TOKENIZER_CONFIG)),
        ("tokenizer.json is not JSON", "tokenizer", write(TOKENIZER, "{")),
        ("tokenizer.json is another's", "tokenizer", write(TOKENIZER, '{"version": "1.0"}')),
        ("tokenizer_config.json is not JSON", "tokenizer", write(TOKENIZER_CONFIG, "{")),
        ("tokenizer_config.json is a list", "tokenizer", write(TOKENIZER_CONFIG, "[]")),
        ("tokenizer a folder", "tokenizer", folder(TOKENIZER)),
    ),
    *_templates(
        ("generate_model_gt_data", "process_gt_data"),
        ("that refuses", "{{ raise_exception('not\nme') }}"),
        ("that is none", "{% for message in %}"),
        ("that divides by 0", "{{ 1 // 0 }}"),
        ("that adds text and number", "{{ 'a' + 1 }}"),
        ("that changes messages", "{{ messages.append(messages[0]) }}"),
        ("that leaves all out", "hello"),
        ("that rewrites", REWRITES),
    ),
    *_templates("generate_model_gt_data", ("of 99 terabytes", "{{ 'x' * 99999999999999 }}")),
    # GGUF files
    *_ggufs(
        ALL,
        ("missing", "no such file", write("other.gguf", "")),
        ("cut in the weights", "truncated", *_spoilt(cut("tiny.gguf", 0.9))),
        ("of parallel blocks", "falcon.*side by side", gguf("tiny.gguf", architecture="falcon")),
    ),
    *_ggufs(
        ("unscaled_ckpt", "process_gt_data"),
        ("a folder", "holds no config.json", folder("tiny.gguf")),
        ("is a link to itself", "links", loop("tiny.gguf")),
        ("empty", "not a GGUF file", write("tiny.gguf", "")),
        ("text", "not a GGUF file", write("tiny.gguf", "{}" * 100)),
        ("wrong magic", "not a GGUF file", *_spoilt(head("tiny.gguf", b"GGML"))),
        ("version 1", "GGUF", *_spoilt(head("tiny.gguf", b"GGUF\x01\0\0\0"))),
        ("cut in the header", "truncated", *_spoilt(cut("tiny.gguf", 0.00005))),
        ("cut in the metadata", "truncated", *_spoilt(cut("tiny.gguf", 0.01))),
        ("first of two parts", "llama-gguf-split --merge", gguf("tiny.gguf", **{"split.count": 2})),
        ("without chat template", "chat template", gguf("tiny.gguf", template="")),
        ("of an unknown architecture", "gptj", gguf("tiny.gguf", architecture="gptj")),
        ("of an encoder", "'t5' is not supported; ", gguf("tiny.gguf", architecture="t5")),
        ("architecture with escapes", "cannot read", gguf("tiny.gguf", architecture="\x1b[31mllama\n")),
        ("without its heads", "", gguf("tiny.gguf", head_count=None)),
        ("without a tensor", "holds [0-9,]+ weights", gguf("tiny.gguf", **{UP: None})),
        ("without a tokenizer", "", gguf("tiny.gguf", tokens=False)),
    ),
]
