"""A plot of the curves of a fit, in the style of scikit-learn's displays."""

from typing import Any

from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils._plotting import _validate_style_kwargs
from sklearn.utils.validation import check_is_fitted


class LossCurveDisplay:
    """Plot of the training loss and the validation score over the epochs of a fit.

    It is best created with `from_estimator`.

    Parameters
    ----------
    loss_curve : list of float, of length n_epochs
        The mean training loss of each epoch.
    validation_scores : list of float, of length n_epochs, or None
        The score of each epoch on held-out texts, or NaN.
    name : str, default=None
        The name of the estimator in the legend.
    loss : str, default=None
        The unit of the loss or its kind, for the label of the axis. None is "nats".

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        The axes with the loss.
    score_ax_ : matplotlib.axes.Axes or None
        The axes with the validation score, over the same epochs and with the scale on the right.
    figure_ : matplotlib.figure.Figure
        The figure that contains the axes.
    line_ : matplotlib.lines.Line2D
        The curve of the loss.
    score_line_ : matplotlib.lines.Line2D or None
        The curve of the validation score.

    See Also
    --------
    QLoRAClassifier : Has the curves of its fit in `loss_curve_` and `validation_scores_`.
    QLoRARegressor : Has the same attributes.
    sklearn.model_selection.LearningCurveDisplay : Plot scores over the number of texts.
    sklearn.model_selection.ValidationCurveDisplay : Plot scores over the values of a parameter.

    Examples
    --------
    >>> from skqlora import LossCurveDisplay
    >>> display = LossCurveDisplay.from_estimator(clf)
    >>> display.ax_.get_ylabel()
    'Training loss (nats)'
    """

    def __init__(self, *, loss_curve, validation_scores=None, name=None, loss=None):
        self.loss_curve = loss_curve
        self.validation_scores = validation_scores
        self.name = name
        self.loss = loss

    @classmethod
    def from_estimator(cls, estimator, *, ax=None, name=None, **kwargs):
        """Plot the curves of a fitted estimator.

        Parameters
        ----------
        estimator : QLoRAClassifier or QLoRARegressor
            The fitted estimator.
        ax : matplotlib.axes.Axes, default=None
            The axes to plot on, e.g. the `ax_` of another display. None makes a new figure.
        name : str, default=None
            The name in the legend. None takes the name of the class.
        **kwargs : dict
            The arguments of `matplotlib.axes.Axes.plot` for both lines.

        Returns
        -------
        display : LossCurveDisplay
            The display with the plotted curves.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        TypeError
            If `estimator` has no curves, e.g. if it is a Pipeline.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        attributes = vars(estimator).copy()  # of one fit, whatever other threads do
        if "loss_curve_" not in attributes:
            raise TypeError(
                f"Got a {type(estimator).__name__}, which has no loss_curve_. Wanted: a fitted "
                "estimator of this package. Pass the one inside, e.g. pipeline[-1] or "
                "search.best_estimator_."
            )
        target = attributes.get("_target_")
        display = cls(
            loss_curve=attributes["loss_curve_"],
            validation_scores=attributes["validation_scores_"],
            name=type(estimator).__name__ if name is None else name,
            loss=None if target is None else target.unit,
        )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax=None, *, name=None, **kwargs):
        """Plot the curves.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            The axes to plot on. None makes a new figure.
        name : str, default=None
            The name in the legend. None takes the name of the display.
        **kwargs : dict
            The arguments of `matplotlib.axes.Axes.plot` for both lines.

        Returns
        -------
        display : LossCurveDisplay
            The display itself.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        name = self.name if name is None else name
        prefix = "" if name is None else f"{name}: "
        epochs = range(1, len(self.loss_curve) + 1)
        style = {"marker": "o", "markersize": 3, "label": f"{prefix}training loss"}
        self.line_ = ax.plot(epochs, self.loss_curve, **_validate_style_kwargs(style, kwargs))[0]
        self.ax_, self.figure_ = ax, ax.figure
        self.score_ax_ = self.score_line_ = None
        if self.validation_scores is not None:
            self.score_ax_ = _right_axes(ax)
            style |= {"color": self.line_.get_color(), "linestyle": "--"}
            style["label"] = f"{prefix}validation score"
            style = _validate_style_kwargs(style, kwargs)
            self.score_line_ = self.score_ax_.plot(epochs, self.validation_scores, **style)[0]
            # An empty line on the left axes puts both curves into one legend.
            ax.plot([], [], **style)
            self.score_ax_.set_ylabel("Validation score")
        ax.set(xlabel="Epoch", ylabel=f"Training loss ({self.loss or 'nats'})")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        # The legend is above the axes, because falling and rising curves leave no corner free.
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        return self


def _right_axes(ax: Any) -> Any:
    """Return the twin of `ax` that an earlier display made, or a new one."""
    for other in ax.get_shared_x_axes().get_siblings(ax):
        if other is not ax and other.bbox.bounds == ax.bbox.bounds:
            return other
    return ax.twinx()
