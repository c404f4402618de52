"""A checkpoint, and what is made of it, reads and writes text as its base model does."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_SIZES, MORE_FAMILIES, ROOT, stock_config
from test_labels import ENDS, SHAPES, tokenizer_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import unscaled_ckpt
from hopscotch_common import checkpoints
from hopscotch_common.answers.labels import samples_of
from hopscotch_common.answers.prompts import prompt_ids
from hopscotch_common.checkpoints.__main__ import verify
from hopscotch_common.errors import InputError
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading import tokenization
from hopscotch_common.loading.models import model_ref

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "<|im_end|>"]
IN_TURNS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '</s>' if m.role != 'user' }}{% endfor %}"
TEXT = "In 2023, 650,841 apples;  two\ttabs\n\n naïve café 你好 😀 [INST] x<|im_end|></s> y=3.14"
WORDS = ["2023 2023 650 650 841 841 In the year 2023, 650 apples"] * 4
# The classes that the hub's models of a family name in tokenizer_config.json.
CLASSES = {
    "llama": ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"],
    "mistral": ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"],
    "ministral3": ["TokenizersBackend", "LlamaTokenizerFast"],
    "mixtral": ["LlamaTokenizerFast", "LlamaTokenizer"],
    "phi3": ["LlamaTokenizer", "GPT2Tokenizer", "LlamaTokenizerFast"],
    "phimoe": ["LlamaTokenizerFast"],
    "gemma": ["GemmaTokenizer", "GemmaTokenizerFast"],
    "gemma2": ["GemmaTokenizer", "GemmaTokenizerFast"],
    "gemma3_text": ["GemmaTokenizer", "GemmaTokenizerFast"],
    "granite": ["GPT2Tokenizer", "GPT2TokenizerFast"],
    "granite_swa": ["GPT2Tokenizer"],
    "granitemoehybrid": ["GPT2Tokenizer"],
    "starcoder2": ["GPT2Tokenizer", "GPT2TokenizerFast"],
    "olmo2": ["GPT2Tokenizer", "PreTrainedTokenizerFast"],
    "olmo3": ["GPT2Tokenizer"],
    "olmoe": ["GPTNeoXTokenizer", "GPTNeoXTokenizerFast"],
    "glm": ["PreTrainedTokenizerFast"],
    "glm4": ["PreTrainedTokenizer", "PreTrainedTokenizerFast"],
}
QWEN = ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"]
CASES = [
    (family, name)
    for family in sorted(FAMILY_SIZES | MORE_FAMILIES)
    for name in CLASSES.get(family, QWEN if "qwen" in family else ["PreTrainedTokenizerFast"])
]


def digits_apart() -> Tokenizer:
    """A byte-level BPE that splits digits one by one, though its merges know more of them."""
    made = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = whole, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=296, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator(WORDS, trainer)
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, whole])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def with_spaces_as_letters() -> Tokenizer:
    """A BPE in sentencepiece's manner: ▁ for a space, bytes for what is unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=299, special_tokens=special))
    return made


