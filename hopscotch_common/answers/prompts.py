"""The prompts of step 1: where they come from, their token ids, and the answers kept during a run."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hopscotch_common.answers.records import hub_records, messages_of, read_records
from hopscotch_common.errors import InputError, logger, progress, reason_of
from hopscotch_common.loading.models import ModelRef, context_length
from hopscotch_common.resumable import ResumableLog

EMBEDDED_PROMPTS = Path(__file__).parents[2] / "examples" / "math_problems.jsonl"
LOCAL_PROMPTS = Path("gsm8k.jsonl")
HUB_PROMPTS = "openai/gsm8k"
KIND = "the answers of an earlier run"
REMEDY = "remove it to start anew, or name another --output_file"
FLAGS = re.compile("/no_think|/think|/system_override")  # SmolLM3's template obeys these, and leaves them out
ANSWER_IDS, PROMPT_IDS = "answer_token_ids", "prompt_token_ids"  # fields of step 1's answers


@dataclass(frozen=True)
class Prompt:
    """Messages to answer, and where they came from (file and line) for error messages."""

    messages: list[dict]
    where: str


def render(tokenizer, messages: list[dict], where: str, **options) -> str:
    """Return the messages in the tokenizer's chat template, as text.

    A developer message becomes a system message if the template knows no developer. Raises InputError for
    whatever the template raises, and if it leaves out or rewrites what was asked or the last answer,
    including its reasoning. Some templates leave out the reasoning of earlier answers, which is allowed.
    """
    text = _in_template(tokenizer, messages, where, **options)
    for message in messages:
        earlier_answer = message["role"] == "assistant" and message is not messages[-1]
        if not earlier_answer and any(part not in text for part in parts_of(message)):
            lost = message["role"] == "system" and messages[-1]["role"] == "assistant"  # Mistral v0.3, Nemo
            raise InputError(
                f"{where}: the model's chat template leaves out or rewrites part of the {message['role']} "
                f"message; leave it out, {'let step 1 answer it, ' * lost}or give another model"
            )
    reasoning = messages[-1].get("reasoning_content") or ""
    if reasoning.strip() and not options.get("add_generation_prompt"):
        last = {name: value for name, value in messages[-1].items() if name != "reasoning_content"}
        if _in_template(tokenizer, [*messages[:-1], last], where) == text:
            raise InputError(
                f"{where}: the model's chat template leaves out 'reasoning_content' of the last message; "
                "write it into the content as the model would, leave the record out, or give another model"
            )
    return text


def parts_of(message: dict) -> list[str]:
    """The parts of a message: its content or, for a system message, the text around FLAGS."""
    system = message["role"] in ("system", "developer")
    return [part.strip() for part in (FLAGS.split(message["content"]) if system else [message["content"]])]


def _in_template(tokenizer, messages: list[dict], where: str, **options) -> str:
    """Do as `render`, but without checking what the template leaves out."""
    if "developer" not in tokenizer.chat_template:
        system = {"role": "system"}
        messages = [m | system if m["role"] == "developer" else m for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is the model's code: it may raise anything
        raise InputError(
            f"{where}: the model's chat template refuses it: {reason_of(error)}; "
            "leave it out, or fix the message or the template"
        ) from error


def prompt_ids(tokenizer, messages: list[dict], where: str) -> list[int]:
    """What the model reads before it answers: `render` with the generation prompt, as token ids."""
    text = render(tokenizer, messages, where, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InputError for a token that the model has no embedding for."""
    if max(token_ids) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {max(token_ids)}, but the model's vocabulary has {vocab_size}; "
            "give --model a folder whose tokenizer and config.json are one model's"
        )


def prompt_of(record: dict, where: str, field: str | None = None) -> Prompt:
    """Return what a record asks, without its answers; raise InputError if there is nothing to answer."""
    messages = messages_of(record, where, field, answers=False)
    if not messages:
        raise InputError(f"{where}: only assistant messages, there is nothing to answer")
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}: no user message after the {messages[-1]['role']} message")
    return Prompt(messages, where)


