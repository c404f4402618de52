"""Why not something else? Other ways to less KV cache, on the same answers: none of them trains.

    python benchmarks/alternatives.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --selection smollm_block_selection.json --checkpoints scaled_smollm_ckpts/smollm_scaled_epoch_1
    python benchmarks/alternatives.py --model smollm --table     # or --plot alternatives.svg

Each way is put into the stock model by replacing forward methods, fitted on the first --calibration answers
and judged on the last --held_out ones, one answer at a time: KL to the original at the answers' tokens, and
the share of these that are its first choice. --checkpoints, of this project, are judged alike, as
transformers loads them. For --counts n:

- search: the first n blocks of --selection, with nothing in their place.
- search-window-4, -64, -256: in these blocks, attention to the first 4 tokens and to so many last ones
  (StreamingLLM's sinks, arXiv 2309.17453).
- cosine: the n attention blocks that turn the stream least (LLM-Drop, arXiv 2406.15786).
- cosine-window-64: these blocks, with the window.
- nbl: the n attention blocks with the least canonical-correlation bound, and the linear map of least squares,
  with a bias, from the stream to what the block adds (NBL, arXiv 2505.21077).
- search-nbl: that map in the place of the search's blocks.
- layers: the n whole layers that turn the stream least (ShortGPT's block influence, arXiv 2403.03853).
- consecutive: the n layers in a row over which the last token's stream turns least (arXiv 2403.17887).

KV cache left is what --context tokens keep, of the original's. Results go to
benchmarks/results/alternatives_{model}.json, written after each figure.
"""

import argparse
import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import measuring
import torch
from matplotlib.figure import Figure
from measuring import row, title
from torch.nn.functional import cosine_similarity, linear, log_softmax
from transformers import AutoModelForCausalLM

from hopscotch_common import cli, files
from hopscotch_common.report import plots
from hopscotch_common.training.batches import Sample, load_samples

WAYS = {  # in words, for pictures
    "search-window-256": "our blocks, windows of 256 tokens",
    "search-window-64": "our blocks, windows of 64 tokens",
    "search-window-4": "our blocks, windows of 4 tokens",
    "search-nbl": "our blocks, full linear maps",
    "search": "our blocks, nothing in their place",
    "cosine-window-64": "LLM-Drop's blocks, windows of 64 tokens",
    "cosine": "LLM-Drop's blocks, nothing in their place",
    "nbl": "NBL's blocks, full linear maps",
    "consecutive": "consecutive whole layers",
    "layers": "whole layers (ShortGPT's)",
}
SINKS = 4
WINDOW = re.compile(r"(search|cosine)-window-(\d+)")


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

    def __call__(self, model) -> dict[str, float]:
        divergence, same, tokens = 0.0, 0, 0
        for answer, original in zip(self._answers, self._original, strict=True):
            logits, reference = self._logits(model, answer).float(), original.float()
            p, q = log_softmax(reference, -1), log_softmax(logits, -1)
            divergence += (p.exp() * (p - q)).sum().item()
            labels = torch.tensor(answer.labels)[1:]
            same += (logits.argmax(-1) == labels[labels != -100]).sum().item()
            tokens += len(p)
        return {"kl": divergence / tokens, "agreement": same / tokens, "tokens": tokens}


