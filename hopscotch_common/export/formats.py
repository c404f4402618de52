"""Write a checkpoint in a format that other tools load, and check that it computes the same."""

import gc
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hopscotch_common import checkpoints, files, scales
from hopscotch_common.answers.decoding import decode
from hopscotch_common.answers.prompts import prompt_ids
from hopscotch_common.checkpoints import card, folders
from hopscotch_common.errors import HopscotchError, InputError, is_out_of_memory, logger
from hopscotch_common.export import decilm, folding
from hopscotch_common.loading import weights
from hopscotch_common.loading.loader import device_map, resolve_device
from hopscotch_common.loading.tokenization import copy_tokenizer, read_tokenizer

REPORT_FILE = "hopscotch_export.json"
CONTINUATION_TOKENS = 24
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
TOLERANCE = 1e-2  # relative logit error in float32, which folding adds


# Each has `prepare`, which writes a format's config and returns what its weights are; `check`, which raises
# InputError for a (stock or Hopscotch) config and a `replacement_rank` that the format cannot hold; and
# `load`, which loads an export as a model, with options of `from_pretrained`.
FORMATS = {"folded": folding, "nemotron_nas": decilm}


def check_exports(formats: Sequence[str], config, target: Path, replacement_rank: int = 0) -> None:
    """Raise InputError if `run_exports` is bound to fail for a model of this (stock) config."""
    for name in formats:
        check_export_folder(export_folder(target, name))
        _check_format(name, config, replacement_rank)


def _check_format(name: str, config, replacement_rank: int) -> None:
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{name}: the model's weights are quantised, so no scales can be folded into them; leave the "
            "export out, and serve the checkpoint itself"
        )
    FORMATS[name].check(config, replacement_rank)


def export_folder(target: Path, format: str) -> Path:
    return target.with_name(f"{target.name}_{format}")


def run_exports(formats: Sequence[str], checkpoint: Path, target: Path, device: str = "auto") -> dict:
    """Export a checkpoint to `{target}_{format}` for each format; return the exports' reports by format."""
    results = {}
    for name in dict.fromkeys(formats):  # each once
        folder = export_folder(target, name)
        report = export_checkpoint(checkpoint, name, folder, device=device)
        results[name] = {"folder": str(folder)} | report
    return results


def check_export_folder(output: Path) -> None:
    """Raise InputError unless an export may be written there: a new folder, or an earlier export's."""
    own = ("config.json", "model.safetensors", "model-*-of-*.safetensors", weights.INDEX_FILE)
    own += (decilm.CODE.name, card.CARD_FILE, REPORT_FILE)
    folders.check_folder(output, "--output", "an earlier export", REPORT_FILE, own)


def export_checkpoint(
    checkpoint: Path,
    format: str,
    output: Path,
    tolerance: float | None = None,
    device: str = "auto",
    without_maps: bool = False,
) -> dict:
    """Export a checkpoint to the folder `output`, atomically, and check it; return the report.

    format: one of FORMATS. tolerance: the largest relative logit error in float32 (None: TOLERANCE, plus the
    error of computing in 16 bits for 16-bit weights). device: where the check runs. without_maps: leave out
    the maps, which a GGUF made from the export gets back. Raises InputError for a checkpoint or scales that
    cannot be exported, and for an export whose error exceeds the tolerance; it then leaves nothing behind.
    """
    config, values, maps = checkpoints.read_checkpoint(checkpoint)
    if without_maps and not config.replacement_rank:
        raise InputError(f"{checkpoint}: has no maps; leave --without_maps out")
    run = checkpoints.read_run(checkpoint) if (checkpoint / folders.RUN_FILE).is_file() else {}
    check_export_folder(output)
    folders.check_outside(output, checkpoint)
    maps = {} if without_maps else maps
    _check_format(format, config, scales.rank_of(maps))
    if config.dtype is None:
        config.dtype = weights.stored_dtype(checkpoint)
    if weights.has_own_head(checkpoint):
        config.tie_word_embeddings = False  # else the export would have one matrix for both
    with files.atomic_folder(output) as folder:
        folders.copy_companions(checkpoint, folder)
        target = FORMATS[format].prepare(folder, config, values, maps)
        folding.write_weights(checkpoint, folder, config, target)
        copy_tokenizer(checkpoint, folder, wanted=run.get("tokenizer"))
        report = {
            "format": format,
            "checkpoint": str(checkpoint),
            "skipped_blocks": folding.skipped_blocks(config),
        } | ({"without_maps": True} if without_maps else {})
        try:
            report |= _check(checkpoint, config, folder, format, tolerance, device, without_maps)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise HopscotchError(
                f"{output}: out of memory in its check, which runs in float32; export again with --device "
                "cpu or split"
            ) from error
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        if without_maps:  # no model to publish
            logger.warning("%s: without its maps this is a step to a GGUF, and no model to use", output)
        else:
            origin = card.inherited(checkpoint)
            card.write_card(folder, output.name, format, origin, config, values, run, report["summary"])
    logger.info("%s: %s", output, report["summary"])
    return report


