"""The training loop: batches, schedule, accumulation, clipping, checkpointing.

Knows nothing of texts' or labels' meaning: rows of token ids and class numbers come in, the model
is changed in place.
"""

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import get_scheduler

from skqlora.data import TokenizedTexts, prediction_batches, training_batches
from skqlora.distributed import Ranks
from skqlora.flat import FlatParameters
from skqlora.model import TextClassifierModel, transformer_blocks
from skqlora.optimizer import make_optimizer, release

PREDICTION_TOKENS = 4096  # of a padded batch: enough to fill two CPU cores, little memory on a GPU


@dataclass(frozen=True)
class TrainingSettings:
    """The recipe, in the names of the estimator's parameters.

    `warmup_steps` is a number of updates, or below 1 a share of them; rates are already numbers.
    """

    num_train_epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | str
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    warmup_steps: float
    lr_scheduler_type: str
    max_grad_norm: float | None
    optim: str


def scaled_learning_rate(model_type: str, hidden_size: int) -> float:
    """LoRA's peak rate by the width of the model.

    "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025): 10 times the 5e-5 of full
    fine-tuning at a width of 2000, times (2000 / width) to a power fitted for each family.

    Parameters
    ----------
    model_type : str
        transformers' name of the family.
    hidden_size : int

    Returns
    -------
    learning_rate : float
    """
    power = 0.0775 if model_type.startswith("qwen") else 0.781
    return 5e-5 * 10 * (2000 / hidden_size) ** power


def train(
    model: TextClassifierModel,
    tokens: TokenizedTexts,
    targets: np.ndarray,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    verbose: int = 0,
) -> list[float]:
    """Train the adapter and the head of `model` in place.

    Parameters
    ----------
    model : TextClassifierModel
    tokens : TokenizedTexts
        Of n_rows texts.
    targets : ndarray of shape (n_rows,), int
        Class numbers.
    settings : TrainingSettings
    seed : int, default=0
        Of the order of the rows.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    loss_curve : list of float, of length num_train_epochs
        Mean cross-entropy, in nats, over the rows of each epoch as they were trained on.

    Raises
    ------
    FloatingPointError
        If the loss of an epoch is not finite.
    """
    batch_rows = settings.batch_size * settings.gradient_accumulation_steps
    n_steps = settings.num_train_epochs * math.ceil(len(tokens) / batch_rows)
    checkpointing = _wants_checkpointing(model, settings, int(tokens.lengths.max()))
    rng = np.random.RandomState(seed)
    loss_curve: list[float] = []
    silent = not verbose or Ranks.current().rank > 0
    with (
        checkpointed_blocks(model.encoder) if checkpointing else nullcontext(),
        tqdm(total=n_steps, desc="fit", unit="step", disable=silent) as bar,
        closing(_Updater(model, settings, n_steps)) as updater,
    ):
        model.train()
        for epoch in range(settings.num_train_epochs):
            epoch_loss = updater.zero()
            for rows in training_batches(tokens.lengths, batch_rows, rng):
                epoch_loss += updater.step(tokens, targets, rows) * len(rows)
                bar.update()
            updater.ranks.sum_up(epoch_loss)
            loss_curve.append(epoch_loss.item() / len(tokens))  # the only wait for the device
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss_curve[-1]:.3f}")
            _refuse_divergence(loss_curve[-1], epoch)
        model.eval()
        _refuse_divergence(updater.loss(tokens, targets, rows), epoch)  # after the last update
    return loss_curve


@torch.no_grad()
def predict_logits(model: TextClassifierModel, tokens: TokenizedTexts) -> np.ndarray:
    """Compute the logits of each row, in the order of the rows.

    Parameters
    ----------
    model : TextClassifierModel
    tokens : TokenizedTexts
        Of n_rows texts.

    Returns
    -------
    logits : ndarray of shape (n_rows, n_classes), float64
    """
    device = model.backbone.spec.device
    logits = np.empty((len(tokens), model.head.out_features))
    for rows in prediction_batches(tokens.lengths, PREDICTION_TOKENS):
        input_ids, mask = tokens.batch(rows)
        logits[rows] = model(input_ids.to(device), mask.to(device)).cpu().numpy()
    return logits


