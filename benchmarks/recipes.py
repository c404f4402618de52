"""How should the scales be trained? Other learning rates, a decay, a pull toward 1, and trained norms.

    python benchmarks/recipes.py --model smollm --data_path data/smollm-processed-data/data.jsonl \\
        --blocks 7 25 6 3 --dtype bfloat16
    python benchmarks/recipes.py --model smollm --table

Every recipe trains the same scales on the first --answers of the data, in the same batches, and is
measured on the last --held_out ones after each epoch. Only the first of them is what `param_scale.py` does;
the others live here, until one is worth a flag. Results go to benchmarks/results/recipes_{model}.json
after each training; the next run adds to it.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import measuring
import torch
from data_study import train
from growing import GrowingResults

from hopscotch_common import cli
from hopscotch_common.loading import load_model
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Batch, Sample, load_samples
from hopscotch_common.training.epochs import EpochTraining
from hopscotch_common.training.trainer import ScaleTrainer


@dataclass(frozen=True)
class Recipe:
    """learning_rate: Adam's. decay: it falls in a straight line to 0 at the last step.

    pull: after each step a scale loses the share learning_rate * pull of its distance to 1 (decoupled
    weight decay, toward 1). norms: each layer's RMSNorms train, too, as a factor [hidden] on what they give.
    """

    learning_rate: float = 3e-3
    decay: bool = False
    pull: float = 0.0
    norms: bool = False


RECIPES = {
    "default": Recipe(),
    "lr-1e-3": Recipe(learning_rate=1e-3),
    "lr-1e-2": Recipe(learning_rate=1e-2),
    "decay": Recipe(decay=True),
    "lr-1e-2-decay": Recipe(learning_rate=1e-2, decay=True),
    "pull-1": Recipe(pull=1.0),
    "pull-10": Recipe(pull=10.0),
    "norms": Recipe(norms=True),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=cli.model, required=True)
    parser.add_argument("--data_path", type=Path, help="processed data of step 2")
    parser.add_argument("--blocks", type=int, nargs="+", help="attention blocks to skip")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--granularity", choices=["layer", "channel"], default="channel")
    parser.add_argument("--loss", choices=["ce", "kl"], default="kl")
    parser.add_argument("--answers", type=int, default=100, help="to train on")
    parser.add_argument("--held_out", type=int, default=48, help="answers that no training sees")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results/recipes_{model}.json")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, measure nothing")
    return parser


class RecipeTrainer(ScaleTrainer):
    """A `ScaleTrainer` whose steps follow a recipe. num_steps: of the whole training."""

    def __init__(self, model, recipe: Recipe, num_steps: int, skipped: Sequence[int], originals):
        super().__init__(model, recipe.learning_rate, skipped, originals=originals)
        self.recipe, self.num_steps, self.taken = recipe, num_steps, 0
        self._hooks = []
        if recipe.norms:
            factors = [self._train_norm(norm) for norm in _norms(model)]
            self.parameters = [*self.parameters, *factors]
            self.optimizer = torch.optim.Adam(self.parameters, lr=recipe.learning_rate)

    def _train_norm(self, norm: torch.nn.Module) -> torch.Tensor:
        factor = torch.ones(len(norm.weight), requires_grad=True)
        hook = norm.register_forward_hook(lambda _, __, output: (output * factor).to(output.dtype))
        self._hooks.append(hook)
        return factor

    def step(self, batch: Batch, where: str) -> torch.Tensor:
        rate = self.recipe.learning_rate
        if self.recipe.decay:
            rate *= 1 - self.taken / self.num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = super().step(batch, where)
        if self.recipe.pull:
            with torch.no_grad():
                for parameter in self.parameters:
                    parameter += rate * self.recipe.pull * (1 - parameter)
        self.taken += 1
        return loss

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _norms(model) -> list[torch.nn.Module]:
    """The norms that run in each layer: of its attention, unless that is skipped, and of its MLP."""
    found = []
    for layer in model.model.layers:
        found += [] if layer.skip_attention else [layer.input_layernorm]
        found.append(layer.post_attention_layernorm)
    return found


class RecipeTraining(EpochTraining):
    """An `EpochTraining` of so many epochs whose steps follow a recipe; `close` it."""

    def __init__(self, recipe: Recipe, epochs: int, *setting, **more):
        super().__init__(*setting, **more)
        self.recipe, self.num_steps = recipe, epochs * len(self._training)

    def start(self, state: None = None) -> None:
        originals = self._originals if self.options.loss == "kl" else None
        self._trainer = RecipeTrainer(self.model, self.recipe, self.num_steps, self.skipped, originals)

    def close(self) -> None:
        self._trainer.close()


def measure(arguments: argparse.Namespace, model, samples: Sequence[Sample], recipe: Recipe) -> dict:
    """What `data_study.train` tells of a recipe."""
    held_out = samples[len(samples) - arguments.held_out :]
    options = TrainingOptions(recipe.learning_rate, arguments.batch_size, loss=arguments.loss)
    setting = (model, arguments.blocks, samples[: arguments.answers], held_out, options)
    with contextlib.closing(RecipeTraining(recipe, arguments.epochs, *setting, bar=cli.progress)) as trained:
        return train(trained, arguments.epochs)


def table(figures: Sequence[dict]) -> list[str]:
    """Markdown: a row for each recipe, the figures after its last epoch, in the order of RECIPES."""
    lines = ["| recipe | held-out cross entropy | KL | agreement |", "|---|---|---|---|"]
    for figure in sorted(figures, key=lambda f: list(RECIPES).index(f["of"]["recipe"])):
        found = figure["epochs"][-1]["held_out"]
        lines.append(
            f"| {figure['of']['recipe']} | {found['cross_entropy']:.4f} | {found['kl']:.4f} "
            f"| {100 * found['agreement']:.1f} % |"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    path = arguments.result or measuring.RESULTS / f"recipes_{arguments.model.name}.json"
    if arguments.table:
        print("\n".join(table(json.loads(path.read_text())["figures"])))
        return
    if not (arguments.data_path and arguments.blocks):
        parser.error("--data_path and --blocks are needed to measure")
    names = ("granularity", "loss", "answers", "held_out", "epochs", "batch_size", "dtype")
    settings = {
        "model": arguments.model.source,
        "data": hashlib.sha256(arguments.data_path.read_bytes()).hexdigest(),
        "blocks": sorted(arguments.blocks),
        **{name: getattr(arguments, name) for name in names},
    }
    results = GrowingResults(path, settings)
    model = load_model(arguments.model, arguments.dtype, "cpu", scale_granularity=arguments.granularity)
    samples = load_samples(arguments.data_path, model.config.vocab_size)
    if arguments.answers + arguments.held_out > len(samples):
        raise SystemExit(f"{arguments.data_path}: {len(samples)} answers are too few")
    for name in arguments.recipes:
        work = (arguments, model, samples, RECIPES[name])
        figure = results.measure(lambda work=work: measure(*work), recipe=name)
        print(name, figure["epochs"][-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
