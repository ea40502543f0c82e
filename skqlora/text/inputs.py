"""Checks of a user's texts, labels and weights, and the table of them that is trained on.

This module knows nothing about models: bad input is reported before a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skqlora._utils.messages import warn
from skqlora.settings.template import is_for_one_text
from skqlora.text.columns import Columns, Rows, Table, check_column, rows_of, texts_of
from skqlora.text.labels import check_labels
from skqlora.text.numbers import check_numbers
from skqlora.text.targets import Classes, Numbers, Target


@dataclass(frozen=True)
class CheckedTexts:
    """What a user passes as `X`, checked.

    Attributes
    ----------
    texts : list of str, or of tuples of str, of length n_texts
        What is tokenized: one text a row, or a text for each field of the prompt or, without a
        prompt, for each column.
    rows : sequence of length n_texts
        The same for a scorer: the texts, or the rows of the table.
    columns : Columns or None
        What is remembered of the columns; None if these are just texts.
    all_text : bool
        Whether there is text in each column.
    """

    texts: Sequence[str] | Sequence[tuple[str, ...]]
    rows: Sequence[Any]
    columns: Columns | None
    all_text: bool = True

    @classmethod
    def of(
        cls,
        table: Table,
        columns: Columns | None = None,
        prompt: str | None = None,
        name: str = "X",
    ) -> "CheckedTexts":
        """Check the cells of a table, and turn them into text.

        Parameters
        ----------
        table : Table
        columns : Columns, optional
            What is remembered of the columns, at this fit or at an earlier one.
        prompt : str, optional
        name : str, default="X"
            The user's name for the table.

        Raises
        ------
        TypeError, ValueError
            If a cell is empty or of a wrong kind, or if the prompt does not fit the columns.
        """
        if len(table.cells) == 1 and (prompt is None or is_for_one_text(prompt)):
            texts = check_column(table.cells[0], name)
            return cls(texts, texts, columns)
        names = table.names if columns is None else columns.names
        parts = texts_of(table, names, prompt, name)
        all_text = all(any(isinstance(cell, str) for cell in column) for column in table.cells)
        return cls(parts, rows_of(table, columns), columns, all_text)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, numbers: np.ndarray) -> "CheckedTexts":
        """Select rows by number."""
        rows: Sequence[Any] = [self.rows[number] for number in numbers]
        if isinstance(self.rows, Rows):
            rows = Rows(rows, self.rows.remembered)
        return replace(self, texts=[self.texts[number] for number in numbers], rows=rows)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels as numbers, and their weights.

    Attributes
    ----------
    inputs : CheckedTexts
    target : Classes or Numbers
        What is predicted.
    targets : ndarray of shape (n_texts,) or (n_texts, n_outputs)
        The class numbers, or a multilabel indicator of 0 and 1, or the user's numbers in float64.
    sample_weight : ndarray of shape (n_texts,), float64, or None
        The weights, without zeros. None gives each text a weight of one.
    """

    inputs: CheckedTexts
    target: Target
    targets: np.ndarray
    sample_weight: np.ndarray | None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def texts(self) -> Sequence[str] | Sequence[tuple[str, ...]]:
        """What is tokenized."""
        return self.inputs.texts

    @property
    def y(self) -> np.ndarray:
        """The labels or numbers as the user wrote them."""
        return self.target.to_user(self.targets)

    def take(self, rows: np.ndarray) -> "LabelledTexts":
        """Select rows by number."""
        return replace(
            self,
            inputs=self.inputs.take(rows),
            targets=self.targets[rows],
            sample_weight=None if self.sample_weight is None else self.sample_weight[rows],
        )


def check_labelled_texts(
    inputs: CheckedTexts,
    y: Any,
    sample_weight: Any = None,
    classes: np.ndarray | None = None,
    suffix: str = "",
) -> LabelledTexts:
    """Combine checked texts with a user's labels and weights; leave out rows of weight zero.

    Parameters
    ----------
    inputs : CheckedTexts
        The n_texts texts.
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
    classes, targets = check_labels(y, len(inputs), classes, suffix)
    target = Classes(classes, multilabel=targets.ndim == 2)
    weights = check_sample_weight(sample_weight, len(inputs), f"sample_weight{suffix}")
    return _without_zeros(LabelledTexts(inputs, target, targets, weights))


def check_numbered_texts(
    inputs: CheckedTexts,
    y: Any,
    sample_weight: Any = None,
    *,
    loss: str,
    earlier: Target | None = None,
) -> LabelledTexts:
    """Combine checked texts with a user's numbers and weights; leave out rows of weight zero.

    Parameters
    ----------
    inputs : CheckedTexts
        The n_texts texts.
    y : array-like of shape (n_texts,) or (n_texts, n_outputs)
    sample_weight : array-like of shape (n_texts,) or float, optional
    loss : {"squared_error", "absolute_error", "huber"}
    earlier : Numbers, optional
        What an earlier fit, which this one continues, predicts.

    Raises
    ------
    ValueError
        If numbers or weights are invalid, or if there is not one for each text.

    Warns
    -----
    UserWarning
        If all numbers of a first fit are the same.
    """
    numbers = check_numbers(y, len(inputs))
    weights = check_sample_weight(sample_weight, len(inputs))
    kept = slice(None) if weights is None else weights > 0
    counted = None if weights is None else weights[kept] / weights.max()
    target = Numbers.of(numbers[kept], counted, loss)
    n_constant = np.count_nonzero(target.scale == 0)
    if n_constant and earlier is None:
        warn(
            f"All numbers in {'y' if numbers.ndim == 1 else f'{n_constant} column(s) of y'} are "
            "the same, so that nothing can be learned of them. They are predicted.",
        )
    return _without_zeros(LabelledTexts(inputs, target, numbers, weights))


def _without_zeros(table: LabelledTexts) -> LabelledTexts:
    """Leave out rows of weight zero."""
    weights = table.sample_weight
    return table if weights is None else table.take(np.flatnonzero(weights))


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
    inputs: CheckedTexts, y_val: Any, sample_weight_val: Any, target: Target
) -> LabelledTexts:
    """Combine texts and labels, or numbers, for early stopping to score.

    Parameters
    ----------
    inputs : CheckedTexts
        The n_texts texts.
    y_val : array-like or sparse matrix of shape (n_texts,) or (n_texts, n_outputs)
    sample_weight_val : array-like of shape (n_texts,) or None
    target : Classes or Numbers
        What is predicted.

    Raises
    ------
    ValueError
        If labels, numbers or weights are invalid, or if they are of another kind than in training.
    """
    if isinstance(target, Numbers):
        numbers = check_numbers(y_val, len(inputs), "y_val")
        if numbers.shape[1:] != (() if target.one_dimensional else (target.n_outputs,)):
            raise ValueError(
                f"Got y_val of shape {numbers.shape}, but y has {target.describe()}. Wanted: both "
                "of one shape."
            )
        weights = check_sample_weight(sample_weight_val, len(inputs), "sample_weight_val")
        return _without_zeros(LabelledTexts(inputs, target, numbers, weights))
    table = check_labelled_texts(inputs, y_val, sample_weight_val, target.values, suffix="_val")
    multilabel = table.targets.ndim == 2
    if multilabel != target.multilabel:
        kinds = ["one label for each text", "a multilabel indicator"]
        raise ValueError(
            f"Got {kinds[multilabel]} as y_val, but {kinds[target.multilabel]} as y. "
            "Wanted: both of one kind."
        )
    return replace(table, target=target)


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