class _Updater:
    """One update of the weights from one effective batch, of which each rank takes its share."""

    def __init__(self, model: TextClassifierModel, settings: TrainingSettings, n_steps: int):
        self.model = model
        self.settings = settings
        self.device = model.backbone.spec.device
        self.ranks = Ranks.current()
        head = FlatParameters(dict(model.head.named_parameters()))
        self.segments = [*model.clone.segments, head]
        for segment in self.segments:
            segment.attach_gradients()
        rates = [settings.learning_rate] * len(model.clone.segments)
        rates.append(settings.head_learning_rate)
        groups = [
            {"params": [segment.leaf], "lr": rate, "weight_decay": settings.weight_decay}
            for segment, rate in zip(self.segments, rates, strict=True)
        ]
        self.optimizer = make_optimizer(settings.optim, groups)
        self.scheduler = get_scheduler(
            settings.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=_count_warmup_steps(settings.warmup_steps, n_steps),
            num_training_steps=n_steps,
        )
        half = model.backbone.spec.compute_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.scaler.scale(self.zero())  # sets up its state, on a rank without rows too
        self.n_updates = 0

    def zero(self) -> torch.Tensor:
        """Return a scalar to sum losses in, on the device."""
        return torch.zeros((), dtype=torch.float32, device=self.device)

    def step(self, tokens: TokenizedTexts, targets: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Update the weights once from `rows`; return this rank's part of their mean loss."""
        self.model.clone.deactivate()
        for segment in self.segments:
            segment.gradient.zero_()
        loss = self.zero()
        clock = self.model.clock
        clock.step, clock.batch_rows = self.n_updates, len(rows)
        share = self.ranks.share(len(rows))
        for first in range(0, len(share), self.settings.batch_size):
            clock.rows = share[first : first + self.settings.batch_size]
            part = self._loss(tokens, targets, rows[clock.rows]) / len(rows)
            self.scaler.scale(part).backward()
            loss += part.detach()
        self._apply()
        self.n_updates += 1
        return loss

    @torch.no_grad()
    def loss(self, tokens: TokenizedTexts, targets: np.ndarray, rows: np.ndarray) -> float:
        """Return the loss of the first micro-batch of `rows` with the weights as they are."""
        return self._loss(tokens, targets, rows[: self.settings.batch_size]).item()

    def close(self) -> None:
        for segment in self.segments:
            segment.detach_gradients()
        release(self.optimizer)

    def _loss(self, tokens: TokenizedTexts, targets: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Sum the cross-entropy of a micro-batch."""
        input_ids, mask = (x.to(self.device) for x in tokens.batch(rows))
        logits = self.model(input_ids, mask)
        classes = torch.as_tensor(targets[rows], device=self.device)
        return nn.functional.cross_entropy(logits, classes, reduction="sum")

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
        if self.scaler.get_scale() >= scale:  # else float16 overflowed and no step was taken
            self.scheduler.step()


@contextmanager
def checkpointed_blocks(encoder: nn.Module) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    transformers' own switch acts in training mode only, which would wake the base's dropout.

    Parameters
    ----------
    encoder : torch.nn.Module
        A clone of a base: its blocks are changed, and on leaving changed back.

    Raises
    ------
    ValueError
        If the stack of blocks cannot be told.
    """
    blocks = transformer_blocks(encoder)
    if blocks is None:
        raise ValueError(
            f"Got gradient_checkpointing=True but {type(encoder).__name__} has no single stack of "
            "like blocks. Pass gradient_checkpointing=False."
        )
    # accelerate's hooks, too, are a `forward` of the block itself, over that of its class.
    hooked = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, hooked, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _checkpointed(forward, *args, **kwargs):
    return checkpoint(
        partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
    )


def _wants_checkpointing(
    model: TextClassifierModel, settings: TrainingSettings, longest: int
) -> bool:
    """Resolve "auto": when the activations of the longest batch would fill half the free memory.

    Korthikanti et al. (arXiv 2205.05198, equation 2): 34 bytes for each token, feature and layer,
    attention scores aside, which the fused kernels do not keep.
    """
    if settings.gradient_checkpointing != "auto":
        return bool(settings.gradient_checkpointing)
    device = model.backbone.spec.device
    blocks = transformer_blocks(model.encoder)
    if device.type == "cpu" or blocks is None:
        return False
    memory = getattr(torch, device.type)
    # What torch has set aside and does not use is free too.
    unused = memory.memory_reserved(device) - memory.memory_allocated(device)
    free = memory.mem_get_info(device)[0] + unused
    n_tokens = settings.batch_size * longest
    return 34 * n_tokens * model.backbone.hidden_size * len(blocks) > free / 2


def _count_warmup_steps(warmup_steps: float, n_steps: int) -> int:
    """Resolve a share. The first update of a warm-up has rate 0, so one of several must be left."""
    n_warmup = int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * n_steps)
    return min(n_warmup, n_steps - 1)


def _refuse_divergence(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The training loss became {loss} in epoch {epoch + 1}. Wanted: a "
            "finite number. Lower learning_rate or head_learning_rate, raise warmup_steps, or pass "
            "compute_dtype='float32'."
        )
