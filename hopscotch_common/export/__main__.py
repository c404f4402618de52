"""Write a checkpoint in a format that other tools load: scales folded into the weights.

    python -m hopscotch_common.export scaled_smollm_ckpts/smollm_scaled_epoch_9 \\
        --format nemotron_nas --output smollm_vllm
    vllm serve smollm_vllm --trust-remote-code

Formats:
    folded        the stock architecture (LlamaForCausalLM, ...), skipped blocks with a zero o_proj:
                  loads anywhere, and is no faster
    nemotron_nas  the DeciLM format of vLLM and others: skipped blocks are not computed and take no
                  KV cache
    gguf          a file for llama.cpp, rewritten from the GGUF that its converter makes from `folded`

An exported folder is compared with its checkpoint on real tokens. If the error exceeds the tolerance, the
export is refused and leaves nothing behind. A GGUF is rewritten tensor by tensor, and refused unless its
skipped blocks add zero.
"""

import argparse
import json
import sys

from hopscotch_common.cli import ArgumentParser, command, path, positive_float, result


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "checkpoint", type=path, help="folder of a checkpoint (scaled, unscaled, or original)"
    )
    parser.add_argument(
        "--format", choices=["folded", "nemotron_nas", "gguf"], required=True, help="see below"
    )
    parser.add_argument("--output", type=path, required=True, help="folder to write; a file for gguf")
    parser.add_argument(
        "--tolerance",
        type=positive_float,
        help="largest relative logit error against the checkpoint, both computed in float32 (default: 0.01, "
        "or, for 16-bit weights, the checkpoint's own error when computed in 16 bits)",
    )
    parser.add_argument("--device", default="auto", help="where the check runs: cpu, cuda, auto or split")
    parser.add_argument(
        "--without_maps",
        action="store_true",
        help="folded: leave maps out; --format gguf puts them back into what llama.cpp makes of it",
    )
    parser.add_argument(
        "--from", dest="folded_gguf", type=path, help="gguf: what llama.cpp made of the folded checkpoint"
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if (arguments.format == "gguf") != (arguments.folded_gguf is not None):
        parser.error("--from goes with --format gguf, which needs it")
    if arguments.format == "gguf" and arguments.tolerance is not None:
        parser.error("--tolerance: a GGUF is rewritten, not compared; leave it out")
    if arguments.without_maps and arguments.format != "folded":
        parser.error("--without_maps goes with --format folded, the first step to a GGUF with maps")

    from hopscotch_common.export.formats import export_checkpoint
    from hopscotch_common.export.gguf import rewrite_gguf

    if arguments.format == "gguf":
        report = rewrite_gguf(arguments.checkpoint, arguments.folded_gguf, arguments.output)
        result(json.dumps(report))
        return 0
    report = export_checkpoint(
        arguments.checkpoint,
        arguments.format,
        arguments.output,
        arguments.tolerance,
        arguments.device,
        arguments.without_maps,
    )
    result(f"{arguments.output}: {report['summary']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
