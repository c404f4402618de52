"""Tiny random models of every family, and a tokenizer with a chat template, made once a session."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
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
FAMILY_SIZES = {
    "llama": {},
    "qwen2": {},
    "granite": dict(
        residual_multiplier=0.5, embedding_multiplier=6.0, logits_scaling=4.0, attention_multiplier=0.2
    ),
    "mistral": dict(sliding_window=None),
    "qwen3": dict(head_dim=8),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stock_config(family: str, **changes):
    """A tiny stock config of a family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **(SIZES | FAMILY_SIZES[family] | changes))


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


PROGRESS_BAR = re.compile(r"\[\d\d:\d\d.*/ ?\w+\]$")


def check_refused(script, arguments, message: str, capsys) -> None:
    """A script's main refuses: exit code 2, nothing on stdout, one line on stderr like `message`.

    Progress bars may come before it, where the input can only be judged after some work.
    """
    capsys.readouterr()
    try:
        code = script.main(arguments)
    except SystemExit as exit_from_argparse:
        code = exit_from_argparse.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.strip() and not PROGRESS_BAR.search(line)]
    assert len(lines) == 1 and re.search(message, lines[0]), captured.err


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family, **config changes) -> folder of a tiny random stock model with tokenizer."""
    made: dict[tuple, Path] = {}

    def make(family: str = "llama", **changes) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(f"tiny-{family}", numbered=True)
            AutoModelForCausalLM.from_config(stock_config(family, **changes)).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
