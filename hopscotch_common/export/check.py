"""Compare an exported model with the checkpoint it came from, on real tokens."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hopscotch_common.errors import logger

CONVERSATIONS = (
    (
        "A farmer has 12 hens. Each lays 5 eggs a week. How many eggs is that in 3 weeks?",
        "Each hen lays 5 eggs a week, so 12 hens lay 12 * 5 = 60 eggs a week. In 3 weeks that is "
        "60 * 3 = 180 eggs. The answer is 180.",
    ),
    (
        "Name the planets between the Sun and Jupiter, and say which of them is the largest.",
        "Mercury, Venus, Earth and Mars. The largest of these four is Earth.",
    ),
    (
        "Write a short Python function that returns the sum of the even numbers in a list.",
        "def sum_even(numbers):\n    return sum(n for n in numbers if n % 2 == 0)",
    ),
)
CONTINUATION_TOKENS = 24


@dataclass(frozen=True)
class Answers:
    """What a model says: per prompt, logits [tokens, vocab] and its greedy continuation."""

    logits: list[torch.Tensor]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """How far an export is from its source.

    relative_logit_error: ||export - source|| / ||source|| over all logits of all positions, after
    each position's mean logit is taken off (it changes no probability). top1_agreement: share of
    positions with the same most likely token. equal_continuations: share of equal greedy tokens
    before the first that differs.
    """

    relative_logit_error: float
    top1_agreement: float
    equal_continuations: float
    positions: int
    real_text: bool

    def __str__(self) -> str:
        return (
            f"relative logit error {self.relative_logit_error:.2g}, top-1 agreement "
            f"{self.top1_agreement:.1%}, greedy tokens equal {self.equal_continuations:.1%} "
            f"({self.positions} positions{'' if self.real_text else ' of random tokens'})"
        )

    def as_dict(self) -> dict:
        return asdict(self)


def check_prompts(folder: Path, vocab_size: int) -> tuple[list[tuple[list[int], int]], bool]:
    """(token ids, length of the question) of each prompt, and whether they are real text.

    Random token ids stand in where the folder has no tokenizer that fits the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        prompts = [_conversation_ids(tokenizer, *texts) for texts in CONVERSATIONS]
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.warning("%s: no usable tokenizer (%s); checking with random tokens", folder, error)
        prompts = None
    if prompts and max(max(ids) for ids, _ in prompts) < vocab_size:
        return prompts, True
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (len(CONVERSATIONS), 48), generator=generator)
    return [(row, 16) for row in ids.tolist()], False


def _conversation_ids(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    else:
        prompt_ids = tokenizer.encode(question)
    return prompt_ids + tokenizer.encode(answer, add_special_tokens=False), len(prompt_ids)


@torch.inference_mode()
def ask(model, prompts: list[tuple[list[int], int]]) -> Answers:
    """Run a model over the prompts: logits of question and answer, greedy continuation of the question."""
    device = model.device
    logits = [
        model(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
        for ids, _ in prompts
    ]
    questions = [ids[:length] for ids, length in prompts]
    width = max(map(len, questions))
    padding = [width - len(ids) for ids in questions]  # on the left
    generated = model.generate(
        torch.tensor([[0] * n + ids for n, ids in zip(padding, questions, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device),
        max_new_tokens=CONTINUATION_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return Answers(logits, generated[:, width:].tolist())


def compare(source: Answers, exported: Answers, real_text: bool) -> Comparison:
    """The figures of an export against its source."""
    difference = norm = 0.0
    same = positions = 0
    for ours, theirs in zip(exported.logits, source.logits, strict=True):
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(theirs)
        ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (ours, theirs))
        difference += float((ours - theirs).square().sum())
        norm += float(theirs.square().sum())
    equal = total = 0
    for ours, theirs in zip(exported.continuations, source.continuations, strict=True):
        total += len(theirs)
        pairs = zip(ours, theirs, strict=False)
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    error = math.sqrt(difference / norm) if norm else math.inf
    return Comparison(error, same / positions, equal / total, positions, real_text)
