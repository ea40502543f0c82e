"""Checks of a user's numbers, which a regressor is to predict."""

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
    if y is None:
        raise ValueError(f"This estimator requires y to be passed, but the target {name} is None.")
    if scipy.sparse.issparse(y):
        raise ValueError(f"Got {name} as a sparse matrix. {WANTED} Pass {name}.toarray().")
    values = np.asarray(y)
    if values.dtype.kind not in "biuf":
        values = np.asarray(y, dtype=object)
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise ValueError(f"Got {name} of shape {values.shape}. {WANTED}")
    if len(values) != n_texts:
        raise ValueError(
            f"Found inconsistent numbers of samples: {n_texts} texts but {len(values)} rows in "
            f"{name}. Wanted: a number, or a row of numbers, for each text."
        )
    if values.dtype == object:
        for place, value in np.ndenumerate(values):
            if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
                what = (
                    "a missing number" if is_missing(value) else f"of type {type(value).__name__}"
                )
                remedy = " `QLoRAClassifier` predicts classes." if isinstance(value, str) else ""
                raise ValueError(
                    f"Got {name}{list(place)} = {short(value)}, {what}. {WANTED}{remedy}"
                )
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float64)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        value = numbers[tuple(bad[0])]
        what = ", a missing number" if np.isnan(value) else ""
        # scikit-learn's checks look for these words.
        kind = "NaN" if np.isnan(value) else "infinity"
        raise ValueError(
            f"Got {name}{bad[0].tolist()} = {value}{what}: {name} contains {kind}. {WANTED}"
        )
    return numbers
