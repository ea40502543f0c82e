"""Checks of a user's texts and weights, and the table of texts and labels that is trained on.

This module knows nothing about models: bad input is reported before a model is loaded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from skqlora.text.labels import check_labels
from skqlora.text.values import is_missing, short, well_formed


def check_texts(X: Any, name: str = "X") -> list[str]:
    """Turn a user's texts into a list of str.

    Parameters
    ----------
    X : list, tuple, Series or array of str, of shape (n_texts,), or a table with one column
    name : str, default="X"
        The user's name for `X`.

    Returns
    -------
    texts : list of str, of length n_texts

    Raises
    ------
    TypeError
        If `X` is not a sequence, or if an entry is not a str. The message names its position.
    ValueError
        If `X` is empty or has several columns, or if a text is not valid Unicode.
    """
    wanted = "Wanted: a list, Series or array of str."
    if isinstance(X, (str, bytes)):
        raise TypeError(
            f"Got {name} as a single {type(X).__name__}. {wanted} Pass [text] for one text."
        )
    column_like = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not column_like or isinstance(X, dict) or scipy.sparse.issparse(X):
        raise TypeError(
            f"Got {name} of type {type(X).__name__}. {wanted} Pass list({name}) if it holds texts."
        )
    columns = getattr(X, "column_names", None)
    if isinstance(columns, list) and len(columns) == 1:  # a table, such as `datasets.Dataset`
        X = X[columns[0]]
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"Got {name} of shape {values.shape}. Wanted: one text a row. Pass a single column, "
            "or join the columns into one text."
        )
    if len(values) == 0:
        raise ValueError(f"Got {name} with 0 sample(s). Wanted: at least one text.")
    for position, text in enumerate(values):
        if not isinstance(text, str):
            remedy = "Turn it into text."
            if isinstance(text, dict):  # a row of a table, such as `datasets.Dataset`
                remedy = f"Pass a column, such as {name}[{next(iter(text), 'text')!r}]."
            if is_missing(text):
                remedy = "Drop the row, or fill it with '' (pandas: fillna, polars: fill_null)."
            raise TypeError(
                f"Got {name}[{position}] = {short(text)} of type {type(text).__name__}. Wanted: "
                f"str in every row. {remedy}"
            )
    return [well_formed(text, f"{name}[{position}]") for position, text in enumerate(values)]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels as numbers, and their weights.

    Attributes
    ----------
    texts : list of str, of length n_texts
    classes : ndarray of shape (n_classes,)
        The classes in the labels' own dtype, or the numbers of a multilabel indicator's columns.
    targets : ndarray of int, of shape (n_texts,) or (n_texts, n_classes)
        The class numbers, or a multilabel indicator of 0 and 1.
    sample_weight : ndarray of shape (n_texts,), float64, or None
        The weights, without zeros. None gives each text a weight of one.
    """

    texts: list[str]
    classes: np.ndarray
    targets: np.ndarray
    sample_weight: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def multilabel(self) -> bool:
        """Whether a text has any number of labels instead of one class."""
        return self.targets.ndim == 2

    @property
    def labels(self) -> np.ndarray:
        """The labels as the user wrote them."""
        return self.targets if self.multilabel else self.classes[self.targets]

    def take(self, rows: np.ndarray) -> "LabelledTexts":
        """Select rows by number."""
        return LabelledTexts(
            texts=[self.texts[row] for row in rows],
            classes=self.classes,
            targets=self.targets[rows],
            sample_weight=None if self.sample_weight is None else self.sample_weight[rows],
        )