class Observed:
    """What the original does with some answers: [layers] figures of how the stream turns, and NBL's moments.

    turned_by_attention, turned_by_layer: one less the mean cosine similarity of the stream before and after.
    last: [answers, layers + 1, hidden], the last token's stream before each layer and behind the last one.
    moments: of each layer (n, sum x, sum y, xx', yx', yy'), x the stream before the attention block and y
    what the block adds, float64.
    """

    def __init__(self, model, answers: Sequence[Sample]):
        layers = model.model.layers
        size = model.config.hidden_size
        self.turned_by_attention = torch.zeros(len(layers))
        self.turned_by_layer = torch.zeros(len(layers))
        self.last = torch.zeros(len(answers), len(layers) + 1, size)
        shapes = ((), (size,), (size,), *[(size, size)] * 3)
        self.moments = [[torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in layers]
        for number, answer in enumerate(answers):
            for index, (before, added, behind) in enumerate(streams(model, answer)):
                self._add(index, before, added, behind)
                self.last[number, index], self.last[number, index + 1] = before[-1], behind[-1]
        tokens = sum(len(answer.input_ids) for answer in answers)
        self.turned_by_attention /= tokens
        self.turned_by_layer /= tokens

    def _add(self, index: int, before: torch.Tensor, added: torch.Tensor, behind: torch.Tensor) -> None:
        self.turned_by_attention[index] += (1 - cosine_similarity(before, before + added, -1)).sum()
        self.turned_by_layer[index] += (1 - cosine_similarity(before, behind, -1)).sum()
        x, y = before.double(), added.double()
        count, sum_x, sum_y, xx, yx, yy = self.moments[index]
        count += len(x)
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        for total, left, right in ((xx, x, x), (yx, y, x), (yy, y, y)):
            total.addmm_(left.T, right)


@torch.no_grad()
def streams(model, answer: Sample) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer, [tokens, hidden] float32: the stream before, what attention adds, the stream behind."""
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = []
    for seen, layer in zip(found, model.model.layers, strict=True):

        def keep_attention(_, arguments, output, seen=seen) -> None:
            seen.append(output[0])

        def keep_layer(_, arguments, output, seen=seen) -> None:
            seen[:] = arguments[0], *seen, output

        hooks.append(layer.self_attn.register_forward_hook(keep_attention))
        hooks.append(layer.register_forward_hook(keep_layer))
    try:
        model.model(input_ids=torch.tensor([answer.input_ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(tensor[0].float() for tensor in seen) for seen in found]


def covariances(moments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(C_xx, C_yx, C_yy), [hidden, hidden], of a layer's moments."""
    count, x, y, xx, yx, yy = moments
    outer = torch.outer
    return tuple((m - outer(a, b) / count) / (count - 1) for m, a, b in ((xx, x, x), (yx, y, x), (yy, y, y)))


def canonical_bound(moments: Sequence[torch.Tensor]) -> float:
    """NBL's criterion: the sum of 1 - rho², rho the canonical correlations of the stream before and after.

    Directions in which either does not vary (eigenvalues below 1e-10 of the largest) count as 1.
    """
    c_xx, c_yx, c_yy = covariances(moments)
    after = c_yy + c_yx + c_yx.T + c_xx
    correlation = inverse_root(after) @ (c_yx + c_xx) @ inverse_root(c_xx)
    return (len(c_xx) - correlation.square().sum()).item()


def inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    powers = torch.where(values > 1e-10 * values[-1], values.clamp_min(1e-300).rsqrt(), 0.0)
    return vectors * powers @ vectors.T


def least_squares(moments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [hidden, hidden], bias [hidden]) of the best linear map from x to y."""
    count, x, y, *_ = moments
    c_xx, c_yx, _ = covariances(moments)
    weight = c_yx @ torch.linalg.pinv(c_xx, rtol=1e-10, hermitian=True)
    return weight, (y - weight @ x) / count


def nothing(hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(hidden_states), None


def linear_map(weight: torch.Tensor, bias: torch.Tensor, hidden_states: torch.Tensor, **_):
    return linear(hidden_states, weight, bias), None


def windowed(attention: Callable, window: int) -> Callable:
    """An attention module's forward that sees the first SINKS tokens and the last `window`."""

    def forward(hidden_states: torch.Tensor, **keywords):
        place = torch.arange(hidden_states.shape[1])
        distance = place[:, None] - place
        seen = (distance >= 0) & ((distance < window) | (place < SINKS))
        mask = torch.zeros(seen.shape, dtype=hidden_states.dtype).masked_fill(~seen, -math.inf)
        return attention(hidden_states, **keywords | {"attention_mask": mask[None, None]})

    return forward


def replaced(
    model, way: str, blocks: Sequence[int], observed: Observed
) -> list[tuple[torch.nn.Module, Callable]]:
    """(module, its new forward method) of a way."""
    layers = [model.model.layers[block] for block in blocks]
    if way in ("layers", "consecutive"):
        return [(layer, lambda hidden_states, **_: hidden_states) for layer in layers]
    if match := WINDOW.fullmatch(way):
        return [(each.self_attn, windowed(each.self_attn.forward, int(match[2]))) for each in layers]
    if "nbl" not in way:
        return [(layer.self_attn, nothing) for layer in layers]
    found = []
    for block, layer in zip(blocks, layers, strict=True):
        # the map is of the stream, so the norm before attention lets it pass
        weight, bias = (t.to(model.dtype) for t in least_squares(observed.moments[block]))
        found.append((layer.input_layernorm, lambda hidden_states: hidden_states))
        found.append((layer.self_attn, functools.partial(linear_map, weight, bias)))
    return found


@contextlib.contextmanager
def in_place(forwards: Sequence[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    """Modules with other forward methods."""
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward


def choose(way: str, count: int, picks: Sequence[int], observed: Observed) -> list[int]:
    """The blocks or layers that a way leaves out."""
    if way.startswith("search"):
        return list(picks[:count])
    if way == "consecutive":
        first, behind = observed.last[:, :-count], observed.last[:, count:]
        angles = cosine_similarity(first, behind, -1).clamp(-1, 1).arccos().mean(0)
        start = int(angles.argmin())
        return list(range(start, start + count))
    if way == "nbl":
        scores = torch.tensor([canonical_bound(moments) for moments in observed.moments])
    else:
        scores = observed.turned_by_layer if way == "layers" else observed.turned_by_attention
    return scores.argsort()[:count].tolist()


def left(model, way: str, blocks: Sequence[int], context: int) -> dict[str, float]:
    """Shares of the original's KV cache and weights that are left."""
    layers = model.model.layers
    kept = 1 - len(blocks) / len(layers)
    if match := WINDOW.fullmatch(way):
        kept += len(blocks) / len(layers) * min(1, (SINKS + int(match[2])) / context)
        return {"kv_cache": kept, "weights": 1.0}
    size = model.config.hidden_size
    parts = layers if way in ("layers", "consecutive") else [layer.self_attn for layer in layers]
    removed = sum(parameter.numel() for b in blocks for parameter in parts[b].parameters())
    added = len(blocks) * (size + 1) * size if "nbl" in way else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"kv_cache": kept, "weights": 1 - (removed - added) / total}


def measure_way(
    model, judge: Judge, way: str, blocks: Sequence[int], observed: Observed, context: int
) -> dict:
    with in_place(replaced(model, way, blocks, observed)):
        found = judge(model)
    return {"blocks": list(blocks)} | left(model, way, blocks, context) | found


def measure_checkpoint(original, judge: Judge, path: Path, dtype: str) -> dict:
    """A checkpoint of this project, by transformers' own loading."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype)
    skipped = sorted(model.config.skipped_attention_blocks)
    attention = sum(p.numel() for b in skipped for p in original.model.layers[b].self_attn.parameters())
    maps = 2 * len(skipped) * model.config.hidden_size * model.config.replacement_rank
    total = sum(parameter.numel() for parameter in original.parameters())
    return {
        "blocks": skipped,
        "replacement_rank": model.config.replacement_rank,
        "kv_cache": 1 - len(skipped) / model.config.num_hidden_layers,
        "weights": 1 - (attention - maps) / total,
    } | judge(model)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each way and number of blocks, by what is left of the KV cache."""
    lines = title("way", "blocks or layers", "KV cache", "weights", "KL", "agreement")
    for figure in sorted(figures, key=lambda f: (-len(f["blocks"]), f["kl"])):
        cells = (figure["of"].get("way") or figure["of"]["checkpoint"], " ".join(map(str, figure["blocks"])))
        shares = (f"{figure['kv_cache']:.2f}", f"{figure['weights']:.2f}")
        lines.append(row(*cells, *shares, f"{figure['kl']:.4f}", f"{100 * figure['agreement']:.1f} %"))
    return lines


@plots.styled
def draw(figures: Sequence[dict], model: str) -> Figure:
    """KL of each way, a row each: a mark for each number of blocks or layers that it leaves out."""
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
    for count in arguments.counts:
        for way in arguments.ways:
            if way.startswith("search") and count > len(picks):
                continue
            blocks = choose(way, count, picks, observed)
            cell = (model, judge, way, blocks, observed, arguments.context)
            results.measure({"way": way, "count": count}, measure_way, *cell)
    for folder in arguments.checkpoints:
        cell = (model, judge, folder, arguments.dtype)
        results.measure({"checkpoint": folder.as_posix()}, measure_checkpoint, *cell)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    name = Path(arguments.model).name.removesuffix(".gguf")  # of a model that need not be here
    path = arguments.result or measuring.RESULTS / f"alternatives_{name}.json"
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
