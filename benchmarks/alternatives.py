"""Other ways to a smaller KV cache, judged on the same answers; none of them trains.

    python benchmarks/alternatives.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json --checkpoints scaled_smollm_ckpts/smollm_scaled_epoch_1
    python benchmarks/alternatives.py --model smollm --table     # or --plot alternatives.svg

Each way replaces forward methods of the stock model. It is fitted on the first --calibration answers and
judged on the last --held_out ones, one answer at a time: by KL to the original at the answers' tokens, and by
the share of these tokens that are its first choice. This project's --checkpoints are judged in the same way,
as transformers loads them. For --counts n:

- search: the first n blocks of --selection, with nothing in their place.
- search-window-4, -64, -256: in these blocks, attention to the first 4 tokens (StreamingLLM's sinks, arXiv
  2309.17453) and to the last 4, 64 or 256.
- cosine: the n attention blocks that turn the stream least (LLM-Drop, arXiv 2406.15786).
- cosine-window-64: the same blocks, with the window.
- nbl: the n attention blocks with the smallest canonical-correlation bound, replaced by the least-squares
  linear map, with a bias, from the stream to what the block adds (NBL, arXiv 2505.21077).
- search-nbl: such maps in the place of the search's blocks.
- layers: the n whole layers that turn the stream least (ShortGPT's block influence, arXiv 2403.03853).
- consecutive: the n layers in a row over which the stream turns least, at an answer's last token before its
  end of turn (arXiv 2403.17887).
- cache-8, cache-4: all attention blocks, with keys and values in 8 or 4 bits, in groups of 64 channels of a
  token, or fewer where 64 do not divide a head. (transformers' QuantizedCache does the same, but keeps the
  last 128 tokens whole.)

Models that multiply what attention returns (Granite) or put a norm after it (Gemma 2 and 3, OLMo 2 and 3,
EXAONE 4, GLM 4) are refused, unless --ways is given no value, which judges --checkpoints alone.

KV cache left is the share of the original's that --context tokens keep. Results go to
benchmarks/results/alternatives_{model}.json, written after each figure.
"""

import argparse
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import measuring
import torch
from matplotlib.figure import Figure
from measuring import row, title
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM
from ways import BITS, WAYS, Observed, check_family, choose, in_place, left, replaced

from hopscotch_common import cli, files
from hopscotch_common.loading.loader import read_config
from hopscotch_common.report import plots
from hopscotch_common.training.batches import Sample, load_samples


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="as the scripts take it; its name is the results'")
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--selection", type=Path, help="report of block_selection.py")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8], help="how many to leave out")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="of this project")
    parser.add_argument("--calibration", type=int, default=80, help="first answers, to choose and fit on")
    parser.add_argument("--held_out", type=int, default=24, help="last answers, to judge on")
    parser.add_argument("--context", type=int, default=8000, help="tokens for which KV cache is counted")
    parser.add_argument("--dtype", default="float32")
    measuring.add_result_arguments(parser, "alternatives_{model}")
    parser.add_argument("--plot", type=Path, help="draw the results (PNG, PDF, SVG), measure nothing")
    return parser


class Judge:
    """KL to the original model, and the share of first choices, over the counted tokens of some answers."""

    def __init__(self, model, answers: Sequence[Sample]):
        self._answers = answers
        self._original = [self._logits(model, answer) for answer in answers]

    @staticmethod
    @torch.no_grad()
    def _logits(model, answer: Sample) -> torch.Tensor:
        """[counted tokens, vocabulary], in the model's dtype: of the positions before these tokens."""
        before = torch.tensor(answer.labels)[1:].ne(-100).nonzero()[:, 0]
        ids = torch.tensor([answer.input_ids])
        return model(input_ids=ids, logits_to_keep=before, use_cache=False).logits[0]

    def __call__(self, model) -> dict[str, float | None]:
        """kl_error: its standard error over the answers, as `loss.evaluate` has it; None of a single one."""
        divergence, tokens, same = [], [], 0
        for answer, original in zip(self._answers, self._original, strict=True):
            logits, reference = self._logits(model, answer).float(), original.float()
            p, q = log_softmax(reference, -1), log_softmax(logits, -1)
            divergence.append((p.exp() * (p - q)).sum().item())
            labels = torch.tensor(answer.labels)[1:]
            same += (logits.argmax(-1) == labels[labels != -100]).sum().item()
            tokens.append(len(p))
        total, count = sum(tokens), len(tokens)
        kl, error = sum(divergence) / total, None
        if count > 1:
            squares = sum((d - kl * n) ** 2 for d, n in zip(divergence, tokens, strict=True))
            error = math.sqrt(squares * count / (count - 1)) / total
        return {"kl": kl, "kl_error": error, "agreement": same / total, "tokens": total}


def measure_way(
    model, judge: Judge, way: str, blocks: Sequence[int], observed: Observed, context: int
) -> dict:
    with in_place(replaced(model, way, blocks, observed)):
        found = judge(model)
    return {"blocks": list(blocks)} | left(model, way, blocks, context) | found


