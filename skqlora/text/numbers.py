"""Checks of a user's numbers, which a regressor is to predict."""

from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse

from skqlora.text.values import is_missing, short

WANTED = "Wanted: finite numbers, one for each text or a row of them."


def check_numbers(y: Any, n_texts: int, name: str = "y") -> np.ndarray:
    """Check the numbers of a regressor.

    Parameters
    ----------
    y : array-like of shape (n_texts,) or (n_texts, n_outputs)
    n_texts : int
    name : str, default="y"
        The user's name for the numbers.

    Returns
    -------
    numbers : ndarray of float64, of the shape of `y`

    Raises
    ------
    ValueError
        If there is not one for each text, if one is missing, infinite or no number, or if there
        are more than two dimensions.
    """
    values = _as_array(y, name)
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise ValueError(f"Got {name} of shape {values.shape}. {WANTED}")
    if len(values) != n_texts:
        raise ValueError(
            f"Found inconsistent numbers of samples: {n_texts} texts but {len(values)} rows in "
            f"{name}. Wanted: a number, or a row of numbers, for each text."
        )
    for place, value in np.ndenumerate(values) if values.dtype == object else ():
        if not isinstance(value, (Real, Decimal)) or is_missing(value):
            what = "a missing number" if is_missing(value) else f"of type {type(value).__name__}"
            remedy = " `QLoRAClassifier` predicts classes." if isinstance(value, str) else ""
            raise ValueError(f"Got {name}{list(place)} = {short(value)}, {what}. {WANTED}{remedy}")
    try:
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float64)
    except OverflowError as error:
        raise ValueError(f"Got {name} with a number beyond float64. {WANTED}") from error
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        value = numbers[tuple(bad[0])]
        missing, kind = (", a missing number", "NaN") if np.isnan(value) else ("", "infinity")
        # scikit-learn's checks look for "contains NaN" and "contains infinity".
        raise ValueError(
            f"Got {name}{bad[0].tolist()} = {value}{missing}: {name} contains {kind}. {WANTED}"
        )
    return numbers


def _as_array(y: Any, name: str) -> np.ndarray:
    """Turn numbers into an array, of objects if they are not NumPy's own."""
    if y is None:
        raise ValueError(f"This estimator requires y to be passed, but the target {name} is None.")
    if scipy.sparse.issparse(y):
        raise ValueError(f"Got {name} as a sparse matrix. {WANTED} Pass {name}.toarray().")
    if np.ma.is_masked(y):
        raise ValueError(f"Got {name} with masked entries. {WANTED} Leave these rows out.")
    try:
        values = np.asarray(y)
        if values.dtype.kind in "mMcV":
            raise ValueError(f"its entries are of type {values.dtype}")
        return values if values.dtype.kind in "biuf" else np.asarray(y, dtype=object)
    except (ValueError, TypeError, RuntimeError) as error:  # of NumPy, or of torch's tensors
        raise ValueError(f"Got {name}, which is no array of numbers: {error}. {WANTED}") from error
