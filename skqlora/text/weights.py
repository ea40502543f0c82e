"""The weight of each text in the loss: its own weight times that of its class.

This module knows neither the content of the texts nor how the loss is computed.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from skqlora.text.inputs import LabelledTexts
from skqlora.text.targets import Classes, Numbers
from skqlora.text.values import plain_str

LARGEST = sys.float_info.max
GREATEST_RATIO = 1e9  # of the mean weights of two pieces of the data
ClassWeight = Mapping[Any, float] | list[Mapping[int, float]] | str | None


def weigh(
    table: LabelledTexts, class_weight: ClassWeight = None, *, min_classes: int = 2
) -> tuple[LabelledTexts, np.ndarray]:
    """Multiply the weights of the texts by those of their classes; drop rows of weight zero.

    The weight of a text counts for each of its numbers, if it has no classes.

    "balanced" is scikit-learn's ``n / (n_classes * count)`` (King and Zeng, "Logistic Regression in
    Rare Events Data", 2001), where a text counts as often as its weight says.

    Parameters
    ----------
    table : LabelledTexts
    class_weight : dict of label to float, "balanced" or None
        The weights of the classes. For multilabel targets it is a list with a dict of 0 and 1 to
        float for each label.
    min_classes : int, default=2
        The number of classes that must keep a weight, if each text has one class.

    Returns
    -------
    table : LabelledTexts
        The rows with a weight above zero.
    weights : ndarray of the shape of the targets in the training, float64

    Raises
    ------
    ValueError
        If `class_weight` does not fit the classes, or leaves too few with a weight above zero.
    """
    sample_weight = table.sample_weight
    if sample_weight is None:
        sample_weight = np.ones(len(table))
    target = table.target
    if isinstance(target, Numbers):
        # Of numbers that are all the same nothing is learned.
        counted_columns = target.scale > 0 if target.scale.any() else np.ones(target.n_outputs)
        return table, sample_weight[:, None] * counted_columns
    counted = without_exponent(sample_weight)
    with np.errstate(over="ignore"):
        if target.multilabel:
            columns = _label_weights(target, table.targets, counted, class_weight)
            weights = sample_weight[:, None] * columns
        else:
            of_class = _single_weights(target, table.targets, counted, class_weight)
            weights = sample_weight * of_class
    if not np.isfinite(weights).all():
        raise ValueError(
            "Got weights (sample_weight times class_weight) that are too large for float64. "
            "Wanted: smaller ones with the same ratios."
        )
    rows = np.flatnonzero(weights.reshape(len(weights), -1).any(axis=1))
    table, weights = table.take(rows), weights[rows]
    if len(rows) == 0 or (not target.multilabel and len(np.unique(table.targets)) < min_classes):
        names = target.values[np.unique(table.targets)].tolist()
        raise ValueError(
            f"Got weights (sample_weight and class_weight) that leave only the classes {names}. "
            f"Wanted: at least {min_classes} with a weight above zero."
        )
    return table, weights


def without_exponent(weights: np.ndarray) -> np.ndarray:
    """Divide weights by the power of two above the greatest, so that their sum cannot overflow.

    Unlike a division by another number, this rounds nothing.
    """
    return np.ldexp(weights, -np.frexp(weights.max())[1])


def mean_weight(weights: np.ndarray) -> float:
    """Compute the mean of weights, even where their sum overflows."""
    return float(np.ldexp(without_exponent(weights).mean(), np.frexp(weights.max())[1]))


def check_scale(weights: np.ndarray, scale: float) -> None:
    """Refuse a piece of the data whose weights are of another order than those of the first.

    Raises
    ------
    ValueError
        If the mean weight is more than `GREATEST_RATIO` times `scale`, or as much smaller. Products
        with such weights would leave the range of float32.
    """
    mean = mean_weight(weights)
    ratio = np.log2(mean) - np.log2(scale)
    if abs(ratio) > np.log2(GREATEST_RATIO):
        raise ValueError(
            f"Got weights with the mean {mean:.3g}, but those of the first call of partial_fit (or "
            f"of fit) have {scale:.3g}. Wanted: weights of one scale in all calls."
        )


def _single_weights(
    target: Classes, targets: np.ndarray, sample_weight: np.ndarray, class_weight: ClassWeight
) -> np.ndarray:
    """Return the weight of each text's class, of shape (n_texts,)."""
    if isinstance(class_weight, list):
        raise ValueError(
            "Got a list as class_weight with one label for each text. Wanted: a dict of label to "
            "weight, 'balanced' or None."
        )
    names = target.values.tolist()
    return _class_weights(class_weight, names, targets, sample_weight)[targets]


