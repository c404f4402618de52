"""Tokenizers: a model's own, and its copy in a checkpoint or export, which every reader reads as the same.

transformers chooses a tokenizer's class by the config's model type and the hub id if it knows these, and by
`tokenizer_class` otherwise. Some classes then rebuild the tokenizer, whatever tokenizer.json says. If the
result differs from a byte-level tokenizer.json (`byte_level_file`), the file is read as it is. Our own model
types would be read by yet another rule. So a checkpoint gets the tokenizer that the base effectively has, in
a tokenizer.json, under the one class that takes that file as it is.
"""

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from hopscotch_common.errors import InputError, as_os_error, logger, reason_of, warn_once
from hopscotch_common.files import read_json
from hopscotch_common.loading.models import ModelRef
from hopscotch_common.scales.modeling_hopscotch import PREFIX

AS_IT_IS = "PreTrainedTokenizerFast"  # TokenizersBackend's name before transformers 5, still understood
TOKENIZER_CONFIG = "tokenizer_config.json"
QUESTION = {"role": "user", "content": "?"}  # for a conversation that shows what a chat template writes
PROBE = "In 2023, 650,841 apples;  two spaces,\ta tab\n\nand lines: naïve café, 你好 😀 don't x_1=3.14e-5 "


def load_tokenizer(ref: ModelRef):
    """Load the model's tokenizer; raise InputError if no chat template tells prompts and answers apart."""
    folder = ref.folder(weights=False)
    try:
        tokenizer = read_tokenizer(folder, ref.source)
    except InputError:
        raise
    except Exception as error:  # the libraries may raise anything for a broken or missing file
        reason = reason_of(error)
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason}); check its files") from error
    if isinstance(tokenizer.chat_template, dict):  # it holds further templates, for tools
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise InputError(f"{ref.source}: its tokenizer has no chat template; give an instruction-tuned model")
    return tokenizer


def stop_token_ids(folder: Path, tokenizer) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's EOS, the generation config's, and the turn's.

    Without a generation config, the config's are used, as in transformers. Raises InputError for anything
    that is not an id.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        file = folder / "config.json"
    configured = read_json(file, "fetch the model again").get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    if any(type(token) is not int for token in ids if token is not None):
        raise InputError(f"{file}: 'eos_token_id' must be a token id or a list of them; fix it")
    return {tokenizer.eos_token_id, end_of_turn(tokenizer), *ids} - {None}


def end_of_turn(tokenizer) -> int | None:
    """Return the special token that the chat template writes after an answer; None if it writes none.

    Model files often name only the end of a text, and a model that ends its turn differently would go on.
    """
    answer = "Ω"
    text = _in_template(tokenizer, QUESTION, {"role": "assistant", "content": answer})
    _, found, behind = text.rpartition(answer)
    ids = tokenizer.encode(behind, add_special_tokens=False) if found else []
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in ids if token in special), None)


def leaves_out_beginning(tokenizer) -> bool:
    """Whether the chat template leaves out the token that begins a text, though there is one."""
    text = _in_template(tokenizer, QUESTION) if tokenizer.bos_token else ""
    return bool(text) and not text.lstrip().startswith(tokenizer.bos_token)


def _in_template(tokenizer, *messages: dict) -> str:
    """Return a conversation as text; empty if the chat template refuses it, or there is none."""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception:  # a template is the model's code: it may raise anything
        return ""


