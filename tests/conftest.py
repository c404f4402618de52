"""Tiny random models of every family, and a tokenizer with a chat template, made once a session."""

import os
import sys
import tempfile
from pathlib import Path

# The suite runs in several processes at once, and they start others: a thread each. None asks the hub, and
# what libraries keep goes with the session. All this before they are imported.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": (CACHES := tempfile.TemporaryDirectory(prefix="hopscotch-tests-")).name,
    "HF_MODULES_CACHE": f"{CACHES.name}/modules",
}

import pytest
import torch
from bad_inputs import running

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
torch.set_num_threads(1)

SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.2,
)
GRANITE = dict(
    residual_multiplier=0.5, embedding_multiplier=6.0, logits_scaling=4.0, attention_multiplier=0.2
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = dict(sliding_window=5, layer_types=[SLIDING, FULL, SLIDING, FULL])
DELTA_NET = dict(
    layer_types=[LINEAR, FULL, LINEAR, FULL, FULL],
    num_hidden_layers=5,
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
# What a tiny model of each family needs besides SIZES.
FAMILY_SIZES = {
    "llama": {},
    "qwen2": {},
    "granite": GRANITE,
    "mistral": dict(sliding_window=None),
    "qwen3": dict(head_dim=8),
}
MORE_FAMILIES = {
    "ministral3": dict(head_dim=8),
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | dict(head_dim=8, decoder_sparse_step=2),
    "qwen3_next": EXPERTS | DELTA_NET | dict(shared_expert_intermediate_size=24),
    "qwen3_5_text": DELTA_NET,
    "smollm3": dict(no_rope_layers=[1, 0, 1, 0]),
    "granite_swa": GRANITE | MIXED,
    "granitemoehybrid": GRANITE
    | EXPERTS
    | dict(
        layer_types=[LINEAR, FULL, LINEAR, FULL, FULL],
        num_hidden_layers=5,
        shared_intermediate_size=24,
        position_embedding_type="rope",
        mamba_n_heads=8,
        mamba_d_state=8,
        mamba_d_head=8,
    ),
    "phi3": dict(original_max_position_embeddings=512),
    "phimoe": EXPERTS,
    "gemma": dict(head_dim=8),
    "gemma2": MIXED
    | dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=8)
    | dict(sliding_window=5, layer_types=[SLIDING, SLIDING, FULL, SLIDING]),
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "exaone4": MIXED,
    "gpt_oss": EXPERTS | MIXED | dict(head_dim=8),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "seed_oss": dict(head_dim=8),
    "starcoder2": {},
}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stock_config(family: str, **changes):
    """A tiny stock config of a family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(SIZES | (FAMILY_SIZES | MORE_FAMILIES)[family] | changes))


def byte_tokenizer():
    """A tokenizer of 256 bytes and the special tokens of CHAT_TEMPLATE; 300 ids at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def pytest_collection_modifyitems(items):
    """The longest file first: of `make test`'s workers, none is left alone with it in the end."""
    items.sort(key=lambda item: item.path.name != "test_vllm.py")


def pytest_unconfigure():
    CACHES.cleanup()


def check_refused(script, arguments, message: str, capsys) -> None:
    """A script's main refuses, as `running.check_refused` says."""
    capsys.readouterr()
    try:
        code = script.main(arguments)
    except SystemExit as exit_from_argparse:
        code = exit_from_argparse.code
    running.check_refused(running.Outcome(code, *capsys.readouterr()), message)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family, **config changes) -> folder of a tiny random stock model with tokenizer."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "llama", **changes) -> Path:
        key = (family, repr(sorted(changes.items())))
        if key not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(f"tiny-{family}", numbered=True)
            AutoModelForCausalLM.from_config(stock_config(family, **changes)).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def commands(tiny_folder, tmp_path_factory):
    """Every command line of the suite (`driving.Commands`)."""
    from driving import Commands

    return Commands(tiny_folder(), tmp_path_factory.mktemp("inputs"))
