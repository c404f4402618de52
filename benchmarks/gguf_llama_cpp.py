"""llama.cpp on a GGUF whose skipped attention blocks are left out: same text, how much faster?

    python benchmarks/gguf_llama_cpp.py --llama_cpp ~/llama.cpp --bin ~/llama.cpp/build/bin
    python benchmarks/gguf_llama_cpp.py --llama_cpp ~/llama.cpp --bin ~/llama.cpp/build/bin \
        --replacement_rank 16 --result benchmarks/results/gguf_maps.json
    python benchmarks/gguf_llama_cpp.py --table

It takes a checkpoint of the embedded model (or yours), exports it as `folded`, has llama.cpp's converter
make a GGUF of that, and rewrites it. It then checks that
- the greedy text of the rewritten float32 file is that of transformers, and
- for every type, the rewritten file's text is that of the file it was made from (not with maps, which that
  file lacks).
It also measures prefill and decode speed of the two files in turn. It needs llama.cpp's source (for
convert_hf_to_gguf.py, which needs sentencepiece), and its programs llama-simple and llama-bench.
llama.cpp's threads busy-wait for one another: on a machine with other load, its speeds mean nothing.

It overwrites benchmarks/results/gguf.json; the exit code is 1 if a text differs. The tests in CI do not run
it, as they have no llama.cpp.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import measuring
import torch
from measuring import row, title

from hopscotch_common import checkpoints
from hopscotch_common.cli import ArgumentParser, command, positive_int
from hopscotch_common.errors import InputError, logger
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.export.gguf import rewrite_gguf
from hopscotch_common.loading import models
from hopscotch_common.loading.loader import read_config
from hopscotch_common.scales.modeling_hopscotch import REPLACEMENT_NAMES

PROMPTS = (
    "The capital of France is",
    "A train travels 60 miles an hour for 3 hours. How far does it go? Let us think step by step.",
    "<|im_start|>user\nTom has 12 apples. He gives 5 away. How many are left?<|im_end|>\n"
    "<|im_start|>assistant\n",
)


def make_checkpoint(folder: Path, skipped: list[int], rank: int, seed: int) -> None:
    """A checkpoint of the embedded model with random scales near 1, and random maps where `rank` is not 0."""
    base = models.model_ref(models.EMBEDDED)
    config, generator = read_config(base), torch.Generator().manual_seed(seed)
    values = 1 + 0.05 * torch.randn(config.num_hidden_layers, 4, generator=generator)
    hidden, maps = config.hidden_size, {}
    if not rank:
        values[skipped, 0] = 0
    for block in skipped if rank else ():
        for name, shape in zip(REPLACEMENT_NAMES, ((rank, hidden), (hidden, rank)), strict=True):
            maps[f"model.layers.{block}.{name}"] = torch.randn(shape, generator=generator) / hidden**0.5
    checkpoints.save_checkpoint(folder, base, skipped, values, {"seed": seed}, maps=maps)


def transformers_texts(checkpoint: Path, folded: Path, num_tokens: int) -> list[str]:
    """Prompt and greedy continuation in float32, for every prompt; the tokenizer is the folded export's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folded)
    model = checkpoints.load_checkpoint(checkpoint, dtype=torch.float32)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ended = model.generate(
            ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        new = [i for i in ended[0, ids.shape[1] :].tolist() if i != model.generation_config.eos_token_id]
        texts.append(tokenizer.decode(ids[0].tolist() + new, clean_up_tokenization_spaces=False))
    return texts


def run(*command: str | Path) -> subprocess.CompletedProcess:
    """Run a program; InputError with the end of what it said when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise InputError(f"{Path(command[0]).name} failed with exit code {done.returncode}: {said}")
    return done


def llama_cpp_texts(binaries: Path, file: Path, num_tokens: int) -> tuple[list[str], float]:
    """Prompt and greedy continuation for every prompt; and the size of the KV cache in MiB."""
    texts, kv_cache = [], []
    for prompt in PROMPTS:
        done = run(binaries / "llama-simple", "-m", file, "-n", str(num_tokens), "-ngl", "0", prompt)
        texts.append(done.stdout.decode(errors="replace").removesuffix("\n"))
        size = re.search(r"llama_kv_cache: +size = +([\d.]+) MiB", done.stderr.decode(errors="replace"))
        kv_cache.append(float(size[1]) if size else float("nan"))
    return texts, kv_cache[-1]


def speeds(binaries: Path, folded: Path, skipped: Path, threads: int, rounds: int) -> dict[str, dict]:
    """Prefill of 256 tokens and decode of 64: median tokens/s of both files, and their ratio.

    The files take turns, and a ratio is of one round's two measurements; its range over the rounds is
    what the machine's other work makes of it.
    """
    shape = ("-p", "256", "-n", "64", "-r", "1", "-ngl", "0", "-t", str(threads), "-o", "json")
    samples: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    for _ in range(rounds):
        before, after = (
            json.loads(run(binaries / "llama-bench", "-m", file, *shape).stdout) for file in (folded, skipped)
        )
        for old, new in zip(before, after, strict=True):
            samples["prefill" if old["n_prompt"] else "decode"].append((old["avg_ts"], new["avg_ts"]))
    figures = {}
    for kind, pairs in samples.items():
        ratios = [new / old for old, new in pairs]
        figures[kind] = {
            "folded_tokens_per_second": round(measuring.median([old for old, _ in pairs]), 2),
            "skipped_tokens_per_second": round(measuring.median([new for _, new in pairs]), 2),
            "ratio": round(measuring.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return figures


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """Export, convert, rewrite, generate and measure in `folder`; the figures."""
    checkpoint = arguments.checkpoint or folder / "checkpoint"
    if arguments.checkpoint is None:
        make_checkpoint(checkpoint, arguments.blocks_to_skip, arguments.replacement_rank, arguments.seed)
    maps = bool(checkpoints.checkpoint_config(checkpoint).replacement_rank)
    export_checkpoint(checkpoint, "folded", folder / "folded", without_maps=maps)
    expected = transformers_texts(checkpoint, folder / "folded", arguments.num_tokens)
    figures = []
    for kind in arguments.types:
        folded, skipped = folder / f"folded-{kind}.gguf", folder / f"skipped-{kind}.gguf"
        converter = arguments.llama_cpp / "convert_hf_to_gguf.py"
        run(sys.executable, converter, folder / "folded", "--outtype", kind, "--outfile", folded)
        report = rewrite_gguf(checkpoint, folded, skipped)
        folded_texts, folded_kv = llama_cpp_texts(arguments.bin, folded, arguments.num_tokens)
        skipped_texts, skipped_kv = llama_cpp_texts(arguments.bin, skipped, arguments.num_tokens)
        figure = {
            "of": {"type": kind, "maps": maps},
            "same_text_as_folded": skipped_texts == folded_texts,
            "same_text_as_transformers": skipped_texts == expected,
            "kv_cache_mib": {"folded": folded_kv, "skipped": skipped_kv},
            "kv_cache_ratio": round(skipped_kv / folded_kv, 4),
            "speed": speeds(arguments.bin, folded, skipped, arguments.threads, arguments.rounds),
            "bytes_ratio": round(report["bytes"] / (report["bytes"] + report["bytes_saved"]), 4),
            "report": report,
        }
        logger.info("%s", figure)
        figures.append(figure)
    return figures


def table(figures: list[dict]) -> list[str]:
    """Markdown: a row for each type of the weights."""
    lines = title("type", "text of the folded file", "of transformers", "KV cache", "prefill", "decode")
    for figure in figures:
        same = ["same" if figure[f"same_text_as_{of}"] else "another" for of in ("folded", "transformers")]
        if figure["of"].get("maps"):
            same[0] = "(no maps)"
        times = [f"{figure['speed'][phase]['ratio']} times" for phase in ("prefill", "decode")]
        lines.append(row(figure["of"]["type"], *same, figure["kv_cache_ratio"], *times))
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--llama_cpp", type=Path, help="folder of llama.cpp's source")
    parser.add_argument("--bin", type=Path, help="folder of llama-simple and llama-bench")
    parser.add_argument("--checkpoint", type=Path, help="float32 checkpoint to take (default: one is made)")
    parser.add_argument(
        "--blocks_to_skip",
        type=int,
        nargs="+",
        default=[3, 5, 9, 12, 15, 18, 21, 24],
        help="blocks that the made one skips",
    )
    parser.add_argument(
        "--replacement_rank", type=int, default=0, help="rank of the random maps that the made one has"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        default=["f32", "q8_0"],
        choices=["f32", "f16", "bf16", "q8_0"],
        help="types of the weights that the converter writes",
    )
    parser.add_argument("--num_tokens", type=positive_int, default=40, help="tokens a greedy text")
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds of speed measurements")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of llama-bench")
    parser.add_argument("--seed", type=int, default=0, help="seed of the made checkpoint's scales")
    measuring.add_result_arguments(parser, "gguf")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / "gguf.json"
    if arguments.table:
        print("\n".join(table(measuring.figures_in(path))))
        return 0
    if arguments.checkpoint and arguments.replacement_rank:
        parser.error("--replacement_rank: of the checkpoint that is made; leave it out with --checkpoint")
    if not (arguments.llama_cpp and arguments.bin):
        parser.error("--llama_cpp and --bin are needed to measure")
    for needed in (
        arguments.llama_cpp / "convert_hf_to_gguf.py",
        *(arguments.bin / name for name in ("llama-simple", "llama-bench")),
    ):
        if not needed.is_file():
            raise InputError(f"{needed} is missing: check --llama_cpp and --bin")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(arguments, Path(folder))
    settings = {"model": "given by --checkpoint", "threads": arguments.threads, "rounds": arguments.rounds}
    settings["num_tokens"] = arguments.num_tokens
    if arguments.checkpoint is None:
        settings["model"] = f"{models.ALIASES[models.EMBEDDED]}, random scales, seed {arguments.seed}"
    if arguments.replacement_rank:
        settings["model"] += f", random maps of rank {arguments.replacement_rank}"
    busy = {"load_average_5_minutes": round(os.getloadavg()[1], 1)}  # of the measurements just made
    machine = measuring.machine() | busy
    measuring.save_as(path, {"machine": machine, "settings": settings, "figures": figures})
    print("\n".join(table(figures)))
    same = all(figure["same_text_as_folded"] or figure["of"]["maps"] for figure in figures)
    same = same and all(f["same_text_as_transformers"] for f in figures if f["of"]["type"] == "f32")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
