"""Where the prompts of step 1 come from, and their token ids in the model's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common.errors import InputError, logger, reason_of
from hopscotch_common.files import read_jsonl
from hopscotch_common.models import ModelRef, context_length

EMBEDDED_PROMPTS = Path(__file__).parents[2] / "examples" / "math_problems.jsonl"
LOCAL_PROMPTS = Path("gsm8k.jsonl")
HUB_PROMPTS = "openai/gsm8k"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """Messages to answer, and where they came from (file and line) for error messages."""

    messages: list[dict]
    where: str


def check_messages(messages, where: str) -> list[dict]:
    """The messages of a record, checked: a non-empty list of {role, content} with text in each."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: 'messages' must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: each message needs a 'role' and a 'content'")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{where}: the {message['role']} message has no content")
    return messages


def render(tokenizer, messages: list[dict], where: str, **options) -> str:
    """The messages in the tokenizer's chat template, as text.

    Raises InputError for whatever the template raises, and where it leaves out or rewrites what was
    asked or the last answer. Of earlier answers, some leave out the reasoning.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is code of the model's: it may raise anything
        raise InputError(
            f"{where}: the model's chat template refuses it: {reason_of(error)}; leave it out, or mend one"
        ) from error
    for message in messages:
        earlier_answer = message["role"] == "assistant" and message is not messages[-1]
        if not earlier_answer and message["content"].strip() not in text:
            raise InputError(
                f"{where}: the model's chat template leaves out or rewrites part of the {message['role']} "
                "message; leave it out, or give another model"
            )
    return text


def check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InputError for a token that the model has no embedding of."""
    if max(token_ids) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {max(token_ids)}, but the model's vocabulary has {vocab_size}; "
            "give --model a folder whose tokenizer and config.json are one model's"
        )


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file, every line checked. InputError names file and line."""
    return [prompt_of(record, f"{path}, line {number}") for number, record in read_jsonl(path)]


def prompt_of(record: dict, where: str) -> Prompt:
    """The prompt of one record with `messages` or `question`; InputError when there is none."""
    if "messages" in record:
        messages = record["messages"]
        if isinstance(messages, list):
            messages = [m for m in messages if not (isinstance(m, dict) and m.get("role") == "assistant")]
            if not messages and record["messages"]:
                raise InputError(f"{where}: only assistant messages, there is nothing to answer")
        messages = [
            {"role": message["role"], "content": message["content"]}
            for message in check_messages(messages, where)
        ]
        for message in messages:
            if message["role"] not in ROLES:
                raise InputError(f"{where}: role {message['role']!r} is not one of {', '.join(ROLES)}")
        if messages[-1]["role"] != "user":
            raise InputError(f"{where}: no user message after the system message")
        return Prompt(messages, where)
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: needs 'messages' or 'question' with text in it")
    return Prompt([{"role": "user", "content": question}], where)


def hub_prompts() -> list[Prompt]:
    """The training questions of openai/gsm8k; InputError when they cannot be fetched."""
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # without a network it would warn of each of its retries
    try:
        rows = load_dataset(HUB_PROMPTS, "main", split="train")
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"{HUB_PROMPTS} cannot be fetched from the Hugging Face hub ({type(error).__name__}): "
            f"give prompts with --input_file, or put them in {LOCAL_PROMPTS} in this folder"
        ) from error
    return [prompt_of(row, f"{HUB_PROMPTS}, row {number}") for number, row in enumerate(rows, 1)]


def find_prompts(input_file: Path | None, model: ModelRef) -> list[Prompt]:
    """The prompts of --input_file, or else the default ones."""
    if input_file is not None:
        return read_prompts(input_file)
    if model.embedded:
        return read_prompts(EMBEDDED_PROMPTS)
    if LOCAL_PROMPTS.is_file():
        logger.info("prompts from %s in this folder", LOCAL_PROMPTS)
        return read_prompts(LOCAL_PROMPTS)
    return hub_prompts()


def tokenize(prompts: Sequence[Prompt], tokenizer, config) -> list[list[int]]:
    """Token ids of each prompt in the chat template, with the generation prompt.

    Raises InputError for one that the template refuses, that holds a token beyond the vocabulary of the
    model's config, or that leaves no room for an answer in its context.
    """
    token_ids, context = [], context_length(config)
    for prompt in prompts:
        text = render(tokenizer, prompt.messages, prompt.where, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        check_vocabulary(ids, config.vocab_size)
        if len(ids) >= context:
            raise InputError(
                f"{prompt.where}: {len(ids)} tokens leave no room for an answer in the model's "
                f"context of {context}; shorten it or leave it out"
            )
        token_ids.append(ids)
    return token_ids


def answer_text(tokenizer, ids: Sequence[int]) -> str:
    """An answer's tokens, without the stop token, as text without special tokens.

    gpt_oss answers in channels: what it says to the user is the final one, and that is the text; empty where
    the answer ended before it.
    """
    channel, message = (tokenizer.added_tokens_encoder.get(mark) for mark in ("<|channel|>", "<|message|>"))
    if channel is None or message is None:
        return tokenizer.decode(ids, skip_special_tokens=True)
    ids = list(ids)
    last = ids[len(ids) - ids[::-1].index(channel) :] if channel in ids else []
    if message not in last:
        return ""
    name, text = last[: last.index(message)], last[last.index(message) + 1 :]
    final = tokenizer.decode(name).strip().startswith("final")
    return tokenizer.decode(text, skip_special_tokens=True) if final else ""
