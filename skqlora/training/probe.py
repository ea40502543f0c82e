"""A head that starts as a linear model of the features of the untrained base.

This module knows nothing of models. It takes vectors and numbers.
"""

import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from skqlora._utils.libraries import library_lock

PROBE_TEXTS = 10_000  # the greatest number of rows that a probe is fitted to
PROBE_C = 0.03  # the C of the regression, for features of unit variance
RIDGE_PENALTY = 0.1  # that of the regression of numbers, for each text


def choose_probe_rows(targets: np.ndarray, seed: int) -> np.ndarray:
    """Draw the rows that a probe is fitted to: all of them, or a sample if there are very many.

    If each row has one class, a sample holds a row of every class.

    Parameters
    ----------
    targets : ndarray of int, of shape (n_rows,) or (n_rows, n_labels)
    seed : int

    Returns
    -------
    rows : ndarray of int
    """
    order = np.random.RandomState(seed).permutation(len(targets))
    if targets.ndim == 1:
        firsts = np.unique(targets[order], return_index=True)[1]
        order = np.concatenate([order[firsts], np.delete(order, firsts)])
    return np.sort(order[:PROBE_TEXTS])


def fit_probe(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, n_classes: int, *, bias: bool
) -> dict[str, np.ndarray]:
    """Fit a logistic regression, or one for each label if the targets are multilabel.

    Fine-tuning from there is "linear probing, then fine-tuning" (Kumar et al., arXiv 2202.10054).
    It starts where training on frozen features ends, and distorts them less than a random head
    does.

    Parameters
    ----------
    features : ndarray of shape (n_rows, n_features)
    targets : ndarray of int, of shape (n_rows,) or (n_rows, n_classes)
        The class numbers, or a multilabel indicator.
    weights : ndarray of the shape of `targets`
        The weight of each target in the loss.
    n_classes : int
    bias : bool
        Whether the head has a bias.

    Returns
    -------
    head : dict of str to ndarray
        The float32 array "weight" of shape (n_classes, n_features) and, if asked for, "bias".
    """
    scaled, mean, scale = _standardized(features, bias)
    if targets.ndim == 1:
        weight, intercept = _fit(scaled, targets, weights, n_classes, bias)
    else:
        columns = [
            _fit(scaled, *column, 2, bias) for column in zip(targets.T, weights.T, strict=True)
        ]
        weight = np.stack([w[1] - w[0] for w, _ in columns])
        intercept = np.stack([b[1] - b[0] for _, b in columns])
    return _as_head(weight / scale, intercept, mean, bias)


def fit_linear_probe(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, n_outputs: int, *, bias: bool
) -> dict[str, np.ndarray]:
    """Fit a ridge regression for each number.

    Parameters
    ----------
    features : ndarray of shape (n_rows, n_features)
    targets : ndarray of shape (n_rows, n_outputs)
    weights : ndarray of the shape of `targets`
    n_outputs : int
    bias : bool
        Whether the head has a bias.

    Returns
    -------
    head : dict of str to ndarray
        The float32 array "weight" of shape (n_outputs, n_features) and, if asked for, "bias".
    """
    scaled, mean, scale = _standardized(features, bias)
    of_texts = weights.max(axis=1)  # a column that is not trained on has the weight 0
    probe = Ridge(RIDGE_PENALTY * of_texts.sum(), fit_intercept=bias)
    with library_lock:
        probe.fit(scaled, targets, of_texts)
    weight = probe.coef_.reshape(n_outputs, -1)
    intercept = np.broadcast_to(probe.intercept_, n_outputs)
    return _as_head(weight / scale, intercept, mean, bias)


def _standardized(features: np.ndarray, bias: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = features.mean(axis=0) if bias else np.zeros(features.shape[1])
    scale = np.sqrt(((features - mean) ** 2).mean(axis=0))
    scale[scale == 0] = 1
    return (features - mean) / scale, mean, scale


def _as_head(
    weight: np.ndarray, intercept: np.ndarray, mean: np.ndarray, bias: bool
) -> dict[str, np.ndarray]:
    head = {"weight": weight.astype(np.float32)}
    if bias:
        head["bias"] = (intercept - weight @ mean).astype(np.float32)
    return head


def _fit(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, n_classes: int, bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of weights and an intercept for each class; zeros for an absent class."""
    weight, intercept = np.zeros((n_classes, features.shape[1])), np.zeros(n_classes)
    counted = weights > 0
    present = np.unique(targets[counted])
    if len(present) < 2:
        return weight, intercept
    probe = LogisticRegression(C=PROBE_C, fit_intercept=bias, max_iter=100)
    with library_lock, warnings.catch_warnings():
        # As a start it will do, even if it has not converged or has few texts for many classes.
        warnings.simplefilter("ignore", UserWarning)
        probe.fit(features[counted], targets[counted], weights[counted])
    if len(present) == 2:  # then the regression has one row for both
        weight[present] = probe.coef_ * np.array([[-0.5], [0.5]])
        intercept[present] = probe.intercept_ * np.array([-0.5, 0.5])
    else:
        weight[present], intercept[present] = probe.coef_, probe.intercept_
    return weight, intercept
