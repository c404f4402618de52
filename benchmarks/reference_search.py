"""The search the plain way: what `block_selection.py` must equal, and is measured against.

    python benchmarks/reference_search.py --model smollm --data_path data.jsonl --candidates 5 9

For each candidate block the stock model is loaded anew. Batches are padded in the order in which
samples arrive, every layer computes its attention (a skipped one is multiplied by zero), and the
loss comes from the full logits at every position. Only the scales train, as in the search itself.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hopscotch_common.models import model_ref  # noqa: E402


class ScaledLayer(nn.Module):
    """A stock decoder layer inside the method's two equations."""

    def __init__(self, layer: nn.Module, skip: bool):
        super().__init__()
        self.layer = layer
        self.b_attn = nn.Parameter(torch.zeros(1) if skip else torch.ones(1), requires_grad=not skip)
        self.s_attn = nn.Parameter(torch.ones(1))
        self.b_mlp = nn.Parameter(torch.ones(1))
        self.s_mlp = nn.Parameter(torch.ones(1))

    def forward(self, x, **kwargs):
        multiplier = getattr(self.layer, "residual_multiplier", 1.0)
        attention, _ = self.layer.self_attn(hidden_states=self.layer.input_layernorm(x), **kwargs)
        x = self.b_attn * multiplier * attention + self.s_attn * x
        mlp = self.layer.mlp(self.layer.post_attention_layernorm(x))
        return self.b_mlp * multiplier * mlp + self.s_mlp * x


def load(folder: Path, skipped: set[int]) -> tuple[nn.Module, list[nn.Parameter]]:
    """The stock model with scaled layers, and the scales that train."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval().requires_grad_(False)
    layers = [ScaledLayer(layer, index in skipped) for index, layer in enumerate(model.model.layers)]
    model.model.layers = nn.ModuleList(layers)
    return model, [p for layer in layers for p in layer.parameters() if p.requires_grad]


def epoch_losses(
    folder: Path, samples: list[dict], skipped: set[int], batch_size: int, learning_rate: float, seed: int
) -> list[float]:
    """One epoch of one candidate: the mean loss of each batch."""
    model, parameters = load(folder, skipped)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for start in range(0, len(order), batch_size):
        batch = [samples[i] for i in order[start : start + batch_size]]
        ids = pad_sequence([torch.tensor(s["input_ids"]) for s in batch], batch_first=True)
        labels = pad_sequence(
            [torch.tensor(s["labels"]) for s in batch], batch_first=True, padding_value=-100
        )
        mask = pad_sequence([torch.ones(len(s["input_ids"])) for s in batch], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def read_samples(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=model_ref, required=True)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--starting_skipped_blocks", nargs="*", type=int, default=[])
    parser.add_argument("--candidates", nargs="*", type=int, help="default: every block that is left")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    folder, samples = arguments.model.folder(), read_samples(arguments.data_path)
    skipped = set(arguments.starting_skipped_blocks)
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    candidates = arguments.candidates or [block for block in range(num_layers) if block not in skipped]
    means = {}
    for block in candidates:
        losses = epoch_losses(
            folder, samples, {*skipped, block}, arguments.batch_size, arguments.learning_rate, arguments.seed
        )
        means[block] = sum(losses) / len(losses)
        print(f"block {block}: loss {means[block]:.4f}", flush=True)
    best = min(means, key=means.get)
    print(f"Best block to remove: {best} (loss: {means[best]:.4f})")


if __name__ == "__main__":
    main()
