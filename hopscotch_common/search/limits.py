"""How many blocks to skip: as a share of the KV cache, or by what the loss may rise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hopscotch_common.errors import InputError
from hopscotch_common.modeling_hopscotch import attention_blocks


def most_picks(config, skipped: Sequence[int]) -> int:
    """How many more blocks can be skipped: all but one, which `check_skipped_blocks` may choose."""
    return len(attention_blocks(config)) - 1 - len(skipped)


def picks_for_kv_budget(share: float, config, skipped: Sequence[int]) -> int:
    """The fewest more blocks to skip, so that the KV cache takes at most a share of the whole model's.

    Attention layers count alike, also those with a sliding window. InputError where `skipped` do already.
    """
    present = len(attention_blocks(config))
    picks = present - math.floor(share * present + 1e-9) - len(skipped)
    if picks < 1:
        raise InputError(
            f"--kv_budget {share}: with {len(skipped)} of {present} blocks skipped already, the KV cache "
            f"takes {(present - len(skipped)) / present:.3g} of it; give a smaller share"
        )
    return picks


@dataclass(frozen=True)
class LossLimit:
    """most: what the loss may rise. original: the loss with nothing skipped."""

    most: float
    original: float

    def increase(self, loss: float) -> float:
        """As a share of the original's loss; of one that is 0 there, as KL is, the loss itself."""
        return (loss - self.original) / self.original if self.original else loss
