"""How a fitted classifier predicts: texts to logits, logits to labels and probabilities."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.utils.validation import check_is_fitted

from skqlora._utils.libraries import import_libraries
from skqlora.text.inputs import PREDICTION_CHUNK


class PredictionMixin:
    """The methods of `QLoRAClassifier` that predict."""

    def predict(self: Any, X: Any) -> np.ndarray:
        """Predict the label of each text.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Or an iterator of them, of which some are held at a time.

        Returns
        -------
        labels : ndarray of shape (n_texts,), or (n_texts, n_labels)
            In the dtype of the labels that were fitted; a multilabel indicator of int.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the classifier is not fitted.
        TypeError, ValueError
            If `X` is not texts; if `model` is not the base that was fitted with, or is gone.
        RuntimeError
            In a fork of a process that has computed on threads.
        """
        logits = self._logits(X)
        if self.multilabel_:
            return (logits > 0).astype(int)
        return self.classes_[logits.argmax(axis=1)]

    def predict_proba(self: Any, X: Any) -> np.ndarray:
        """Predict the probability of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Or an iterator of them, of which some are held at a time.

        Returns
        -------
        probabilities : ndarray of shape (n_texts, n_classes)
            The softmax of the logits, in the order of `classes_`. For multilabel targets the
            sigmoid of each: of a label to be there.

        Raises
        ------
        sklearn.exceptions.NotFittedError, TypeError, ValueError, RuntimeError
            As `predict`.
        """
        logits = self._logits(X)
        return expit(logits) if self.multilabel_ else softmax(logits, axis=1)

    def predict_log_proba(self: Any, X: Any) -> np.ndarray:
        """Predict the logarithm of the probability of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Or an iterator of them, of which some are held at a time.

        Returns
        -------
        log_probabilities : ndarray of shape (n_texts, n_classes)
            In the order of `classes_`.

        Raises
        ------
        sklearn.exceptions.NotFittedError, TypeError, ValueError, RuntimeError
            As `predict`.
        """
        logits = self._logits(X)
        return log_expit(logits) if self.multilabel_ else log_softmax(logits, axis=1)

    def decision_function(self: Any, X: Any) -> np.ndarray:
        """Compute the logits of each class.

        Parameters
        ----------
        X : list, Series or array of str, of shape (n_texts,), or a table with one column
            Or an iterator of them, of which some are held at a time.

        Returns
        -------
        scores : ndarray of shape (n_texts, n_classes), or (n_texts,) for two classes
            For two classes the second's logit less the first's, so that positive means
            ``classes_[1]``.

        Raises
        ------
        sklearn.exceptions.NotFittedError, TypeError, ValueError, RuntimeError
            As `predict`.
        """
        logits = self._logits(X)
        if logits.shape[1] == 2 and not self.multilabel_:
            return logits[:, 1] - logits[:, 0]
        return logits

    def _logits(self: Any, X: Any) -> np.ndarray:
        """Logits of shape (n_texts, n_classes), from the base of the process and the adapter."""
        check_is_fitted(self)
        self._validate_params()
        if isinstance(X, Iterator):
            chunks = iter(lambda: list(islice(X, PREDICTION_CHUNK)), [])
            return np.concatenate([self._logits(chunk) for chunk in chunks] or [self._logits([])])
        texts = self._check_texts(X, reset=False)
        import_libraries()
        from skqlora.training.setup import compute_logits

        return compute_logits(self, self.adapter_, texts)