def write_base(folder, family: str, tokenizer: Tokenizer, name: str, weights: bool = True, **more):
    """A tiny model whose tokenizer_config.json names a class."""
    stock_config(family).save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(stock_config(family)).save_pretrained(folder)
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more)
    wrapped.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    return folder


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def says(folder) -> tuple[list[int], str]:
    """TEXT's ids, and what they decode to, as anybody reads a folder that has no code of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer.encode(TEXT)
    return ids, tokenizer.decode(ids)


@pytest.mark.parametrize("make", [digits_apart, with_spaces_as_letters])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_checkpoint_reads_text_as_its_base(tmp_path, family, name, make):
    base = write_base(tmp_path / "base", family, make(), name, weights=False)
    expected = says(base)
    if make is digits_apart:  # byte-level: as the file says, whatever class is named
        ids = [1, *make().encode(TEXT, add_special_tokens=False).ids]
        expected = ids, make().decode(ids, skip_special_tokens=False)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    shutil.copyfile(base / "config.json", checkpoint / "config.json")
    edit(checkpoint / "config.json", model_type=f"hopscotch_{family}")
    tokenization.copy_tokenizer(base, checkpoint)
    assert says(checkpoint) == expected
    named = json.loads((checkpoint / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"  # TokenizersBackend is not known to transformers 4
    for folder in (base, checkpoint):
        tokenizer = tokenization.read_tokenizer(folder)
        assert (tokenizer.encode(TEXT), tokenizer.decode(expected[0])) == expected


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[Path, list[Path]]:
    """Base model -> its checkpoint and exports; two families."""
    made = {}
    for family, name in (("granite", "GPT2Tokenizer"), ("mistral", "LlamaTokenizerFast")):
        root = tmp_path_factory.mktemp(family)
        base = write_base(root / "base", family, digits_apart(), name, chat_template="{{ messages }}")
        values = torch.ones(4, 4)
        values[1, 0] = 0
        checkpoints.save_checkpoint(root / "checkpoint", model_ref(str(base)), [1], values, {})
        for form in ("folded", "nemotron_nas"):
            export_checkpoint(root / "checkpoint", form, root / form, device="cpu")
        made[base] = [root / "checkpoint", root / "folded", root / "nemotron_nas"]
    return made


def test_so_do_its_exports(made):
    for base, folders in made.items():
        for folder in folders:
            assert says(folder) == says(base)
            assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_so_does_vllm(made):
    program = (
        "import json, sys\n"
        "from hopscotch_common import vllm_plugin\nfrom vllm.tokenizers import get_tokenizer\n"
        "vllm_plugin.register()\n"
        "print(json.dumps([get_tokenizer(f).encode(sys.argv[1]) for f in sys.argv[2:]]))\n"
    )
    run = [sys.executable, "-c", program, TEXT, *(str(folder) for group in made.values() for folder in group)]
    found = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=True)
    expected = [says(base)[0] for base, folders in made.items() for _ in folders]
    assert json.loads(found.stdout.splitlines()[-1]) == expected


def test_an_older_checkpoint_is_still_read_as_its_base(tmp_path):
    """One whose files are the base's, with a class that transformers takes from them."""
    base = write_base(tmp_path / "base", "granite", digits_apart(), "GPT2Tokenizer")
    expected = says(base)
    edit(base / "config.json", model_type="hopscotch_granite")
    assert says(base) != expected  # what transformers makes of it by itself
    assert tokenization.read_tokenizer(base).encode(TEXT) == expected[0]