def _label_weights(
    target: Classes, targets: np.ndarray, sample_weight: np.ndarray, class_weight: ClassWeight
) -> np.ndarray:
    """Return the weight of each label's presence or absence, of shape (n_texts, n_labels)."""
    n_labels = target.n_outputs
    dicts = class_weight if isinstance(class_weight, list) else []
    if isinstance(class_weight, Mapping) or (
        isinstance(class_weight, list)
        and (len(dicts) != n_labels or not all(isinstance(entry, Mapping) for entry in dicts))
    ):
        raise ValueError(
            f"Got class_weight={class_weight!r} with {n_labels} labels. Wanted: 'balanced', None, "
            f"or a list of {n_labels} dicts such as {{0: 1, 1: 5}}, one for each label."
        )
    columns = []
    for label, present in enumerate(targets.T):
        of_label = class_weight[label] if isinstance(class_weight, list) else class_weight
        by_presence = _class_weights(of_label, [0, 1], present, sample_weight)
        columns.append(by_presence[present])
    return np.stack(columns, axis=1)


def _class_weights(
    class_weight: Mapping[Any, float] | str | None,
    names: list[Any],
    targets: np.ndarray,
    sample_weight: np.ndarray,
) -> np.ndarray:
    """Return the weight of each class, in the order of the class numbers."""
    weights = np.ones(len(names))
    if class_weight == "balanced":
        # A text counts as often as its weight says.
        counts = np.bincount(targets, weights=sample_weight, minlength=len(names))
        present = counts > 0
        weights[present] = counts.sum() / (present.sum() * counts[present])
    elif isinstance(class_weight, Mapping):
        weights[:] = _by_name(class_weight, names)
    return weights


def _by_name(class_weight: Mapping[Any, float], names: list[Any]) -> list[float]:
    """Look classes up by their exact label, whereas scikit-learn's function takes "0" for 0."""
    bad = [
        weight
        for weight in class_weight.values()
        if not isinstance(weight, (int, float, np.number)) or not 0 <= weight <= LARGEST
    ]
    if bad:
        raise ValueError(
            f"Got the weight {bad[0]!r} in class_weight. Wanted: finite numbers, none negative."
        )
    class_weight = {plain_str(label): weight for label, weight in class_weight.items()}
    missing = [name for name in names if name not in class_weight]
    unknown = [name for name in class_weight if name not in names]
    # As in scikit-learn, a class may be left out, and a fold may lack a class.
    if missing and unknown:
        raise ValueError(
            f"Got a class_weight for {unknown}, which y does not hold. Wanted: keys that are "
            f"labels as they are in y, of the same type: {names[:20]}."
        )
    return [class_weight.get(name, 1.0) for name in names]


def expand_windows(
    table: LabelledTexts, weights: np.ndarray, counts: np.ndarray
) -> tuple[LabelledTexts, np.ndarray]:
    """Give each window of a text the text's label and an equal part of its weight.

    Parameters
    ----------
    table : LabelledTexts
        The table of n_texts texts.
    weights : ndarray of the shape of the targets
    counts : ndarray of int, of shape (n_texts,)
        The number of windows of each text.

    Returns
    -------
    table : LabelledTexts
        The table with a row for each window.
    weights : ndarray of the shape of its targets
        The weights of the windows, which have the same mean as before.
    """
    if counts.max() == 1:
        return table, weights
    owners = np.repeat(np.arange(len(counts)), counts)
    parts = (counts.mean() / counts)[owners]
    return table.take(owners), weights[owners] * parts.reshape(-1, *[1] * (weights.ndim - 1))
