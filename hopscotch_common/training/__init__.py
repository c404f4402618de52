"""How scales are trained: the choices that search, final training, benchmarks and tests share."""

from dataclasses import dataclass

# The losses to train on, and the names under which held-out figures report them: cross entropy on the
# answers' tokens, or the divergence from the original model's distribution at the same positions.
MEASURES = {"ce": "cross_entropy", "kl": "kl"}
IGNORE_INDEX = -100  # the label of a token that does not count for the loss
MAPS_RATE = 1 / 3  # learning rate of maps in skipped blocks' place, as a share of the scales'


@dataclass(frozen=True)
class TrainingOptions:
    """Options of training scales.

    learning_rate: Adam's. batch_size: answers per optimizer step.
    max_tokens_per_batch: most tokens that run at once, padding included; None: what suits the device.
    It bounds memory and does not change the result; the same holds for gradient_checkpointing.
    seed: of the data's order. loss: one of MEASURES.
    """

    learning_rate: float
    batch_size: int = 32
    max_tokens_per_batch: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 42
    loss: str = "ce"