def check_labelled_texts(
    texts: list[str],
    y: Any,
    sample_weight: Any = None,
    classes: np.ndarray | None = None,
    suffix: str = "",
) -> LabelledTexts:
    """Combine checked texts with a user's labels and weights; leave out rows of weight zero.

    Parameters
    ----------
    texts : list of str, of length n_texts
    y : array-like or sparse matrix of shape (n_texts,) or (n_texts, n_labels)
    sample_weight : array-like of shape (n_texts,) or float, optional
    classes : ndarray of shape (n_classes,), optional
        The only classes that `y` may have. Without them `y` must have two or more.
    suffix : str, default=""
        The suffix of the user's names for texts, labels and weights.

    Raises
    ------
    ValueError
        If labels or weights are invalid, or if there is not one for each text.
    """
    classes, targets = check_labels(y, len(texts), classes, suffix)
    sample_weight = check_sample_weight(sample_weight, len(texts), f"sample_weight{suffix}")
    table = LabelledTexts(texts, classes, targets, sample_weight)
    if table.sample_weight is None:
        return table
    return table.take(np.flatnonzero(table.sample_weight))


def is_validation_given(
    X_val: Any, y_val: Any, sample_weight_val: Any, early_stopping: bool
) -> bool:
    """Check whether the user passed texts for early stopping to score.

    Raises
    ------
    ValueError
        If the texts or the labels are missing from what was passed, or if there is no early
        stopping.
    """
    values = {"X_val": X_val, "y_val": y_val, "sample_weight_val": sample_weight_val}
    given = [name for name, value in values.items() if value is not None]
    missing = [name for name in ("X_val", "y_val") if name not in given]
    if given and missing:
        raise ValueError(
            f"Got {' and '.join(given)} without {' and '.join(missing)}. Wanted: both X_val and "
            "y_val, or neither."
        )
    if given and not early_stopping:
        raise ValueError(
            f"Got {' and '.join(given)} with early_stopping=False, which would ignore them. "
            "Wanted: early_stopping=True, or none of them."
        )
    return bool(given)


def check_validation(
    texts: list[str], y_val: Any, sample_weight_val: Any, training: LabelledTexts
) -> LabelledTexts:
    """Combine texts and labels for early stopping to score, with the classes of the training.

    Parameters
    ----------
    texts : list of str, of length n_texts
    y_val : array-like or sparse matrix of shape (n_texts,) or (n_texts, n_labels)
    sample_weight_val : array-like of shape (n_texts,) or None
    training : LabelledTexts
        The texts and labels to train on.

    Raises
    ------
    ValueError
        If labels or weights are invalid, or if the labels are of another kind than in training.
    """
    table = check_labelled_texts(texts, y_val, sample_weight_val, training.classes, suffix="_val")
    if table.multilabel != training.multilabel:
        kinds = ["one label for each text", "a multilabel indicator"]
        raise ValueError(
            f"Got {kinds[table.multilabel]} as y_val, but {kinds[training.multilabel]} as y. "
            "Wanted: both of one kind."
        )
    return table


def check_sample_weight(
    sample_weight: Any, n_texts: int, name: str = "sample_weight"
) -> np.ndarray | None:
    """Check a user's weights.

    Parameters
    ----------
    sample_weight : array-like of shape (n_texts,), float or None
    n_texts : int
    name : str, default="sample_weight"
        The user's name for the weights.

    Returns
    -------
    sample_weight : ndarray of shape (n_texts,), float64, or None

    Raises
    ------
    ValueError
        If a weight is negative, infinite, NaN or not numeric, or if all weights are zero.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight)
    if weights.dtype.kind not in "biuf":  # numbers of pandas' own types arrive as objects
        try:
            weights = weights.astype(np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"Got a {name} that is not all numbers: {error}. Wanted: a number for each text."
            ) from error
    weights = np.full(n_texts, weights) if weights.ndim == 0 else weights
    if weights.shape != (n_texts,):
        raise ValueError(
            f"Got a {name} of shape {weights.shape}. Wanted: ({n_texts},), one weight for "
            "each text."
        )
    weights = weights.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise ValueError(
            f"Got {name}[{bad[0]}] = {weights[bad[0]]}. Wanted: finite numbers, none of "
            "them negative. A weight of 0 leaves a text out."
        )
    if not weights.any():
        raise ValueError(f"Got a {name} of zeros only. Wanted: at least one weight above zero.")
    return weights