def measure_checkpoint(original, judge: Judge, path: Path, dtype: str) -> dict:
    """A checkpoint of this project, by transformers' own loading."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype)
    skipped, rank = sorted(model.config.skipped_attention_blocks), model.config.replacement_rank
    shares = left(original, "search", skipped)
    maps = 2 * len(skipped) * model.config.hidden_size * rank
    shares["weights"] += maps / sum(parameter.numel() for parameter in original.parameters())
    return {"blocks": skipped, "replacement_rank": rank} | shares | judge(model)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each way and number of blocks, by what is left of the KV cache."""
    lines = title("way", "blocks or layers", "KV cache", "weights", "KL", "agreement")
    for figure in sorted(figures, key=lambda f: (-len(f["blocks"]), f["kl"])):
        cells = (figure["of"].get("way") or figure["of"]["checkpoint"], " ".join(map(str, figure["blocks"])))
        shares = (f"{figure['kv_cache']:.2f}", f"{figure['weights']:.2f}")
        kl = f"{figure['kl']:.4f}" + (f" ± {figure['kl_error']:.4f}" if figure.get("kl_error") else "")
        lines.append(row(*cells, *shares, kl, f"{100 * figure['agreement']:.1f} %"))
    return lines


@plots.styled
def draw(figures: Sequence[dict], model: str) -> Figure:
    """KL of each way, a row each: a mark for each number of blocks or layers that it leaves out, if any."""
    figures = [figure for figure in figures if figure["blocks"]]
    names = {folder: f"our blocks, {_in_words(folder)}" for folder in _folders(figures)}
    rows = [*names, *(way for way in WAYS if any(f["of"].get("way") == way for f in figures))]
    counts = sorted({len(figure["blocks"]) for figure in figures})
    colours = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.GREY)
    looks = dict(zip(counts, zip(colours, "osDv", strict=True), strict=False))  # of four counts at most
    picture = Figure(figsize=(plots.WIDTH, 1.3 + 0.27 * len(rows)), layout="constrained")
    axes = picture.subplots()
    for count, (color, marker) in looks.items():
        own = [figure for figure in figures if len(figure["blocks"]) == count]
        left = min(figure["kv_cache"] for figure in own)
        places = [rows.index(figure["of"].get("way") or figure["of"]["checkpoint"]) for figure in own]
        label = f"{count} blocks or layers: {left:.2f} of the KV cache left"
        look = dict(color=color, marker=marker, linestyle="none", markersize=6, label=label)
        axes.plot([figure["kl"] for figure in own], places, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("held out: KL to the original (nats per token, log scale)")
    axes.set_yticks(range(len(rows)), [names.get(row) or WAYS[row] for row in rows])
    axes.invert_yaxis()
    picture.suptitle(f"{model}: what other ways cost", x=0.01, ha="left")
    plots.legend_below(picture, [axes])
    return picture


def _folders(figures: Sequence[dict]) -> list[str]:
    found = [figure for figure in figures if "checkpoint" in figure["of"]]
    return [figure["of"]["checkpoint"] for figure in sorted(found, key=lambda figure: figure["kl"])]


def _in_words(folder: str) -> str:
    """For example rank16_trained: maps of rank 16, trained."""
    return re.sub(r"\brank(\d+)", r"maps of rank \1,", folder.replace("_", " "))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    arguments.model = cli.model(arguments.model)
    if arguments.ways:
        check_family(read_config(arguments.model))
    names = "model data_path selection calibration held_out context dtype"
    results = measuring.Results(path, measuring.settings_of(arguments, names))
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model.folder(), dtype=dtype)
    samples = load_samples(arguments.data_path, model.config.vocab_size)
    if arguments.calibration + arguments.held_out > len(samples):
        raise SystemExit(f"{arguments.data_path}: {len(samples)} answers, too few")
    picks = files.read_json(arguments.selection)["skipped_blocks"]
    judge = Judge(model, samples[-arguments.held_out :])
    observed = Observed(model, samples[: arguments.calibration]) if arguments.ways else None
    for count, way in itertools.product(arguments.counts, arguments.ways):
        count = 0 if BITS.fullmatch(way) else count
        if way.startswith("search") and count > len(picks):
            continue
        blocks = choose(way, count, picks, observed) if count else []
        cell = (model, judge, way, blocks, observed, arguments.context)
        results.measure({"way": way, "count": count}, measure_way, *cell)
    for folder in arguments.checkpoints:
        cell = (model, judge, folder, arguments.dtype)
        results.measure({"checkpoint": folder.as_posix()}, measure_checkpoint, *cell)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    name, path = measuring.result_of(arguments, "alternatives")
    if not (arguments.table or arguments.plot):
        if not (arguments.data_path and arguments.selection):
            parser.error("--data_path and --selection are needed to measure")
        measure(arguments, path)
    figures = measuring.figures_in(path)
    if arguments.plot:
        picture = draw(figures, name)
        arguments.plot.write_bytes(plots.render(picture, arguments.plot.suffix))
    else:
        print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