def find_prompts(
    model: ModelRef,
    input_file: Path | None = None,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    field: str | None = None,
    num_samples: int | None = None,
) -> list[Prompt]:
    """Return the prompts of a file, of a data set on the hub or in a folder, or else a model's default ones.

    field: the one that holds text or messages, if it has another name. num_samples: read only the first so
    many records; the others are not checked.
    """
    if dataset is not None:
        records = hub_records(dataset, config, split)
    elif input_file is not None:
        records = read_records(input_file)
    elif model.embedded:
        records = read_records(EMBEDDED_PROMPTS)
    elif LOCAL_PROMPTS.is_file():
        logger.info("prompts from %s in this folder", LOCAL_PROMPTS)
        records = read_records(LOCAL_PROMPTS)
    else:
        records = hub_records(HUB_PROMPTS, "main", "train")
    prompts = [prompt_of(record, where, field) for where, record in itertools.islice(records, num_samples)]
    several = sum("user user" in " ".join(m["role"] for m in prompt.messages) for prompt in prompts)
    if several:
        logger.info("%d of %d records ask several times: all at once, without answers", several, len(prompts))
    return prompts


def tokenize(prompts: Sequence[Prompt], tokenizer, config) -> list[list[int]]:
    """Token ids of each prompt in the chat template, with the generation prompt.

    Raises InputError for a prompt that the template refuses, that holds a token beyond the vocabulary of the
    model's config, or that leaves no room for an answer in the model's context.
    """
    token_ids, context = [], context_length(config)
    for prompt in progress(prompts, "reading prompts"):
        ids = prompt_ids(tokenizer, prompt.messages, prompt.where)
        check_vocabulary(ids, config.vocab_size)
        if len(ids) >= context:
            raise InputError(
                f"{prompt.where}: {len(ids)} tokens leave no room for an answer in the model's "
                f"context of {context}; shorten it or leave it out"
            )
        token_ids.append(ids)
    return token_ids


def answer_text(tokenizer, ids: Sequence[int]) -> str:
    """Decode an answer's tokens, without the stop token; special tokens stay, as some mark the reasoning.

    gpt_oss answers in channels. Its text is the final channel, which is what it says to the user, and is
    empty if the answer ended before that.
    """
    channel, message = (tokenizer.added_tokens_encoder.get(mark) for mark in ("<|channel|>", "<|message|>"))
    if channel is None or message is None:
        return tokenizer.decode(ids)
    ids = list(ids)
    last = ids[len(ids) - ids[::-1].index(channel) :] if channel in ids else []
    if message not in last:
        return ""
    name, text = last[: last.index(message)], last[last.index(message) + 1 :]
    final = tokenizer.decode(name).strip().startswith("final")
    return tokenizer.decode(text, skip_special_tokens=True) if final else ""


def kept_answers(log: ResumableLog, prompts: Sequence[Prompt]) -> dict[int, dict]:
    """Return the answers of an interrupted run: index -> {"index": index, "messages": with the answer, ...}.

    log: of KIND. Raises InputError if it is for other prompts.
    """
    found: dict[int, dict] = {}
    for number, record in log.records:
        where = f"{log.path}, line {number}"
        match record:
            case {
                "index": int(index),
                "messages": [*asked, {"content": str()}],
                "finish_reason": "stop" | "length",
                "num_generated_tokens": int(),
            } if index >= 0:
                pass
            case _:
                raise InputError(f"{where}: not an answer of this script; {REMEDY}")
        if index >= len(prompts):
            continue  # an earlier run had more prompts
        if asked != prompts[index].messages:
            raise InputError(f"{where}: answers another prompt than {prompts[index].where}; {REMEDY}")
        found.setdefault(index, record)
    return found
