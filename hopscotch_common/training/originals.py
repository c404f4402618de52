"""The original model's hidden states, to which KL is taken: computed when asked for, or once and kept."""

from collections.abc import Sequence

import torch

from hopscotch_common import scales
from hopscotch_common.training.batches import Batch, Minibatch, Sample
from hopscotch_common.training.loss import counted_states
from hopscotch_common.training.memory import MinibatchRunner

KEPT_BYTES = 2 * 2**30  # of main memory, in each process


class Originals:
    """What the original model hands to its LM head where a loss-counted token follows.

    The original is the same loaded model with nothing skipped and all scales 1, so its states are the
    same in every epoch and for every candidate.
    """

    def __init__(self, model):
        self.model = model
        self._kept: dict[int, tuple[Sample, torch.Tensor]] = {}

    def keep(self, batches: Sequence[Batch]) -> None:
        """Compute the states of all samples of some batches now, unless they take more than KEPT_BYTES.

        They are computed in the batches that are given, so the same ones give the same bits.
        """
        tokens = sum(batch.num_loss_counted_tokens for batch in batches)
        if tokens * self.model.config.hidden_size * self.model.dtype.itemsize > KEPT_BYTES:
            return
        runner = MinibatchRunner()
        for batch in batches:
            for minibatch, states in runner.run(batch.minibatches, self._compute, "the original model"):
                counts = [sample.num_loss_counted_tokens for sample in minibatch.samples]
                for sample, rows in zip(minibatch.samples, states.cpu().split(counts), strict=True):
                    self._kept[id(sample)] = (sample, rows.clone())

    def __call__(self, minibatch: Minibatch) -> torch.Tensor:
        """The states of a minibatch's samples in its order, [tokens, hidden], on the LM head's device."""
        kept = [self._kept.get(id(sample)) for sample in minibatch.samples]
        if None in kept:
            return self._compute(minibatch)
        return torch.cat([rows for _, rows in kept]).to(self.model.lm_head.weight.device)

    @torch.no_grad()
    def _compute(self, minibatch: Minibatch) -> torch.Tensor:
        """Runs whole samples, without a shared prefix. The minibatch is not moved yet."""
        with scales.neutral(self.model):
            return counted_states(self.model, minibatch.whole().to(self.model.device))
