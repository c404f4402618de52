"""What the command lines share: argument types, flags, exit codes, logging.

Results go to stdout, logs and progress bars to stderr. Exit codes: 0 done, 2 bad usage or input
(one line says what, where and what to do), 130 Ctrl-C, 1 anything else. The scripts turn flags into
options here; nothing below the scripts knows argparse.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hopscotch_common.errors import (
    HopscotchError,
    InputError,
    command_name,
    is_out_of_memory,
    logger,
    printable,
    reason_of,
)
from hopscotch_common.loading import models
from hopscotch_common.training import MEASURES, TrainingOptions


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the script's docstring as help and one-line errors."""

    def __init__(self, doc: str | None):  # None under python -OO
        first, *rest = (doc or "").strip().split("\n")
        super().__init__(
            prog=command_name(),
            description=first,
            epilog="\n".join(rest),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, argv: list[str] | None = None):
        for word in sys.argv[1:] if argv is None else argv:
            try:
                word.encode()
            except UnicodeEncodeError:
                self.error(f"{word}: not UTF-8 text, which no report could hold; rename it")
        parsed = super().parse_args(argv)
        if hasattr(parsed, "model"):
            dtype = getattr(parsed, "dtype", None)
            parsed.model = dataclasses.replace(parsed.model, float32=dtype and dtype == "float32")
        return parsed

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message, 900)} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False) or action.required:
            return action.help
        return super()._get_help_string(action)


def command(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Decorate a script's `main(argv=None)`: logging, exit codes, no traceback for user errors."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        set_up_logging()
        _unwritten.clear()
        try:
            code = main(argv) or 0
            return _fail(f"stdout: {_unwritten[0].strerror}; all files are there", 1) if _unwritten else code
        except HopscotchError as error:
            return _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            return _fail(f"{place}{error.strerror or error}; nothing that was finished is lost", 1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            remedy = "--dtype bfloat16 takes less, --gradient_checkpointing too where scales train, "
            remedy += "--device split (without a launcher) all GPUs, cpu none"
            return _fail(
                f"out of memory ({reason_of(error)}): {remedy}; nothing that was finished is lost", 1
            )

    return wrapper


def _fail(message: str, exit_code: int) -> int:
    print(f"{command_name()}: error: {printable(message, 900)}", file=sys.stderr)
    return exit_code


_unwritten: list[OSError] = []  # errors from writing this command's results to stdout


def result(line: str) -> None:
    """Print a line to stdout, made `printable`. If stdout fails, the command goes on and fails at its end."""
    try:
        print(printable(line), flush=True)
    except OSError as error:  # a full disk, or a closed pipe: `| head`
        _unwritten.append(error)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _PrintableFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message)


def set_up_logging() -> None:
    """Log to stderr, from rank 0 only, and keep the libraries' chatter down to warnings.

    What the encoding of stdout lacks is shown there as escapes, as Python does on stderr.
    """
    with contextlib.suppress(AttributeError, OSError):  # no plain stream, or a descriptor replaced since
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # this project checks what it warns of
    logging.getLogger("transformers").setLevel(logging.ERROR)  # if it was imported before
    for name in ("torchao", "torch.utils._pytree"):  # log at every import which of their parts do not fit
        logging.getLogger(name).setLevel(logging.ERROR)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    for handler in logging.root.handlers:
        handler.setFormatter(_PrintableFormatter())
    logger.setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def number(kind: type, condition: Callable[[float], bool], needed: str) -> Callable[[str], float]:
    """Make an argparse type: a finite number that meets `condition`, which `needed` states in the error."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and condition(value)):
            raise argparse.ArgumentTypeError(f"must be {needed}, got {text!r}")
        return value

    return parse


positive_int = number(int, lambda value: 0 < value < 2**31, "a whole number above 0 and below 2^31")
whole_number = number(int, lambda value: 0 <= value < 2**31, "a whole number, 0 or above")
positive_float = number(float, lambda value: 0 < value < 1e30, "a finite number above 0")
above_0_at_most_1 = number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
between_0_and_1 = number(float, lambda value: 0 < value < 1, "above 0 and below 1")
at_least_0_below_1 = number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")


def path(text: str) -> Path:
    """Parse a path (argparse type) and expand `~`, which the shell leaves alone in --flag=~/x."""
    return Path(os.path.expanduser(text))


def model(text: str) -> models.ModelRef:
    """Parse `--model` (argparse type)."""
    try:
        return models.model_ref(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model_arguments(parser: argparse.ArgumentParser, load: bool = True) -> None:
    """Add `--model` and, with `load`, the flags of every script that loads a model."""
    add = parser.add_argument
    what = f"{', '.join(models.ALIASES)} (smollm needs no hub), a Hugging Face id, a folder, or a GGUF file"
    add("--model", type=model, required=True, help=what)
    if not load:
        return
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of the frozen weights and activations; auto: the checkpoint's own. "
        "Scales are always float32",
    )
    add(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …; auto: a GPU if there is one; split: layers spread over all GPUs",
    )
    kernels = ["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
    add("--attn_implementation", choices=kernels, default="auto", help="auto: transformers' choice")
    add(
        "--seed",
        type=seed,
        default=TrainingOptions.seed,
        help="seed of the data's order and split in steps 3 and 4a",
    )


def add_training_arguments(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """Add the flags that search and scale training share; `training_options` reads them."""
    add = parser.add_argument_group("training of the scales").add_argument
    add(
        "--loss",
        choices=list(MEASURES),
        default=TrainingOptions.loss,
        help="training loss: ce, cross entropy on the answers' tokens; kl, the divergence from the original "
        "model's distribution at each of these tokens",
    )
    add("--learning_rate", type=positive_float, default=learning_rate, help="Adam's learning rate")
    add("--batch_size", type=positive_int, default=TrainingOptions.batch_size, help="answers per update")
    add(
        "--max_tokens_per_batch",
        type=positive_int,
        help="most tokens that run at once, padding included: bounds memory, does not change the result "
        "(default: 512 on a CPU, 4096 on a GPU, and at least a batch's longest answer); halved when memory "
        "runs out all the same",
    )
    add("--max_samples", type=positive_int, help="use only the first N answers (default: all)")
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third more computation",
    )


def add_validation_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--validation_split`."""
    parser.add_argument(
        "--validation_split",
        type=at_least_0_below_1,
        default=0.0,
        help=f"share of answers held out to measure {purpose}",
    )


def training_options(arguments: argparse.Namespace) -> TrainingOptions:
    """The options of `add_training_arguments`, with `--seed`."""
    names = ("learning_rate", "batch_size", "max_tokens_per_batch", "gradient_checkpointing", "seed", "loss")
    return TrainingOptions(**{name: getattr(arguments, name) for name in names})


def flags_of_all(arguments: argparse.Namespace) -> dict:
    """Return the flags that must be the same in all processes of a run: values, not paths."""
    kinds = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(arguments).items() if isinstance(value, kinds)}


