"""One loaded model on which a search trains candidates, or judges them before training."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import send_to_device
from torch.nn.functional import cosine_similarity

from hopscotch_common import scales
from hopscotch_common.errors import Diverged, progress
from hopscotch_common.scales.modeling_hopscotch import attention_blocks
from hopscotch_common.search.schedule import Candidate
from hopscotch_common.training import TrainingOptions
from hopscotch_common.training.batches import Batch, Minibatch, MinibatchRunner, Sample
from hopscotch_common.training.distributed import Group
from hopscotch_common.training.loss import HeldOut, Originals, evaluate, summed_head_loss
from hopscotch_common.training.replacement import fit_maps, layer_calls
from hopscotch_common.training.trainer import EpochBatches, ScaleState, ScaleTrainer, prepare_model


class CandidateTrainer:
    """Trains candidates on one model, over the same batches in the same order.

    held_out: samples that are not trained on. Several processes may share a candidate (`Group`); each
    then runs its part of every batch. everyone: all processes, which share what is only measured.
    """

    def __init__(
        self,
        model,
        samples: Sequence[Sample],
        options: TrainingOptions,
        held_out: Sequence[Sample] = (),
        everyone: Group | None = None,
    ):
        self.model, self.options = model, options
        prepare_model(model, options)
        self.batches = EpochBatches(model, samples, options)
        self.num_batches = math.ceil(len(samples) / options.batch_size)
        self._everyone = everyone or Group()
        share = (self._everyone.rank, self._everyone.size)
        self._shared = self.batches.epoch(0, *share)
        self._held_out = EpochBatches(model, held_out, options).in_order(*share)
        self._runner = MinibatchRunner()
        self._originals = Originals(model)
        self._trained_towards = self._originals if options.loss == "kl" else None
        if options.loss == "kl":
            self._originals.keep(self.batches.epoch())
        self._originals.keep(self._held_out)
        self._wrong: dict[int, float] = {}  # by block, once the maps are fitted

    def fit_maps(self) -> None:
        """Fit the map of every block, for when it is skipped."""
        batches = self.batches.in_order(self._everyone.rank, self._everyone.size)
        batches = progress(batches, "fitting the maps")
        self._wrong = fit_maps(
            self.model, batches, attention_blocks(self.model.config), self._everyone.reduce
        )

    def candidates(self, skipped: Sequence[int]) -> list[int]:
        """The blocks that could each be skipped next."""
        return scales.skippable_blocks(self.model, skipped)

    def train(
        self, skipped: Sequence[int], candidate: Candidate, look: int, group: Group, on_batch: Callable
    ) -> Candidate:
        """Return the candidate after `look` batches of the epoch, from where it is; marked if it diverged."""
        losses, done = list(candidate.losses), len(candidate.losses)
        trainer = ScaleTrainer(
            self.model,
            self.options.learning_rate,
            [*skipped, candidate.block],
            candidate.state,
            group.reduce,
            self._runner,
            self._trained_towards,
        )

        def keep(loss: float) -> None:
            losses.append(loss)
            on_batch()

        name = f"candidate block {candidate.block}, epoch 0"
        batches = self.batches.epoch(0, group.rank, group.size)[done:look]
        try:
            trainer.run(batches, name, first=done, on_batch=keep)
            state = trainer.state()
            if not bool(state.tensors.isfinite().all()):
                where = f"after batch {len(losses) - 1}"
                raise Diverged(f"{name}: the scales or their moments are not finite {where}")
        except Diverged as error:
            return Candidate(candidate.block, losses, diverged=str(error))
        return Candidate(candidate.block, losses, state)

    def screen(
        self, skipped: Sequence[int], blocks: Sequence[int], index: int, on_screened: Callable[[float], None]
    ) -> dict[int, float]:
        """Return each block's loss on one batch before any training (`untrained_losses`)."""
        batch, where = self.batches.epoch()[index], f"screening, batch {index}"
        return untrained_losses(
            self.model,
            batch,
            skipped,
            blocks,
            where,
            on_screened,
            runner=self._runner,
            originals=self._trained_towards,
        )

    @torch.no_grad()
    def distances(self, skipped: Sequence[int], blocks: Sequence[int]) -> dict[int, float]:
        """Return how much each block changes what passes through it, with `skipped` skipped and scales of 1.

        The measure is 1 - the cosine similarity of the residual stream before and after the block, a mean
        over all tokens, as in LLM-Drop (arXiv 2406.15786): a criterion without any loss. A block that hardly
        turns the stream is assumed to matter little. With maps, it is the share of the stream after a block
        that its map gets wrong (`fit_maps`). Raises TrainingError if a single answer does not fit into
        memory.
        """
        if self._wrong:
            return {block: self._wrong[block] for block in blocks}
        scales.reset(self.model, skipped)
        total = torch.zeros(len(blocks) + 1, dtype=torch.float64)  # the last counts tokens

        def sums_of(minibatch: Minibatch) -> torch.Tensor:
            on_device = minibatch.to(self.model.device)
            calls = layer_calls(self.model, on_device)
            mask = on_device.attention_mask
            sums = []
            for block in blocks:
                layer = self.model.model.layers[block]
                before, keywords = send_to_device(calls[block], layer.s_scale_attn.device)  # of a split model
                after = layer.after_attention(before, **keywords)
                distance = 1 - cosine_similarity(before.float(), after.float(), dim=-1)  # [rows, length]
                sums.append((distance if mask is None else distance * mask.to(distance.device)).sum().cpu())
            return torch.stack(sums)

        for batch in self._shared:
            minibatches = [minibatch.whole() for minibatch in batch.minibatches]
            for minibatch, sums in self._runner.run(minibatches, sums_of, "cosine distances"):
                tokens = sum(len(sample) for sample in minibatch.samples)
                total += torch.cat([sums.double(), total.new_tensor([tokens])])
        reduce = self._everyone.reduce
        *sums, tokens = (total if reduce is None else reduce(total.to(self.model.device))).tolist()
        return {block: summed / tokens for block, summed in zip(blocks, sums, strict=True)}

    def original_loss(self) -> float:
        """Return the mean cross entropy of the batches with nothing skipped, as a candidate's loss is."""
        scales.reset(self.model)
        return statistics.fmean(
            evaluate(
                self.model, [batch], "the original model", self._everyone.reduce, self._originals
            ).cross_entropy
            for batch in self._shared
        )

    def held_out(self, skipped: Sequence[int], state: ScaleState | None = None) -> HeldOut | None:
        """Return the figures of the held-out samples, if any, with exactly `skipped` skipped.

        state: None for scales of 1.
        """
        if not self._held_out:
            return None
        scales.reset(self.model, skipped)
        if state is not None:
            scales.restore(self.model, state.tensors[0])
        return evaluate(self.model, self._held_out, "held-out loss", self._everyone.reduce, self._originals)