def _check(
    checkpoint: Path,
    config,
    folder: Path,
    format: str,
    tolerance: float | None,
    device: str,
    without_maps: bool,
) -> dict:
    """Compare the export with its source in float32, one model in memory at a time; return the figures."""
    place = device_map(resolve_device(device))
    prompts, real_text = check_prompts(folder, config.vocab_size)

    def ask_of(load: Callable, where: Path, dtype) -> list[tuple]:
        gc.collect()
        return ask(load(where, dtype=dtype, device_map=place), prompts)

    def load_source(where: Path, **options):
        model = checkpoints.load_checkpoint(where, **options)
        for _, part in scales.named_maps(model) if without_maps else ():
            part.data.zero_()  # then it adds nothing, as in the export
        return model

    source = ask_of(load_source, checkpoint, dtype=torch.float32)
    exported = ask_of(FORMATS[format].load, folder, dtype=torch.float32)
    result = compare(source, exported, real_text)
    noise = 0.0
    if tolerance is None and not result.relative_logit_error <= TOLERANCE:
        own = ask_of(load_source, checkpoint, dtype="auto")
        noise = compare(source, own, real_text).relative_logit_error
    tolerance = TOLERANCE + noise if tolerance is None else tolerance
    error = result.relative_logit_error
    if not (error <= tolerance and math.isfinite(error)):
        raise InputError(
            f"{format} is not exact enough and was not written: {result}; the tolerance is "
            f"{tolerance:.2g}. Scales far from 1 fold badly: train with a smaller learning rate, or accept "
            "it with --tolerance"
        )
    return {"tolerance": tolerance, "dtype_noise": noise, "summary": str(result)} | asdict(result)


# Comparing an export with its checkpoint, on real tokens


@dataclass(frozen=True)
class Comparison:
    """How far an export is from its source.

    relative_logit_error: ||export - source|| / ||source|| over all logits of all positions, after
    each position's mean logit is subtracted (it changes no probability). top1_agreement: share of
    positions with the same most likely token. equal_continuations: share of greedy tokens that are
    equal before the first that differs.
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


def check_prompts(folder: Path, vocab_size: int) -> tuple[list[tuple[list[int], int]], bool]:
    """Return (token ids, length of the question) of each prompt, and whether they are real text.

    Random token ids take their place if the folder has no tokenizer that fits the model.
    """
    try:
        tokenizer = read_tokenizer(folder)
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
        asked = prompt_ids(tokenizer, [{"role": "user", "content": question}], "a question")
    else:
        asked = tokenizer.encode(question)
    return asked + tokenizer.encode(answer, add_special_tokens=False), len(asked)


@torch.inference_mode()
def ask(model, prompts: list[tuple[list[int], int]]) -> list[tuple[torch.Tensor, list[int]]]:
    """Return a model's logits [tokens, vocab] for each prompt, and its greedy answer to the question."""
    ends = model.generation_config.eos_token_id
    stop_ids = set(ends) if isinstance(ends, list) else {ends} - {None}
    questions, limits = [ids[:length] for ids, length in prompts], [CONTINUATION_TOKENS] * len(prompts)
    logits = [
        model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()
        for ids, _ in prompts
    ]
    answers = decode(model, questions, limits, stop_ids, max_tokens_per_batch=2**15)
    said = {answer.index: answer.token_ids for answer in answers}
    return [(rows, said[index]) for index, rows in enumerate(logits)]


def compare(source: Sequence[tuple], exported: Sequence[tuple], real_text: bool) -> Comparison:
    """Compare an export with its source by what they say to the same prompts (`ask`)."""
    difference = norm = 0.0
    same = positions = equal = total = 0
    for (theirs, wanted), (ours, said) in zip(source, exported, strict=True):
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(theirs)
        ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (ours, theirs))
        difference += float((ours - theirs).square().sum())
        norm += float(theirs.square().sum())
        equal += len(os.path.commonprefix([said, wanted]))
        total += len(wanted)
    error = math.sqrt(difference / norm) if norm else math.inf
    return Comparison(error, same / positions, equal / total, positions, real_text)
