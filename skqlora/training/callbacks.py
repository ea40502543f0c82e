"""Support for scikit-learn's callbacks, which exist from its version 1.9 on.

This module knows nothing of models.
"""

from collections.abc import Callable
from typing import Any

from skqlora.text.inputs import LabelledTexts
from skqlora.training.estimator import FitEstimator

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9 offers no `set_callbacks`

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """A base class that adds nothing."""

    def with_callbacks(method: Callable) -> Callable:
        """Return the method as it is."""
        return method


# The attributes in which scikit-learn keeps an estimator's callbacks and the fit that they watch.
CALLBACK_ATTRIBUTES = {
    "_skl_callbacks",
    "_skl_callbacks_to_teardown",
    "_callback_fit_ctx",
    "_parent_callback_ctx",
}


class FitTasks:
    """The tasks of a fit that callbacks see: a task "fit" that holds one task "epoch" per epoch.

    Parameters
    ----------
    estimator : QLoRAClassifier
        The estimator that is fitted. Its own callbacks are called, and those of the estimator that
        it is part of.
    n_epochs : int
    table : LabelledTexts
        The texts, labels and weights that are trained on.
    """

    def __init__(self, estimator: FitEstimator, n_epochs: int, table: LabelledTexts):
        self._estimator = estimator
        self._told = {"X": table.inputs.rows, "y": table.y}
        if table.sample_weight is not None:
            self._told["metadata"] = {"sample_weight": table.sample_weight}
        self._root: Any = None
        self._epoch: Any = None
        if hasattr(estimator, "_init_callback_context"):
            self._root = estimator._init_callback_context(max_subtasks=n_epochs)
            self._root.call_on_fit_task_begin(estimator=estimator, **self._told)

    def begin_epoch(self) -> None:
        """Tell the callbacks that an epoch begins."""
        if self._root is not None:
            self._epoch = self._root.subcontext(task_name="epoch")
            self._epoch.call_on_fit_task_begin(estimator=self._estimator, **self._told)

    def end_epoch(self, fitted: FitEstimator) -> bool:
        """Tell the callbacks that the epoch has ended, and return whether one wants to stop.

        Parameters
        ----------
        fitted : QLoRAClassifier
            The estimator as it would be if the fit ended now.
        """
        return self._end(self._epoch, fitted)

    def end(self, fitted: FitEstimator) -> None:
        """Tell the callbacks that the fit has ended."""
        self._end(self._root, fitted)

    def _end(self, task: Any, fitted: FitEstimator) -> bool:
        if task is None:
            return False
        attributes = {name: value for name, value in vars(fitted).items() if _is_of_a_fit(name)}
        return task.call_on_fit_task_end(
            estimator=self._estimator,
            reconstruction_attributes=attributes,
            **self._told,
        )


def _is_of_a_fit(attribute: str) -> bool:
    """Tell whether an attribute is a fitted one, as scikit-learn's `check_is_fitted` does."""
    return attribute.endswith("_") and not attribute.startswith("__")
