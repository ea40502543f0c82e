"""Early stopping by a score on held-out texts, which keeps the best adapter so far.

This module knows nothing of how a model is trained.
"""

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from sklearn.metrics import check_scoring
from sklearn.model_selection import train_test_split

from skqlora.adapter import AdapterState, Fitted
from skqlora.text.inputs import LabelledTexts
from skqlora.text.targets import Classes, Numbers
from skqlora.text.weights import without_exponent
from skqlora.training.estimator import FitEstimator


class EarlyStopping:
    """The scores of the epochs, and the adapter with the best score, which is kept in memory.

    Parameters
    ----------
    estimator : QLoRAClassifier
        The estimator, of which `scoring`, `n_iter_no_change` and `tol` are read.
    held_out : LabelledTexts
    earlier : list of float
        The scores of the epochs of the earlier fits that this one continues.

    Attributes
    ----------
    held_out : LabelledTexts
    best : AdapterState or None
        The adapter with the best score so far.
    """

    def __init__(self, estimator: FitEstimator, held_out: LabelledTexts, earlier: list[float]):
        self._scoring = scoring = estimator.scoring
        self._scorer = _loss_scorer if scoring == "loss" else check_scoring(estimator, scoring)
        self._patience, self._tol = estimator.n_iter_no_change, estimator.tol
        self.held_out = held_out
        self._epochs_without_change = 0
        self._scores = list(earlier)
        self.best: AdapterState | None = None
        self._best_score = -math.inf

    def score(self, fitted: FitEstimator) -> float:
        """Score an estimator on the held-out texts, as if its fit ended now.

        Raises
        ------
        TypeError
            If the held-out texts have weights and the scorer takes none.
        ValueError
            If the scorer fails, or the score is not a finite number.
        """
        table = self.held_out
        weights = {}
        if table.sample_weight is not None:
            weights = {"sample_weight": without_exponent(table.sample_weight)}
        try:
            score = self._scorer(fitted, table.inputs.rows, table.y, **weights)
        except TypeError as error:
            if weights and "sample_weight" in str(error):
                raise TypeError(
                    f"The `scoring` of early stopping takes no sample_weight ({error}), but the "
                    "validation has one. Wanted: another `scoring`, or X_val and y_val without "
                    "sample_weight_val."
                ) from error
            raise
        except ValueError as error:
            raise ValueError(
                f"The scoring={self._scoring!r} of early stopping failed on the {len(table)} texts "
                f"of the validation: {error}"
            ) from error
        if not isinstance(score, Real) or not math.isfinite(score):
            raise ValueError(
                f"Got the score {score} on the {len(table)} texts of the validation. Wanted: a "
                "finite number. Choose another `scoring`, or a larger validation."
            )
        return float(score)

    def set_baseline(self, score: float, adapter: AdapterState) -> None:
        """Keep an adapter from before the first epoch until an epoch scores at least as high."""
        self.best, self._best_score = adapter, score

    def update(self, score: float, adapter: AdapterState) -> bool:
        """Record the score of an epoch, and return whether to stop.

        As in scikit-learn's `MLPClassifier`, an epoch counts as no change if its score is not above
        the best one so far by more than `tol`. Unlike there, the last of equal scores is the best.
        """
        changed = score > self._best_score + self._tol
        self._epochs_without_change = 0 if changed else self._epochs_without_change + 1
        if score >= self._best_score:  # the last of equal ones was trained longest
            self.best, self._best_score = adapter, score
        self._scores.append(score)
        return self._epochs_without_change >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, without the best adapter."""
        return {
            "scores": list(self._scores),
            "best_score": self._best_score,
            "epochs_without_change": self._epochs_without_change,
        }

    def load_state_dict(self, state: dict[str, Any], best: AdapterState | None) -> None:
        """Continue from a state that `state_dict` returned, and its best adapter."""
        self.best, self._best_score = best, state["best_score"]
        self._scores = list(state["scores"])
        self._epochs_without_change = state["epochs_without_change"]

    def apply_to(self, fitted: Fitted) -> Fitted:
        """Return the fit with the best adapter instead of its own, and with the scores."""
        assert self.best is not None  # at least one epoch is over
        return replace(
            fitted,
            adapter=self.best,
            validation_scores=list(self._scores),
            best_validation_score=self._best_score,
        )


def hold_out(
    table: LabelledTexts, fraction: float, seed: int
) -> tuple[LabelledTexts, LabelledTexts]:
    """Split off texts for validation, in the proportions of the classes.

    Each class keeps a text for training, so a rare class may have none held out. Texts with several
    labels, or with numbers, are split at random.

    Parameters
    ----------
    table : LabelledTexts
    fraction : float
        The share of the texts to hold out.
    seed : int

    Returns
    -------
    training, held_out : LabelledTexts

    Raises
    ------
    ValueError
        If one of the two parts would be too small.
    """
    rows = np.arange(len(table))
    counts = None
    if isinstance(table.target, Classes) and not table.target.multilabel:
        counts = np.bincount(table.targets, minlength=table.target.n_outputs)
    divisible = rows if counts is None else rows[counts[table.targets] > 1]
    n_held_out = math.ceil(fraction * len(table))
    n_classes = 1 if counts is None else int((counts > 1).sum())
    if isinstance(table.target, Numbers):  # of one text there is no R²
        n_held_out = max(n_held_out, 2)
    each = f", for one of each of the {n_classes} classes with several texts" * (counts is not None)
    if n_held_out < n_classes or len(divisible) - n_held_out < n_classes or n_classes == 0:
        raise ValueError(
            f"Got early_stopping=True and validation_fraction={fraction} with {len(table)} texts, "
            f"of which {n_held_out} would be held out: too few, on one side or the other"
            f"{each}. Wanted: more texts, another "
            "validation_fraction, or X_val and y_val."
        )
    _, held_out = train_test_split(
        divisible,
        test_size=n_held_out,
        random_state=seed,
        stratify=None if counts is None else table.targets[divisible],
    )
    if counts is not None:  # rounding may have left a class no text to train on
        trained = np.unique(table.targets[np.setdiff1d(rows, held_out)])
        of_class, first = np.unique(table.targets[held_out], return_index=True)
        held_out = np.delete(held_out, first[~np.isin(of_class, trained)])
    training = np.setdiff1d(rows, held_out)
    return table.take(training), table.take(np.sort(held_out))


def _loss_scorer(fitted: Any, X: Any, y: np.ndarray, sample_weight: Any = None) -> float:
    """Return the negative mean loss, of the kind that is trained with."""
    fit, outputs = fitted._compute_outputs(X)
    return -float(np.average(fit.target.losses(outputs, y), weights=sample_weight))
