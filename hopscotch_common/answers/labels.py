"""Step 2: which tokens of a conversation are the model's, and count for the loss."""

import os

from hopscotch_common.answers.prompts import ANSWER_IDS, PROMPT_IDS, answer_text, parts_of, prompt_ids, render
from hopscotch_common.answers.records import messages_of
from hopscotch_common.errors import InputError
from hopscotch_common.training import IGNORE_INDEX


def samples_of(placed: tuple[str, dict], tokenizer, stop_ids: set[int]) -> list[dict]:
    """Return the samples {input_ids, labels} of one record: each answer after a user message counts once.

    A record usually gives one sample. If a template leaves out the reasoning of earlier answers, each of
    these has a sample of its own, as the model said it. placed: (where, record). Raises InputError unless the
    record is a conversation that ends with an answer, and for what the chat template refuses or leaves out.
    """
    where, record = placed
    messages = messages_of(record, where)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message is not the assistant's, there is no answer to train on")
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise InputError(f"{where}: has an answer to nothing, so there is none to train on; leave it out")
    if ANSWER_IDS in record:
        return [_said(record, messages, tokenizer, where)]
    messages = [split_reasoning(message, tokenizer) for message in messages]

    def encode(text: str):
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    whole = render(tokenizer, messages, where)
    spans, samples = [], []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        last = index == len(messages) - 1
        text = whole if last else render(tokenizer, messages[: index + 1], where)
        before = render(tokenizer, messages[:index], where, add_generation_prompt=True)
        encoded = encode(text)
        start = len(before)
        if not text.startswith(before):
            start = _first_difference(encode(before), encoded)
            # Not in the generation prompt, in which a short question may also occur: "hi" in "<think>".
            read = os.path.commonprefix([before, render(tokenizer, messages[:index], where)])
            asked = messages[index - 1]["content"].strip()
            if start < read.rfind(asked) + len(asked):
                raise InputError(
                    f"{where}: the model's chat template writes what stands before answer {index + 1} "
                    "otherwise once the answer stands there; join messages that follow one another, or "
                    "leave it out"
                )
        reasoning = (message.get("reasoning_content") or "").strip()
        place = text.find(reasoning, start)
        behind = start if place < 0 else place + len(reasoning)  # the answer's text may also occur in it
        end = _end_of_turn(encoded, message["content"].strip(), text, behind, (stop_ids, special))
        if whole[:end] == text[:end]:
            spans.append((start, end))
        else:
            samples.append(_sample(encoded, [(start, end)]))
    return [*samples, _sample(encode(whole), spans)]


def _said(record: dict, messages: list[dict], tokenizer, where: str) -> dict:
    """Return the sample of an answer of step 1: the tokens that the model read, and those that it said.

    If the former were left out, because the messages were edited, the chat template makes them from the
    messages. Raises InputError for tokens that do not belong to the messages beside them.
    """
    *asked, said = messages
    answer = _ids(record, ANSWER_IDS, where)
    _check_answer(answer, record.get("finish_reason"), said["content"], tokenizer, where)
    if PROMPT_IDS in record:
        prompt = _ids(record, PROMPT_IDS, where)
        _check_prompt(prompt, asked, tokenizer, where)
    else:
        prompt = prompt_ids(tokenizer, asked, where)
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def _ids(record: dict, field: str, where: str) -> list[int]:
    ids = record[field]
    if not (isinstance(ids, list) and ids and all(type(t) is int and 0 <= t < 2**31 for t in ids)):
        raise InputError(f"{where}: {field!r} is no list of token ids; make it again with step 1")
    return ids


def _check_answer(ids: list[int], reason: str | None, text: str, tokenizer, where: str) -> None:
    """Raise InputError unless the ids of an answer of step 1 are what step 1 decoded to the text beside them.

    The reason why the answer ended tells whether step 1 decoded the last id, too. The tokens that ended
    answers then are not consulted: a model's generation_config.json may have changed since.
    """
    decoded = [ids] if reason == "length" else [ids[:-1], ids]
    if not any(answer_text(tokenizer, part) == text for part in decoded):
        raise InputError(
            f"{where}: {ANSWER_IDS!r} do not read as the answer beside them: they are of another model, or "
            "the answer was edited; give the model that said it, or leave that field out to train on the text"
        )


def _check_prompt(ids: list[int], messages: list[dict], tokenizer, where: str) -> None:
    """Raise InputError unless the decoded ids contain each of the messages, as `render` made sure in step 1.

    A template may leave out parts of earlier answers, and the tokenizer may normalize what it reads.
    """
    text = tokenizer.decode(ids)
    for message in messages:
        parts = [part for part in parts_of(message) if part not in text]
        as_read = [tokenizer.decode(tokenizer.encode(part, add_special_tokens=False)) for part in parts]
        if message["role"] != "assistant" and any(part.strip() not in text for part in as_read):
            raise InputError(
                f"{where}: {PROMPT_IDS!r} do not hold the {message['role']} message: the prompt was edited; "
                "make it again with step 1, or leave that field out to put what it is now before the answer"
            )


def _first_difference(before, encoded) -> int:
    """Return where an answer begins in a text that does not begin with its prompt: at the first other token.

    A generation prompt may open a <think>, for example, that the template writes in no answer.
    """
    same = len(os.path.commonprefix([before["input_ids"], encoded["input_ids"]]))
    return [*encoded["offset_mapping"], (encoded["offset_mapping"][-1][1],)][same][0]


def _end_of_turn(encoded, content: str, text: str, start: int, ends: tuple[set[int], ...]) -> int:
    """Return where the last answer of a text, `content`, ends: after the token that ends generation.

    ends: sets of such tokens; if the template writes none of the first set, one of the next set is taken.
    """
    place = text.find(content, start)
    content_end = (text.rindex(content) if place < 0 else place) + len(content)
    for tokens in ends:
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token in tokens and end > content_end:
                return end
    return content_end


def _sample(encoded, spans: list[tuple[int, int]]) -> dict:
    """Make a sample in which the tokens within a span of characters count."""

    def counts(first: int, last: int) -> bool:
        # Some tokenizers leave spaces out of the offsets; a token of only spaces then has just its end.
        return any(
            last <= end and (first >= start if first < last else first > start) for start, end in spans
        )

    labels = [
        token if counts(*offsets) else IGNORE_INDEX
        for token, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def split_reasoning(message: dict, tokenizer) -> dict:
    """Move an answer's <think> part to `reasoning_content`, for chat templates that tell the two apart.

    An answer that opens no thought has none, unless the generation prompt opens it.
    """
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return message
    head, end, answer = message["content"].partition("</think>")
    if not end or "reasoning_content" not in tokenizer.chat_template:
        return message
    if not head.lstrip().startswith("<think>"):
        asked = [{"role": "user", "content": "?"}]
        prompt = render(tokenizer, asked, "a question", add_generation_prompt=True)
        if "<think>" in head or not prompt.rstrip().endswith("<think>"):
            return message
    reasoning = head.lstrip().removeprefix("<think>").strip("\n")
    return message | {"content": answer.lstrip("\n"), "reasoning_content": reasoning}