def test_verify_finds_another_tokenizer(tmp_path):
    base = write_base(tmp_path / "base", "granite", digits_apart(), "GPT2Tokenizer")
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(base)), [1], torch.ones(4, 4), {})
    verify(tmp_path / "c")
    edit(tmp_path / "c" / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(InputError, match="reads text otherwise than the base model's: token"):
        verify(tmp_path / "c")


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "LlamaTokenizerFast"), ("qwen3", "LlamaTokenizerFast"), ("exaone4", "GPT2Tokenizer")],
)
def test_a_byte_level_file_is_read_as_it_is(tmp_path, family, name, caplog):
    """DeepSeek-R1-Distill-Llama in a folder, and others whose class is not their file's."""
    base = write_base(tmp_path / "base", family, digits_apart(), name, chat_template=IN_TURNS)
    asked, said = "In 2023, 650,841 apples;  two\ttabs\n\n naïve café 你好 😀 y=3.14", "650 apples"
    question, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": said}
    in_file = [digits_apart().encode(text, add_special_tokens=False).ids for text in (asked, said + "</s>")]
    assert AutoTokenizer.from_pretrained(base).encode(asked) != [1, *in_file[0]]  # what would be wrong
    tokenizer = tokenization.load_tokenizer(model_ref(str(base)))
    assert prompt_ids(tokenizer, [question], "here") == [1, *in_file[0]]
    assert "as a " + name.removesuffix("Fast") + " it would split text otherwise" in caplog.text
    (sample,) = samples_of(("here", {"messages": [question, answer]}), tokenizer, {2})
    assert sample["input_ids"] == [1, *in_file[0], *in_file[1]]
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(base)), [1], torch.ones(4, 4), {})
    export_checkpoint(tmp_path / "c", "folded", tmp_path / "folded", device="cpu")
    for folder in (tmp_path / "c", tmp_path / "folded"):
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        assert (found.encode(asked), found.bos_token) == ([1, *in_file[0]], "<s>")
    by_id = tokenization.read_tokenizer(base, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    assert by_id.encode(asked) == [1, *in_file[0]]  # transformers' own rule for these


PADDING = dict(strategy={"Fixed": 400}, direction="Right", pad_to_multiple_of=None)
PADDING |= dict(pad_id=3, pad_type_id=0, pad_token="<pad>")
TRUNCATION = dict(direction="Right", max_length=9, strategy="LongestFirst", stride=0)


def test_a_setting_of_the_class_is_kept(tmp_path):
    """A space before each text is no part of a byte-level file: tokenizer_config.json may ask for it."""
    whole = digits_apart()
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base = write_base(tmp_path / "base", "llama", whole, "GPT2Tokenizer", weights=False)
    edit(base / "tokenizer_config.json", add_prefix_space=True)
    edit(base / "tokenizer.json", padding=PADDING, truncation=TRUNCATION)  # as a trainer leaves them
    assert tokenization.read_tokenizer(base).encode("x") == [
        1,
        *whole.encode(" x", add_special_tokens=False).ids,
    ]


def test_an_old_map_of_special_tokens_beside_it_changes_nothing(tiny_folder, tmp_path):
    """Of a base whose tokenizer_config.json alone somebody fixed; and its code, which does not travel."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(base)
    added = {str(i): token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
    code = {"auto_map": {"AutoTokenizer": ["elsewhere.Own", None]}}
    edit(base / "tokenizer_config.json", added_tokens_decoder=added, eos_token="<|im_start|>", **code)
    (base / "special_tokens_map.json").write_text('{"eos_token": "<pad>", "bos_token": "<pad>"}')
    expected = tokenization.load_tokenizer(model_ref(str(base)))
    assert expected.eos_token == "<|im_start|>"
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(str(base)), [1], torch.ones(4, 4), {})
    verify(tmp_path / "c")
    found = AutoTokenizer.from_pretrained(tmp_path / "c", trust_remote_code=False)
    messages = [{"role": "user", "content": "hi"}]
    for mine, theirs in ((found, expected), (tokenization.read_tokenizer(tmp_path / "c"), expected)):
        assert (mine.eos_token, mine.bos_token) == (theirs.eos_token, theirs.bos_token)
        assert mine.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    edit(tmp_path / "c" / "tokenizer_config.json", eos_token="<pad>")
    with pytest.raises(InputError, match="its tokenizer has .*'eos_token': '<pad>'.* base model's"):
        verify(tmp_path / "c")


def test_further_chat_templates_travel_along(tiny_folder, tmp_path):
    """Hermes has one for tools; transformers keeps it in a folder."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    assert (
        tokenization.load_tokenizer(model_ref(str(base))).chat_template == tokenizer.chat_template["default"]
    )
    first, second = tmp_path / "e0", tmp_path / "e1"
    save = functools.partial(checkpoints.save_checkpoint, skipped=[1], values=torch.ones(4, 4), run={})
    save(first, model_ref(str(base)))
    (first / ".ipynb_checkpoints").mkdir()  # what a notebook leaves
    save(second, model_ref(str(base)), share_with=first)
    verify(second)
    assert (
        AutoTokenizer.from_pretrained(second, trust_remote_code=False).chat_template
        == tokenizer.chat_template
    )
    (second / "additional_chat_templates" / "code.py").write_text("")
    with pytest.raises(InputError, match="additional_chat_templates: is no part of a checkpoint"):
        verify(second)


