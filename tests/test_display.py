"""Pictures: the curves of a fit, and the HTML representation."""

import numpy as np
import pytest
from helpers import make_classifier
from sklearn.pipeline import make_pipeline

from skqlora import LossCurveDisplay


def test_curves_of_several_estimators_on_one_axis(encoder, corpus):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    clf = make_classifier(encoder, early_stopping=True, num_train_epochs=2).fit(*corpus)
    plain = make_classifier(encoder, num_train_epochs=3).fit(*corpus)
    display = LossCurveDisplay.from_estimator(clf, name="early")
    other = LossCurveDisplay.from_estimator(plain, ax=display.ax_, name="plain")
    third = LossCurveDisplay.from_estimator(clf, ax=display.ax_)
    assert other.ax_ is display.ax_
    assert third.score_ax_ is display.score_ax_
    assert other.score_ax_ is None
    np.testing.assert_array_equal(display.line_.get_ydata(), clf.loss_curve_)
    np.testing.assert_array_equal(display.score_line_.get_ydata(), clf.validation_scores_)
    legend = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert legend[:3] == ["early: training loss", "early: validation score", "plain: training loss"]
    styled = LossCurveDisplay.from_estimator(clf, c="k", ls=":", ms=1, label="mine")
    assert styled.line_.get_color() == "k"
    plt.close("all")
    with pytest.raises(TypeError, match=r"Got a Pipeline.*pipeline\[-1\]"):
        LossCurveDisplay.from_estimator(make_pipeline(clf))


def test_html_repr_links_to_the_documentation_and_is_small(clf, corpus):
    html = clf.fit(*corpus)._repr_html_()
    assert "/generated/skqlora.QLoRAClassifier.html" in html
    assert len(html) < 100_000
