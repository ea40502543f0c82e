"""The updates of each epoch: batches, schedule, accumulation, clipping.

The loop over the epochs, with scores and callbacks, is in `epochs.py`.

This module knows nothing of what texts and labels mean. It takes rows of token ids and numbers, and
changes the model in place.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from skqlora._utils.messages import warn
from skqlora._utils.progress import FitProgress
from skqlora.adapter import OptimizerState, TrainerState
from skqlora.checkpoint.device import empty_cache, is_out_of_memory, to_device
from skqlora.memory.planning import largest_pass
from skqlora.model.flat import FlatParameters
from skqlora.model.losses import LOSSES
from skqlora.model.text_model import TextModel
from skqlora.settings.settings import Settings
from skqlora.text.batches import TokenizedTexts, cut_by_tokens, training_batches
from skqlora.training.distributed import Ranks
from skqlora.training.optimizer import (
    load_numpy_state_dict,
    make_optimizer,
    numpy_state_dict,
    release,
)
from skqlora.training.prefix import CachedPrefix
from skqlora.training.recompute import checkpointed_blocks

CHECK_EVERY = 50  # updates between two checks that the losses are finite


class Trainer:
    """A context manager that trains an adapter and a head in place, epoch after epoch.

    Parameters
    ----------
    model : TextModel
    tokens : TokenizedTexts
        The n_rows texts.
    targets : ndarray of shape (n_rows,) or (n_rows, n_outputs)
        What the outputs are compared with: class numbers, a multilabel indicator, or numbers.
    settings : Settings
    weights : ndarray of the shape of `targets`, optional
        The weight of each target in the loss. Each row has a target of positive weight.
    loss : str, default="cross_entropy"
        The name of the loss, of those in `skqlora.model.losses`.
    prefix : CachedPrefix, optional
        The prefix that is fed to the model before each pass.
    seed : int, default=0
        The seed of the order of the rows.
    resumed : OptimizerState, optional
        The optimizer of an earlier training, which this one continues.
    """

    def __init__(
        self,
        model: TextModel,
        tokens: TokenizedTexts,
        targets: np.ndarray,
        settings: Settings,
        *,
        weights: np.ndarray | None = None,
        loss: str = "cross_entropy",
        prefix: CachedPrefix | None = None,
        seed: int = 0,
        resumed: OptimizerState | None = None,
    ):
        self.model, self.settings = model, settings
        if targets.dtype == np.float64:  # which not every device has
            targets = targets.astype(np.float32)
        self.tokens, self.targets, self.prefix = tokens, targets, prefix
        self.weights = np.ones(targets.shape) if weights is None else weights
        self.loss = LOSSES[loss]
        self.device = model.backbone.spec.device
        self.ranks = Ranks.current()
        self.rng = np.random.RandomState(seed)
        self.batch_rows = settings.batch_rows
        # The padded size of a forward pass is that of `batch_size` of the longest texts. More short
        # texts share a pass, which costs no more memory.
        longest = int(tokens.lengths.max())
        on_cpu = self.device.type == "cpu"
        self.micro_tokens = longest * largest_pass(settings.batch_size, longest, on_cpu=on_cpu)
        n_steps = settings.num_train_epochs * math.ceil(len(tokens) / self.batch_rows)
        head = FlatParameters(dict(model.head.named_parameters()))
        self.segments = [*model.replica.segments, head]
        rates = [settings.learning_rate] * len(model.replica.segments)
        rates.append(settings.head_learning_rate)
        groups = [
            {"params": [segment.leaf], "lr": rate, "weight_decay": settings.weight_decay}
            for segment, rate in zip(self.segments, rates, strict=True)
        ]
        self.optimizer = make_optimizer(settings.optim, groups)
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=_count_warmup_steps(settings, n_steps),
            num_training_steps=n_steps,
        )
        self.scaler = _make_scaler(self.device, model.backbone.spec.compute_dtype)
        self.n_epochs = self.n_updates = 0
        self.losses: list[torch.Tensor] = []  # the loss of each update of this epoch
        self.order: dict[str, Any] = {}  # the state of `rng` when this epoch began
        self._resumed = resumed
        self._last_rows = np.arange(1)
        self._places = np.arange(0)  # where the rows of the current pass are in the update

    def __enter__(self) -> "Trainer":
        with ExitStack() as stack:
            stack.callback(release, self.optimizer)
            if self._resumed is not None:
                self._load_optimizer_state(self._resumed)
            if self.settings.gradient_checkpointing:
                stack.enter_context(checkpointed_blocks(self.model.encoder))
            for segment in self.segments:
                segment.attach_gradients()
                stack.callback(segment.detach_gradients)
            self.progress = stack.enter_context(
                FitProgress(
                    len(self.tokens),
                    self.settings.num_train_epochs,
                    shown=bool(self.settings.verbose) and self.ranks.rank == 0,
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train_epoch(self, after_update: Callable[[], None] | None = None) -> float:
        """Train on all rows once, or on those that are left of a restored epoch.

        Parameters
        ----------
        after_update : callable, optional
            A function to call after each update. It may call `state_dict`.

        Returns
        -------
        loss : float
            The mean loss over the rows as they were trained on, weighted as the training is. With
            several targets a row it is the mean over rows and targets.

        Raises
        ------
        FloatingPointError
            If the loss is not finite.
        """
        self.model.train()
        losses, n_done = self.losses, len(self.losses)
        if n_done:
            self.rng.set_state(self.order)
        self.order = self.rng.get_state(legacy=False)
        batches = training_batches(self.tokens.lengths, self.batch_rows, self.rng)
        for number, rows in enumerate(batches):
            if number < n_done:
                continue
            losses.append(self.step(rows))
            self.progress.update(len(rows))
            if len(losses) % CHECK_EVERY == 0:
                self._check_finite(losses[-CHECK_EVERY:], self.n_epochs + 1)
            if after_update is not None:
                after_update()
        unchecked = losses[len(losses) // CHECK_EVERY * CHECK_EVERY :]
        self._check_finite(unchecked, self.n_epochs + 1)
        self.model.eval()
        self.n_epochs += 1
        self._last_rows = rows[:1]  # weights that are NaN spoil every row
        sum_of_losses = torch.stack(losses).sum()
        losses.clear()
        self.ranks.sum_up(sum_of_losses)
        loss = sum_of_losses.item() / float(self.weights.sum())
        epoch = f"{self.n_epochs}/{self.settings.num_train_epochs}"
        self.progress.show(epoch=epoch, loss=f"{loss:.3f}")
        return loss

    def state_dict(self) -> TrainerState:
        """Return a copy of the state of the training between two updates.

        Raises
        ------
        FloatingPointError
            If the loss of an update was not finite.
        """
        self._check_finite(self.losses, self.n_epochs + 1)
        losses = torch.stack(self.losses)
        self.ranks.sum_up(losses)
        return TrainerState(
            values=[s.leaf.detach().cpu().numpy().copy() for s in self.segments],
            optimizer=self.optimizer_state(),
            n_epochs=self.n_epochs,
            micro_tokens=self.micro_tokens,
            epoch_losses=losses.cpu().numpy(),
            order=self.order,
            scaler=self.scaler.state_dict(),
        )

    @torch.no_grad()
    def load_state_dict(self, state: TrainerState) -> None:
        """Continue from the state of a training with the same rows, settings and seed."""
        self.model.replica.mark_changed()
        for segment, values in zip(self.segments, state.values, strict=True):
            segment.leaf.copy_(torch.from_numpy(values))
        self._load_optimizer_state(state.optimizer)
        self.scaler.load_state_dict(state.scaler)
        self.n_epochs, self.order = state.n_epochs, state.order
        self.micro_tokens = state.micro_tokens
        losses = torch.tensor(state.epoch_losses, device=self.device)
        if self.ranks.rank > 0:  # the first rank has the losses of all
            losses.zero_()
        self.losses[:] = losses.unbind()
        done = self.n_epochs * len(self.tokens) + len(self.losses) * self.batch_rows
        self.progress.update(done)

    @torch.no_grad()
    def check_finite(self) -> None:
        """Check that the loss of a row is finite with the weights as they are now.

        Raises
        ------
        FloatingPointError
            If the loss is not finite, because the last update went astray.
        """
        self._check_finite([self._loss(self._last_rows)], self.n_epochs)

    def step(self, rows: np.ndarray) -> torch.Tensor:
        """Update the weights once from an effective batch, of which each rank takes its share.

        Returns
        -------
        loss : torch.Tensor
            The sum of the weighted losses of the rows that this rank takes.
        """
        loss = None
        while loss is None:
            try:
                loss = self._accumulate(rows)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(self._places) < 2:
                    raise
            if loss is None:  # outside of the handler, whose traceback holds the activations
                longest = int(self.tokens.lengths[rows[self._places[0]]])
                self._halve_micro_batches(len(self._places), longest)
        self._apply()
        self.n_updates += 1
        return loss

    def _accumulate(self, rows: np.ndarray) -> torch.Tensor:
        """Compute the gradient of an effective batch, from zero, and return the summed loss."""
        self.model.replica.mark_changed()
        for segment in self.segments:
            segment.gradient.zero_()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        # The gradient is that of a mean over all micro-batches, so that the cut into them changes
        # nothing. It is not a mean by the weights, because a division by the sum of a batch's
        # weights would let a rare class count only as much as one batch does.
        n_losses = self.targets[rows].size
        share = self.ranks.share(len(rows))
        for part_of_share in self._parts(rows[share]):
            self._places = share[part_of_share]
            loss_of_part = self._loss(rows[self._places])
            self.scaler.scale(loss_of_part / n_losses).backward()
            loss += loss_of_part.detach()
        return loss

    def _parts(self, rows: np.ndarray) -> Iterator[slice]:
        return cut_by_tokens(self.tokens.lengths[rows], self.micro_tokens)

    def _halve_micro_batches(self, n_rows: int, n_tokens: int) -> None:
        """Continue with half as many rows in a pass, which leaves the update the same."""
        half = (n_rows + 1) // 2
        self.micro_tokens = half * n_tokens
        empty_cache(self.device)
        batch_size = max(1, self.micro_tokens // int(self.tokens.lengths.max()))
        while self.batch_rows % batch_size:  # an update keeps its number of texts
            batch_size -= 1
        warn(
            f"Out of memory with {n_rows} texts of {n_tokens} tokens in a forward pass. The update "
            f"is computed again with {half} in a pass, and later passes are as small: the result "
            f"is the same up to rounding, but slower. Pass batch_size={batch_size} and "
            f"gradient_accumulation_steps={self.batch_rows // batch_size} to begin that way, or a "
            "smaller max_length.",
            RuntimeWarning,
        )

    def _check_finite(self, losses: list[torch.Tensor], epoch: int) -> None:
        """Check that the losses of the last updates are finite, with one wait for the device."""
        if not losses:
            return
        sums = torch.stack(losses)
        self.ranks.sum_up(sums)  # all ranks stop or none: one alone would leave the others waiting
        finite = torch.isfinite(sums).tolist()
        if not all(finite):
            update = self.n_updates - len(finite) + finite.index(False) + 1
            raise FloatingPointError(
                f"The training loss became infinite or NaN in update {update} (epoch "
                f"{epoch}). Wanted: a finite number. Lower learning_rate or "
                "head_learning_rate, raise warmup_steps, or pass compute_dtype='float32'. The "
                "estimator of the last epoch before is kept, if there is one."
            )

    def optimizer_state(self) -> OptimizerState:
        """Return a copy of the state of the optimizer."""
        return OptimizerState(
            optim=self.settings.optim,
            n_updates=self.n_updates,
            schedule_step=self.scheduler.last_epoch,
            states=numpy_state_dict(self.optimizer),
        )

    def _load_optimizer_state(self, resumed: OptimizerState) -> None:
        if resumed.optim != self.settings.optim:
            raise ValueError(
                f"Got optim={self.settings.optim!r} but the training to continue from had "
                f"{resumed.optim!r}. Set it back, or fit anew."
            )
        load_numpy_state_dict(self.optimizer, resumed.states)
        self.n_updates, self.scheduler.last_epoch = resumed.n_updates, resumed.schedule_step
        for group, base, factor in zip(
            self.optimizer.param_groups,
            self.scheduler.base_lrs,
            self.scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base * factor(resumed.schedule_step)

    def _loss(self, rows: np.ndarray) -> torch.Tensor:
        """Compute the sum of the weighted losses of a micro-batch."""
        inputs = to_device(self.tokens.batch(rows), self.device)
        targets = torch.from_numpy(self.targets[rows])
        weights = torch.from_numpy(self.weights[rows]).float()
        wanted = to_device({"targets": targets, "weights": weights}, self.device)
        if self.prefix is not None:
            self.prefix.feed(rows)
        outputs = self.model(**inputs, update=self.n_updates)
        return (wanted["weights"] * self.loss(outputs, wanted["targets"])).sum()

    def _apply(self) -> None:
        for segment in self.segments:
            self.ranks.sum_up(segment.gradient)
        self.scaler.unscale_(self.optimizer)
        if self.settings.max_grad_norm is not None:
            leaves = [segment.leaf for segment in self.segments]
            nn.utils.clip_grad_norm_(leaves, self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # otherwise float16 overflowed: no step was taken
            self.scheduler.step()


def _make_scaler(device: torch.device, compute_dtype: torch.dtype) -> torch.amp.GradScaler:
    """Make the scaler of a float16 loss, so that small gradients do not become zero.

    torch's scaler sets up its scale at the first loss that it is given, and fails without it. A
    rank that has no row of the first batch has no loss, so the scaler is given a zero here.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
    scaler.scale(torch.zeros((), dtype=torch.float32, device=device))
    return scaler


def _count_warmup_steps(settings: Settings, n_steps: int) -> int:
    """Count the updates of the warm-up, which `warmup_steps` may give as a share of all.

    The first update of a warm-up has the rate 0, so a warm-up never takes all updates of a fit.
    """
    if settings.incremental:
        return int(settings.warmup_steps)
    if settings.warmup_steps >= 1:
        return min(int(settings.warmup_steps), n_steps - 1)
    return min(math.ceil(settings.warmup_steps * n_steps), n_steps - 1)