@pytest.mark.parametrize(
    ("family", "left"),
    [("llama", []), ("qwen2", []), ("qwen2", ["tokenizer_config.json"]), ("gemma", [])],
)
def test_of_a_base_without_tokenizer_none_is_made_up(tiny_folder, tmp_path, family, left, capsys):
    """transformers makes one of the special tokens alone for some families, and reads all text as nothing."""
    base = shutil.copytree(tiny_folder(family), tmp_path / "base")
    for name in {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} - set(left):
        (base / name).unlink()
    common = ["--model", str(base), "--blocks_to_skip", "1", "--output_dir", str(tmp_path)]
    assert unscaled_ckpt.main([*common, "--export", "folded", "--device", "cpu"]) == 0
    warnings = capsys.readouterr().err
    assert "has no tokenizer that can be loaded" in warnings and "positions of random tokens" in warnings
    for folder in (tmp_path / "base_unscaled", tmp_path / "base_unscaled_folded"):
        assert {path.name for path in folder.glob("token*")} == set(left)
    assert checkpoints.read_run(tmp_path / "base_unscaled")["tokenizer"] is None
    with pytest.raises(InputError, match="base: its tokenizer cannot be loaded"):
        tokenization.load_tokenizer(model_ref(str(base)))


@pytest.mark.parametrize(
    ("family", "name", "pattern"),
    [("llama", "tekken.json", "tekken_*"), ("gemma", "tokenizer.model", "*.model.*")],
)
def test_one_kept_in_another_file_is_read(tmp_path, family, name, pattern):
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    stock_config(family).save_pretrained(tmp_path)
    shutil.copyfile(next(data.glob(pattern)), tmp_path / name)
    assert len(tokenization.read_tokenizer(tmp_path)) > 30_000


def test_mistrals_own_tokenizer_is_left_out(tiny_folder, tmp_path):
    """Where mistral_common is installed, transformers prefers it for these, and it has no chat template."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    base = shutil.copytree(tiny_folder("mistral"), tmp_path / "base")
    shutil.copyfile(next(data.glob("tekken_*.json")), base / "tekken.json")
    found = tokenization.load_tokenizer(model_ref(str(base)))
    assert found.encode(TEXT) == AutoTokenizer.from_pretrained(tiny_folder("mistral")).encode(TEXT)
    values = torch.ones(4, 4)
    checkpoints.save_checkpoint(tmp_path / "checkpoint", model_ref(str(base)), [1], values, {})
    verify(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "tekken.json").exists()
    export_checkpoint(tmp_path / "checkpoint", "folded", tmp_path / "folded")
    assert AutoTokenizer.from_pretrained(tmp_path / "folded").encode(TEXT) == found.encode(TEXT)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_token_that_ends_a_turn(shape):
    template, ends, *_ = SHAPES[shape]
    tokenizer = tokenizer_of(template, False)
    assert tokenizer.decode([tokenization.end_of_turn(tokenizer)]) == ENDS.get(shape, ends)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<|user|>?"
    assert tokenization.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")
    for none in (
        "{{ messages[1].content }} and no more",
        "{{ messages[0].content }}",
        "{{ nothing.at.all }}",
    ):
        tokenizer.chat_template = none
        assert tokenization.end_of_turn(tokenizer) is None


def test_what_ends_an_answer(tiny_folder, tmp_path):
    """As transformers' generate() ends it, and where the chat template ends a turn."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<pad>"
    edit(base / "generation_config.json", eos_token_id=[7, 8])
    assert tokenization.stop_token_ids(base, tokenizer) == {0, 2, 7, 8}
    (base / "generation_config.json").unlink()
    edit(base / "config.json", eos_token_id=9)
    assert AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id == 9
    assert tokenization.stop_token_ids(base, tokenizer) == {0, 2, 9}
