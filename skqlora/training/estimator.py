"""What a fit needs of the estimator that it fits."""

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from skqlora.adapter import Fitted


class FitEstimator(Protocol):
    """An estimator whose parameters were validated.

    `read_parameters` reads the parameters that are plain values. Those below may be functions,
    dicts or random states, or concern only the course of a fit, and are read where they are needed.
    `warm_start` is read by `fit` alone, and `class_weight` is the classifier's.
    """

    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int
    tol: float
    scoring: str | Callable[..., float] | None
    checkpoint_dir: str | os.PathLike | None
    checkpoint_every: int
    random_state: int | np.random.RandomState | None
    verbose: int

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name."""

    def _set_fitted(self, fitted: Fitted) -> None:
        """Set the fitted attributes."""
