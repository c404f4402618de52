"""Data of step 2 and blocks that a command line names, read and checked before any model is loaded."""

import argparse
import os
from pathlib import Path

from hopscotch_common import files
from hopscotch_common.answers import DATA_FILE, DATA_REPORT
from hopscotch_common.cli import path
from hopscotch_common.errors import InputError, logger, reason_of
from hopscotch_common.loading import models


def check_data(data_path: Path, model: models.ModelRef) -> None:
    """Raise InputError if the report of step 2's data names another tokenizer than the model's.

    Nothing is compared if there is no such report beside the data, or if the file has another name than step
    2's: it may come from anywhere.
    """
    from hopscotch_common.loading import tokenization

    report = data_path.with_name(DATA_REPORT)
    names = (DATA_FILE, f"{DATA_FILE}.gz", f"{DATA_FILE}.zst")
    if data_path.name not in names or not report.is_file():
        return
    content = files.read_json(report, "remove it, or make the data again with process_gt_data.py")
    made_with = content.get("tokenizer")
    if not isinstance(made_with, dict) or "sha256" not in made_with:
        return
    try:
        tokenizer = tokenization.read_tokenizer(model.folder(), model.source)
    except Exception as error:  # training needs no tokenizer
        reason = reason_of(error)
        logger.warning("%s: its tokenizer cannot be compared with the data's (%s)", model.source, reason)
        return
    if tokenization.fingerprint(tokenizer) != made_with["sha256"]:
        raise InputError(
            f"{data_path}: made with another tokenizer than {model.source}'s, by {DATA_REPORT} beside it "
            f"with that of {made_with.get('model')}; make it with process_gt_data.py --model {model.source}"
        )
    _warn_of_another(report, made_with.get("model"), model)


def load_samples(arguments: argparse.Namespace, config) -> list:
    """Load the samples of `--data_path`, checked against the model and any limits of the training flags."""
    from hopscotch_common.training import batches

    check_data(arguments.data_path, arguments.model)
    limits = (getattr(arguments, name, None) for name in ("max_tokens_per_batch", "max_samples"))
    longest = models.context_length(config)
    return batches.load_samples(arguments.data_path, config.vocab_size, longest, *limits)


def blocks_from(arguments: argparse.Namespace, config, flag: str) -> list[int]:
    """Return the block indices of a flag, given as numbers or as the path of one selection report.

    Raises InputError for a report of another model, for indices that the model cannot skip, and for a
    --replacement_rank above the model's hidden size.
    """
    from hopscotch_common.scales.modeling_hopscotch import check_skipped_blocks

    words, rank = getattr(arguments, flag.removeprefix("--")), arguments.replacement_rank
    if rank > config.hidden_size:
        raise InputError(f"--replacement_rank {rank}: at most {config.hidden_size}, the model's hidden size")
    if len(words) == 1 and (reports := reports_among(words)):
        blocks = _blocks_of_report(reports[0], arguments.model, config.num_hidden_layers, flag, rank)
    else:
        try:
            blocks = [int(word) for word in words]
        except ValueError:
            raise InputError(f"{flag}: give block indices or one selection report, got {words}") from None
    try:
        check_skipped_blocks(blocks, config)
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from error
    return blocks


def reports_among(words: list[str]) -> list[Path]:
    """Return the words for blocks on a command line that are paths of reports, not numbers."""
    return [path(word) for word in words if not word.lstrip("-").isdecimal()]


def _blocks_of_report(path: Path, ref: models.ModelRef, num_layers: int, flag: str, rank: int) -> list[int]:
    remedy = f"give {flag} indices, or a report of block_selection.py"
    content = files.read_json(path, remedy)
    blocks, layers, name = (content.get(key) for key in ("skipped_blocks", "num_layers", "model"))
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise InputError(f"{path}: 'skipped_blocks' is no list of blocks; {remedy}")
    if name != ref.name or layers != num_layers:
        raise InputError(
            f"{path}: a report of model {name} ({layers} layers), not of model {ref.name} ({num_layers}); "
            f"search on this model, or {remedy}"
        )
    if not blocks and flag == "--blocks_to_skip":
        raise InputError(f"{path}: names no block to skip; search for more, or give indices")
    arguments = content.get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {}
    _warn_of_another(path, arguments.get("model"), ref)
    searched = arguments.get("replacement_rank", 0)
    if blocks and bool(searched) != bool(rank):  # the search had maps and this run has none, or the reverse
        said = "%s: its blocks were chosen with --replacement_rank %s, and now it is %s"
        logger.warning(said, path, searched, rank)
    return blocks


def _warn_of_another(path: Path, made_with, ref: models.ModelRef) -> None:
    """Warn if a file was made with another `--model`, which may be another model."""
    is_path = isinstance(made_with, str) and "\0" not in made_with
    same = is_path and os.path.realpath(made_with) == os.path.realpath(ref.source)
    if made_with is not None and not same:
        logger.warning(
            "%s: made with %s, and --model is %s: are they one model?", path, made_with, ref.source
        )
