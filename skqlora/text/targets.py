"""What an estimator predicts, and how the outputs of the head are read: classes or numbers.

Both kinds have the same methods, so that the training need not know which it is. This module knows
nothing of texts or models.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax

from skqlora.text.values import short


@dataclass(frozen=True, eq=False)
class Classes:
    """One class for each text, or any number of labels.

    Attributes
    ----------
    values : ndarray of shape (n_classes,)
        The classes in the labels' own dtype, or the numbers of a multilabel indicator's columns.
    multilabel : bool
    """

    values: np.ndarray
    multilabel: bool

    @property
    def n_outputs(self) -> int:
        """The number of outputs of the head."""
        return len(self.values)

    @property
    def loss(self) -> str:
        """The name of the loss that is trained with."""
        return "binary_cross_entropy" if self.multilabel else "cross_entropy"

    @property
    def unit(self) -> str:
        """The unit of the loss."""
        return "nats"

    @property
    def attributes(self) -> dict[str, Any]:
        """The fitted attributes that tell of it."""
        return {"classes_": self.values, "multilabel_": self.multilabel}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Plain values that are equal for equal classes."""
        return self.values.tolist(), self.multilabel

    @classmethod
    def of_outputs(
        cls, n_outputs: int, labels: Any = None, *, multilabel: bool = False
    ) -> "tuple[Classes, np.ndarray]":
        """Name the outputs of a head that was trained elsewhere.

        Parameters
        ----------
        n_outputs : int
        labels : array-like of shape (n_outputs,), optional
            The labels in the order of the outputs. By default they are numbered.
        multilabel : bool, default=False

        Returns
        -------
        classes : Classes
        order : ndarray of int, of shape (n_outputs,)
            The outputs in the order of the classes, which are sorted.

        Raises
        ------
        ValueError
            If there is one output only, or if there is not another label for each.
        """
        values = np.arange(n_outputs) if labels is None else np.asarray(labels)
        if n_outputs < 2:
            raise ValueError(
                f"The adapter's head has {n_outputs} output, as a regression or a reward model "
                "has. Wanted: one for each of at least two classes. `QLoRARegressor.from_peft` "
                "reads it."
            )
        if values.shape != (n_outputs,) or len(np.unique(values)) != n_outputs:
            raise ValueError(
                f"Got classes={values.tolist()} but the adapter's head has {n_outputs} outputs. "
                "Wanted: a label for each, all different, in the order of the outputs."
            )
        order = np.argsort(values)
        return cls(values[order], multilabel), order

    def to_user(self, targets: np.ndarray) -> np.ndarray:
        """Return the labels as the user wrote them."""
        return targets if self.multilabel else self.values[targets]

    def to_training(self, targets: np.ndarray) -> np.ndarray:
        """Return what the outputs are compared with: the targets themselves."""
        return targets

    def losses(self, outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Compute the cross-entropy of each text, in nats.

        Parameters
        ----------
        outputs : ndarray of shape (n_texts, n_classes)
            The logits.
        y : ndarray of shape (n_texts,) or (n_texts, n_classes)
            The labels as the user wrote them.
        """
        if self.multilabel:
            return np.logaddexp(0, np.where(y == 1, -outputs, outputs)).mean(axis=1)
        numbers = np.searchsorted(self.values, y)
        return -log_softmax(outputs, axis=1)[np.arange(len(y)), numbers]

    def continue_from(self, earlier: "Classes | Numbers") -> "Classes":
        """Return what a fit that continues an earlier one predicts.

        Raises
        ------
        ValueError
            If the earlier fit had other classes.
        """
        if isinstance(earlier, Classes) and self.identity == earlier.identity:
            return self
        assert isinstance(earlier, Classes)
        kinds = [
            "multilabel" if each.multilabel else "one for each text" for each in (self, earlier)
        ]
        one_each = not (self.multilabel or earlier.multilabel)
        fewer = one_each and set(self.values.tolist()) < set(earlier.values.tolist())
        remedy = " To train on texts of only some classes, call `partial_fit`." if fewer else ""
        raise ValueError(
            f"Got y with the classes {short(self.values.tolist())} ({kinds[0]}) but the fit to "
            f"continue from has {short(earlier.values.tolist())} ({kinds[1]}). Wanted: the same "
            f"classes, or `fit` with warm_start=False.{remedy}"
        )


@dataclass(frozen=True, eq=False)
class Numbers:
    """One number for each text, or several, which are trained on in units of their spread.

    Attributes
    ----------
    mean, scale : ndarray of shape (n_outputs,), float64
        The weighted mean and standard deviation of the numbers, which outputs of 0 and 1 stand for.
        The scale of numbers that are all the same is 0.
    one_dimensional : bool
        Whether there is one number for each text, in an array of one dimension.
    loss : {"squared_error", "absolute_error", "huber"}
    """

    mean: np.ndarray
    scale: np.ndarray
    one_dimensional: bool
    loss: str

    @classmethod
    def of(cls, y: np.ndarray, weights: np.ndarray | None, loss: str) -> "Numbers":
        """Determine mean and scale of numbers.

        Parameters
        ----------
        y : ndarray of shape (n_texts,) or (n_texts, n_outputs), float64
        weights : ndarray of shape (n_texts,) or None
        loss : str

        Raises
        ------
        ValueError
            If the numbers are so far apart that their spread is not finite.
        """
        columns = y.reshape(len(y), -1)
        constant = columns.min(axis=0) == columns.max(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            unit = np.abs(columns - columns[0]).max(axis=0)  # so that no square overflows
            unit[constant] = 1.0
            shifted = (columns - columns[0]) / unit
            mean = np.average(shifted, axis=0, weights=weights)
            scale = np.sqrt(np.average((shifted - mean) ** 2, axis=0, weights=weights))
            mean, scale = columns[0] + mean * unit, np.where(constant, 0.0, scale * unit)
        if not (np.isfinite(mean) & np.isfinite(scale)).all():
            raise ValueError(
                f"Got y with numbers from {y.min():.3g} to {y.max():.3g}, whose spread is not "
                "finite. Wanted: smaller numbers, such as y / 1e10."
            )
        return cls(mean, scale, y.ndim == 1, loss)

    @classmethod
    def of_outputs(
        cls, n_outputs: int, labels: Any = None, *, multilabel: bool = False
    ) -> "tuple[Numbers, np.ndarray]":
        """Tell what the outputs of a head are that was trained elsewhere: numbers as they are.

        Raises
        ------
        ValueError
            If there are classes.
        """
        if labels is not None or multilabel:
            raise ValueError(
                "Got classes for an adapter whose outputs are to be numbers. Wanted: neither "
                "`classes` nor `multilabel`, or `QLoRAClassifier.from_peft`."
            )
        plain = cls(np.zeros(n_outputs), np.ones(n_outputs), n_outputs == 1, "squared_error")
        return plain, np.arange(n_outputs)

    @property
    def n_outputs(self) -> int:
        """The number of outputs of the head."""
        return len(self.mean)

    @property
    def unit(self) -> str:
        """The kind of the loss, in units of the standard deviation."""
        return self.loss.replace("_", " ")

    @property
    def attributes(self) -> dict[str, Any]:
        """The fitted attributes that tell of it."""
        return {"target_mean_": self.mean, "target_scale_": self.scale}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Plain values that are equal for equal numbers."""
        return self.mean.tolist(), self.scale.tolist(), self.one_dimensional, self.loss

    def to_user(self, targets: np.ndarray) -> np.ndarray:
        """Return the numbers as the user wrote them."""
        return targets

    def to_training(self, targets: np.ndarray) -> np.ndarray:
        """Return what the outputs are compared with, of shape (n_texts, n_outputs)."""
        return (targets.reshape(len(targets), -1) - self.mean) / np.where(self.scale, self.scale, 1)

    def from_outputs(self, outputs: np.ndarray) -> np.ndarray:
        """Return numbers in the user's units, of the shape of `y`."""
        numbers = outputs * self.scale + self.mean
        return numbers[:, 0] if self.one_dimensional else numbers

    def losses(self, outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Compute the loss of each text, the mean over its numbers, as in the training.

        Parameters
        ----------
        outputs : ndarray of shape (n_texts, n_outputs)
        y : ndarray of shape (n_texts,) or (n_texts, n_outputs)
            The numbers as the user wrote them.
        """
        errors = np.abs(outputs - self.to_training(np.asarray(y, dtype=np.float64)))
        if self.loss == "squared_error":
            errors = errors**2
        elif self.loss == "huber":
            errors = np.where(errors < 1, errors**2 / 2, errors - 0.5)
        # What is always the same is predicted, whatever the output is.
        counted = self.scale > 0 if self.scale.any() else slice(None)
        return errors[:, counted].mean(axis=1)

    def continue_from(self, earlier: "Classes | Numbers") -> "Numbers":
        """Return what a fit that continues an earlier one predicts, in its units.

        Raises
        ------
        ValueError
            If the earlier fit had another number of outputs.
        """
        assert isinstance(earlier, Numbers)
        if (self.n_outputs, self.one_dimensional) != (earlier.n_outputs, earlier.one_dimensional):
            raise ValueError(
                f"Got y with {self.describe()}, but the fit to continue from has "
                f"{earlier.describe()}. Wanted: a y of the same shape, or `fit` with "
                "warm_start=False."
            )
        # A column that was constant so far has no unit yet, and nothing was learned of it.
        new = (earlier.scale == 0) & ((self.scale > 0) | (self.mean != earlier.mean))
        return replace(
            earlier,
            mean=np.where(new, self.mean, earlier.mean),
            scale=np.where(new, self.scale, earlier.scale),
            loss=self.loss,
        )

    def describe(self) -> str:
        """Tell the shape of the numbers."""
        return "one dimension" if self.one_dimensional else f"{self.n_outputs} column(s)"


Target = Classes | Numbers