@torch.no_grad()
def untrained_losses(
    model,
    batch: Batch,
    skipped: Sequence[int],
    blocks: Sequence[int],
    where: str,
    on_screened: Callable[[float], None] = lambda share: None,
    runner: MinibatchRunner | None = None,
    originals: Originals | None = None,
) -> dict[int, float]:
    """Return the batch's mean loss with each of `blocks` skipped besides `skipped`, at scales of 1.

    This is the loss of a first training step on that batch, at a fraction of its cost; infinite if it is not
    finite. Candidates differ only in the one layer whose attention they skip. What is below that layer is the
    same for all of them and is computed once: half of the work. originals: the loss is the divergence from
    them; None: cross entropy. where: named in the errors, for example "screening, batch 3". on_screened gets
    the share of the batch that was run, summed over the blocks, each time. Raises TrainingError if a single
    answer does not fit into memory.
    """
    scales.reset(model, skipped)
    totals, layers = torch.zeros(len(blocks), device=model.device), model.model.layers
    minibatches = [minibatch.whole() for minibatch in batch.minibatches]
    num_samples = sum(len(minibatch.samples) for minibatch in minibatches)

    def loss_without(block: int, calls: list[tuple], minibatch: Minibatch, original) -> torch.Tensor:
        """Return the summed loss with one more attention block skipped, from that block's layer on."""
        hidden, _ = calls[block]
        layers[block].skip_attention = True
        try:
            for layer, (_, keywords) in zip(layers[block:], calls[block:], strict=True):
                hidden = layer(hidden, **keywords)
        finally:
            layers[block].skip_attention = False
        return summed_head_loss(model, model.model.norm(hidden), minibatch, original)

    def losses_of(minibatch: Minibatch) -> torch.Tensor:
        original = None if originals is None else originals(minibatch)
        calls = layer_calls(model, minibatch.to(model.device))
        losses = [loss_without(block, calls, minibatch, original) for block in blocks]
        return torch.stack([loss.to(model.device) for loss in losses])

    for minibatch, losses in (runner or MinibatchRunner()).run(minibatches, losses_of, where):
        totals += losses
        on_screened(len(blocks) * len(minibatch.samples) / num_samples)
    means = (totals / batch.num_loss_counted_tokens).tolist()
    return {b: mean if math.isfinite(mean) else math.inf for b, mean in zip(blocks, means, strict=True)}