def read_tokenizer(folder: Path, source: str | None = None):
    """Read the tokenizer of a base model or checkpoint; no code in the folder runs.

    source: the model's hub id. Raises what the libraries raise for broken or missing files, and OSError if
    transformers would make up a tokenizer of only special tokens, without files.
    """
    values = read_json(folder / "config.json")
    kind = str(values.get("model_type"))
    stock_kind, named = kind.removeprefix(PREFIX), folder / TOKENIZER_CONFIG
    as_it_is = named.is_file() and read_json(named).get("tokenizer_class") == AS_IT_IS
    if stock_kind not in CONFIG_MAPPING or (kind != stock_kind and as_it_is):
        config = PreTrainedConfig()
    else:  # in an older checkpoint, the class is the base's
        config = CONFIG_MAPPING[stock_kind]()
        config.tokenizer_class = values.get("tokenizer_class")
    config._name_or_path = source or str(folder)  # transformers has rules for some ids
    # Mistral's own tokenizer, which transformers prefers if it is installed, has no chat template
    options = {"config": config, "trust_remote_code": False, "mistral_format": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise OSError("no tokenizer files")
    return byte_level_file(folder, tokenizer) or tokenizer


def byte_level_file(folder: Path, tokenizer):
    """Return the tokenizer of a byte-level tokenizer.json as it is, if `tokenizer`, rebuilt from it, differs.

    This is how transformers 4 read it. DeepSeek-R1-Distill-Llama names LlamaTokenizerFast, which version 5
    builds in sentencepiece's manner, so that each space is lost. Returns None if the two agree, and for files
    that are not byte-level: their classes know what the file does not say.
    """
    file = folder / "tokenizer.json"
    built_anew = isinstance(tokenizer, TokenizersBackend) and type(tokenizer) is not TokenizersBackend
    if not built_anew or not file.is_file():
        return None
    in_file = Tokenizer.from_file(str(file))
    in_file.no_padding()  # a trainer's settings may have been saved in it
    in_file.no_truncation()
    text = f" {PROBE}"  # with the space that `add_prefix_space`, a setting of the class, may add
    ids = in_file.encode(text, add_special_tokens=False).ids
    if "ByteLevel" not in repr(in_file.decoder) or ids == tokenizer.encode(text, add_special_tokens=False):
        return None
    said = "%s: tokenizer.json is read as it is; as a %s it would split text otherwise"
    warn_once(said, folder, type(tokenizer).__name__)
    return TokenizersBackend.from_pretrained(folder)


def probe(tokenizer) -> dict:
    """Return what tells tokenizers apart: a text with the special tokens, its ids, and BOS, EOS and PAD."""
    text = PROBE + " ".join(tokenizer.all_special_tokens)
    return {"text": text, "ids": tokenizer.encode(text), "ends": _ends(tokenizer)}


def _ends(tokenizer) -> dict:
    return {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}


def fingerprint(tokenizer) -> str:
    """SHA-256 of a text's ids: equal for tokenizers that read text alike.

    Special tokens are left out, as their list differs between copies of one tokenizer: a GGUF's names fewer.
    """
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def template_fingerprint(tokenizer) -> str:
    """SHA-256 of the chat template's text."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def copy_tokenizer(
    source: Path, folder: Path, hub_id: str | None = None, wanted: dict | None = None
) -> dict | None:
    """Write the tokenizer of `source` into `folder`, which has a config.json, so that readers agree on it.

    Returns its `probe`, None if `source` has no tokenizer. wanted: the base's, if `source` holds a copy
    itself. Raises InputError, naming a token, if what is read back gives other ids or another text.
    """
    try:
        tokenizer = read_tokenizer(source, hub_id)
    except Exception as error:
        logger.warning(
            "%s: has no tokenizer that can be loaded (%s); its files are copied", source, reason_of(error)
        )
        return None
    wanted = wanted or probe(tokenizer)
    save_as_it_is(tokenizer, folder)
    check_tokens(folder, wanted, tokenizer.decode(wanted["ids"]))
    return wanted


def save_as_it_is(tokenizer, folder: Path) -> None:
    """Write a tokenizer's files so that readers build the same one, whatever else is in the folder.

    Without `added_tokens_decoder`, which transformers leaves out, a reader would instead take the special
    tokens of a special_tokens_map.json, and a base model's may be an old one.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if found := as_os_error(error, folder):
            raise found from error
        raise
    path = folder / TOKENIZER_CONFIG
    values = read_json(path)
    values.pop("auto_map", None)  # names code that is not copied
    if isinstance(tokenizer, TokenizersBackend):
        added = {str(i): token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
        values |= {"tokenizer_class": AS_IT_IS, "added_tokens_decoder": added}
    path.write_text(json.dumps(values, indent=2) + "\n")


def check_tokens(folder: Path, wanted: dict, decoded: str | None = None) -> None:
    """Raise InputError unless a folder's tokenizer, as other tools read it, gives a `probe`'s ids."""
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = found.encode(wanted["text"])
    except Exception as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({reason_of(error)})") from error
    if (ends := _ends(found)) != wanted.get("ends", ends):
        raise InputError(
            f"{folder}: its tokenizer has {ends}, and the base model's {wanted['ends']}; copy the base's "
            "tokenizer into it, or make it again"
        )
    if ids != wanted["ids"]:
        pairs = enumerate(zip([*ids, None], [*wanted["ids"], None], strict=False))
        place, (ours, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        raise InputError(
            f"{folder}: its tokenizer reads text otherwise than the base model's: token {place} of a probe "
            f"is {ours}, not {theirs}; copy the base's tokenizer into it, or make it again"
        )
    if decoded is not None and found.decode(ids) != decoded:
        raise InputError(
            f"{folder}: its tokenizer writes tokens otherwise than the base model's; make it again"
        )


def check_copies(ref: ModelRef) -> None:
    """Raise InputError early if a checkpoint of a model could not have its tokenizer."""
    folder = ref.folder()
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(OSError):
        kind = read_json(folder / "config.json").get("model_type")
        (Path(scratch) / "config.json").write_text(json.dumps({"model_type": f"{PREFIX}{kind}"}))
        copy_tokenizer(folder, Path(scratch), ref.source)
