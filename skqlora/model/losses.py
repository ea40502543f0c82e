"""The losses of a training: what outputs of the head cost, compared with their targets."""

from collections.abc import Callable

import torch
from torch import nn

F = nn.functional


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of a softmax over the classes, for each row, in nats.

    Parameters
    ----------
    logits : torch.Tensor of shape (n_rows, n_classes)
    targets : torch.Tensor of int, of shape (n_rows,)
        The class numbers.

    Returns
    -------
    losses : torch.Tensor of shape (n_rows,)
    """
    return F.cross_entropy(logits, targets, reduction="none")


def binary_cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy of a sigmoid, for each row and label, in nats."""
    targets = targets.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def squared_errors(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the squared difference, for each row and number."""
    return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="none")


def absolute_errors(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the absolute difference, for each row and number."""
    return F.l1_loss(outputs, targets.to(outputs.dtype), reduction="none")


def huber_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute Huber's loss, squared below a difference of 1 and linear above."""
    return F.huber_loss(outputs, targets.to(outputs.dtype), reduction="none")


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": cross_entropies,
    "binary_cross_entropy": binary_cross_entropies,
    "squared_error": squared_errors,
    "absolute_error": absolute_errors,
    "huber": huber_losses,
}
