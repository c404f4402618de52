"""What skipping blocks should gain, by arithmetic: FLOPs of prefill, bytes that a decoding step reads.

    python benchmarks/arithmetic.py
    python benchmarks/arithmetic.py --model ./qwen15.gguf --rows 1 --contexts 1000 --counts 4 8
    python benchmarks/arithmetic.py --table

Prefill is bound by FLOPs: two for each weight of a layer and token, plus those of the causal attention
itself. A decoding step is bound by memory: it reads each weight once for all rows, and each row's KV cache.
Norms, activations, writes and waits for the CPU are left out, and so are maps in a block's place (at rank 16,
a three hundredth of what they replace in a Llama-3.1-8B). Times are the least that `--tflops` and
`--bandwidth` allow; their defaults are those of an H100 SXM's data sheet, dense bfloat16.

The default model is a Llama-3.1-8B. Only dense decoders with full attention are supported.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import measuring
import torch
from gpu import LLAMA
from measuring import row, title
from transformers import AutoModelForCausalLM, LlamaConfig

from hopscotch_common.answers.engines import kv_bytes_per_token
from hopscotch_common.loading.loader import read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales.modeling_hopscotch import head_dim_of

DEFAULT = "llama-3.1-8b"


@dataclass(frozen=True)
class Cost:
    """What a model takes, in numbers of weights unless said otherwise.

    attention: of an attention block's projections; mlp: of a layer's MLP; head: of the output layer.
    width: of all heads' queries, so that a token's attention to another takes 4 * width FLOPs.
    kv_bytes: of a token's keys and values in one block; itemsize: bytes of a weight.
    """

    layers: int
    attention: int
    mlp: int
    head: int
    width: int
    kv_bytes: int
    itemsize: int

    def prefill_flops(self, rows: int, tokens: int, skipped: int = 0) -> int:
        """Of `rows` prompts of `tokens`; the logits of the last token only."""
        attended = self.layers - skipped
        weights = self.layers * self.mlp + attended * self.attention
        pairs = tokens * (tokens + 1) // 2  # causal
        return rows * (2 * weights * tokens + 4 * attended * self.width * pairs + 2 * self.head)

    def decode_bytes(self, rows: int, context: int, skipped: int = 0) -> int:
        """Read for one more token of each of `rows` texts of `context` tokens."""
        attended = self.layers - skipped
        weights = self.layers * self.mlp + attended * self.attention + self.head
        return weights * self.itemsize + rows * context * attended * self.kv_bytes


def cost_of(config, dtype: str) -> Cost:
    """The cost of a config's model, counted on one without memory (device meta)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    layers = model.get_decoder().layers

    def weights(modules: Iterable[torch.nn.Module]) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    attention, mlp = weights([layers[0].self_attn]), weights([layers[0].mlp])
    if weights(layer.self_attn for layer in layers) != len(layers) * attention:
        raise SystemExit("layers of several shapes: not counted here")
    head_dim = head_dim_of(config)
    return Cost(
        layers=len(layers),
        attention=attention,
        mlp=mlp,
        head=model.get_output_embeddings().weight.numel(),
        width=config.num_attention_heads * head_dim,
        kv_bytes=kv_bytes_per_token(config, dtype) // len(layers),
        itemsize=getattr(torch, dtype).itemsize,
    )


def compute(cost: Cost, arguments: argparse.Namespace, rows: int, context: int, skipped: int) -> dict:
    """Least seconds, and how many times as fast that is as with nothing skipped; bytes read in decoding."""
    flops, read = cost.prefill_flops(rows, context, skipped), cost.decode_bytes(rows, context, skipped)
    return {
        "prefill_seconds": flops / (arguments.tflops * 1e12),
        "decode_seconds": read / (arguments.bandwidth * 1e9),
        "prefill_times": cost.prefill_flops(rows, context) / flops,
        "decode_times": cost.decode_bytes(rows, context) / read,
        "kv_bytes": rows * context * (cost.layers - skipped) * cost.kv_bytes,
        "weight_bytes": cost.decode_bytes(0, 0, skipped),
    }


def table(figures: list[dict]) -> list[str]:
    """Markdown: a row for each number of rows, tokens and skipped blocks."""
    lines = title(
        *("rows", "tokens", "skipped", "prefill, s", "times", "decode, ms a step", "times"),
        *("KV cache, GB", "weights read, GB"),
    )
    for figure in figures:
        cells = [f"{figure['prefill_seconds']:.3f}", f"{figure['prefill_times']:.2f}"]
        cells += [f"{1e3 * figure['decode_seconds']:.1f}", f"{figure['decode_times']:.2f}"]
        cells += [f"{figure[name] / 1e9:.2f}" for name in ("kv_bytes", "weight_bytes")]
        lines.append(row(*figure["of"].values(), *cells))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEFAULT, help="as the scripts take it; default: a Llama-3.1-8B")
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 4, 8], help="skipped blocks")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="texts at once")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192], help="tokens of each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tflops", type=float, default=989, help="of the device, 10^12 a second")
    parser.add_argument("--bandwidth", type=float, default=3350, help="of its memory, GB a second")
    measuring.add_result_arguments(parser, "arithmetic_{model}")
    arguments = parser.parse_args(argv)
    name = arguments.model
    if name != DEFAULT:
        arguments.model = model_ref(name)
        name = arguments.model.name
    path = arguments.result or measuring.RESULTS / f"arithmetic_{name}.json"
    if not arguments.table:
        config = LlamaConfig(**LLAMA) if name == DEFAULT else read_config(arguments.model)
        cost = cost_of(config, arguments.dtype)
        settings = measuring.settings_of(arguments, "model dtype tflops bandwidth")
        results = measuring.Results(path, settings | {"cost": asdict(cost)})
        for rows in arguments.rows:
            for context in arguments.contexts:
                for skipped in arguments.counts:
                    of = {"rows": rows, "tokens": context, "skipped": skipped}
                    results.measure(of, compute, cost, arguments, *of.values())
    print("\n".join(table(json.loads(path.read_text())["figures"])))


if __name__ == "__main__":
    main()
