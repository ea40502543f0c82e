"""Pictures: the curves of a fit, and what a notebook or a console shows of an object."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from helpers import make_classifier
from sklearn.pipeline import make_pipeline

from skqlora import LossCurveDisplay, estimate_memory
from skqlora.adapter import Footprint


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


def cells_of(thing):
    """Texts of the cells of each row of an object's table in a notebook."""
    table = ElementTree.fromstring(thing._repr_html_())  # which raises unless it is well-formed
    assert table.tag == "table"
    assert table.find("caption").text
    return [[cell.text for cell in row] for row in table.iter("tr")]


FOOTPRINT = Footprint(
    quantized_parameters=10_000_000,
    quantized_bytes=5_160_000,
    other_parameters=12_000_000,
    other_bytes=24_000_000,
    trainable_parameters=440_000,
)


def test_a_footprint_is_a_table():
    rows = [
        ["4-bit layers", "10.00 M parameters", "5.16 MB", "4.128 bits each; 20.00 MB in 16 bits"],
        ["not quantized", "12.00 M parameters", "24.00 MB", "embeddings, norms ..."],
        ["trained", "0.44 M parameters", "1.76 MB", "2.00% of the model"],
    ]
    assert cells_of(FOOTPRINT) == rows
    for line, row in zip(str(FOOTPRINT).splitlines(), rows, strict=True):
        assert all(cell in line for cell in row)
    dense = replace(FOOTPRINT, quantized_parameters=0, quantized_bytes=0)
    assert [row[0] for row in cells_of(dense)] == ["not quantized", "trained"]


def test_an_estimate_is_a_table(encoder):
    estimate = estimate_memory(encoder, batch_size=2, device="cpu")
    rows = cells_of(estimate)
    assert rows[0] == ["base", f"{estimate.base / 1e6:,.1f} MB"]
    assert rows[-2] == ["total", f"{estimate.total / 1e6:,.1f} MB"]
    assert rows[-1][1] == f"{estimate.total_checkpointed / 1e6:,.1f} MB"
    assert "activations of 2 x 128 tokens" in [name for name, _ in rows]
    printed = [line.rsplit("  ", 1) for line in str(estimate).splitlines()]
    assert [[name.strip(), size.strip()] for name, size in printed] == rows


def test_a_console_shows_sizes_that_people_read(encoder):
    assert repr(FOOTPRINT) == (
        "Footprint(4-bit layers: 10.00 M parameters in 5.16 MB, "
        "not quantized: 12.00 M parameters in 24.00 MB, trained: 0.44 M parameters in 1.76 MB)"
    )
    estimate = replace(estimate_memory(encoder, device="cpu"), base=1_234_567_890)
    assert repr(estimate).startswith("MemoryEstimate(base=1,234.6 MB, adapter=")
    assert repr(estimate).endswith(" MB, n_texts=16, n_tokens=128)")


def test_names_of_columns_are_no_html(decoder, corpus):
    texts, labels = corpus
    table = pd.DataFrame({"<b>title</b>": texts, "a & b": texts})
    settings = make_classifier(decoder, num_train_epochs=1).fit(table, labels).settings_
    assert ["prompt", repr(settings.prompt), "chosen for the columns"] in cells_of(settings)
    assert "<b>" in settings.prompt
    assert "<b>" not in settings._repr_html_()