def load_model(arguments: argparse.Namespace):
    """Load `--model` with scales, and with maps of `--replacement_rank`, as the flags say."""
    from hopscotch_common.loading.loader import load_model

    return load_model(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        attn_implementation=arguments.attn_implementation,
        quantization=getattr(arguments, "quantization", None),
        scale_granularity=getattr(arguments, "granularity", "layer"),
        replacement_rank=arguments.replacement_rank,
    )


def add_replacement_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--replacement_rank`; `inputs.blocks_from` checks it."""
    parser.add_argument(
        "--replacement_rank",
        type=whole_number,
        default=0,
        metavar="RANK",
        help="put a linear map of this rank, fitted to what the block did, in place of each skipped block "
        "(0: nothing); maps take no KV cache",
    )


def add_blocks_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--blocks_to_skip`; `inputs.blocks_from` reads it."""
    what = "attention blocks to skip: indices, or the path of a report of block_selection.py"
    parser.add_argument(
        "--blocks_to_skip", nargs="+", action="extend", required=True, metavar="BLOCK", help=what
    )


def add_export_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add `--export`."""
    parser.add_argument(
        "--export",
        nargs="+",
        action="extend",
        choices=["folded", "nemotron_nas"],
        default=[],
        metavar="FORMAT",
        help=f"{purpose}, in these formats: folded (stock architecture, loads anywhere, no faster), "
        "nemotron_nas (vLLM and others, faster)",
    )
