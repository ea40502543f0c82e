"""What a fit and a prediction show of their progress, in a terminal and in a file."""

import io
import re

import pytest
from helpers import make_classifier
from tqdm import tqdm

from skqlora._utils import progress
from skqlora.model import prediction


@pytest.fixture
def bars(monkeypatch):
    """A terminal; return the bars that were closed, by how much of them was full."""
    closed = []

    class Noting(tqdm):
        def close(self):
            if not self.disable:
                closed.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr(progress, "tqdm", Noting)
    monkeypatch.setattr(progress, "bars_can_move", lambda: True)
    return closed


@pytest.fixture
def no_patience(monkeypatch):
    """Predictions of any duration have a bar."""
    monkeypatch.setattr(prediction, "SECONDS_WITHOUT_BAR", 0)


def test_bar_tells_loss_and_speed(clf, corpus, bars, capsys):
    clf.set_params(verbose=1).fit(*corpus)
    shown = capsys.readouterr().err
    assert "fit: 100%" in shown
    assert "epoch=2/2, loss=" in shown
    assert "texts/s" in shown
    assert bars == [("fit", 96, 96)]


def test_a_file_gets_a_line_an_epoch(clf, corpus, capsys):
    clf.set_params(verbose=1, early_stopping=True, validation_fraction=0.25).fit(*corpus)
    lines = capsys.readouterr().err.splitlines()
    line = r"fit: epoch {}/2, loss \d\.\d{{3}}, score \d\.\d{{3}}, \d+\.\d s"
    assert len(lines) == 2
    for number, found in enumerate(lines, start=1):
        assert re.fullmatch(line.format(number), found)


def test_a_piece_is_one_epoch(clf, corpus, capsys):
    clf.set_params(verbose=1).partial_fit(*corpus, classes=["animal", "colour", "number"])
    assert re.fullmatch(r"fit: epoch 1/1, loss .* s\n", capsys.readouterr().err)


def test_a_fit_that_stops_early_ends_with_a_full_bar(encoder, corpus, bars, capsys):
    clf = make_classifier(encoder, verbose=1, early_stopping=True, num_train_epochs=9)
    clf.set_params(scoring=lambda est, X, y: 0.5, n_iter_no_change=1).fit(*corpus)
    n_texts = clf.n_iter_ * clf.n_samples_seen_
    assert clf.n_iter_ < 9
    assert bars == [("fit", n_texts, n_texts)]
    # How many blocks the bar has depends on the version of tqdm.
    assert re.search(rf"100%\|█+\| {n_texts}/{n_texts}", capsys.readouterr().err)


def test_a_fit_that_fails_ends_with_a_bar_that_is_not_full(clf, corpus, bars):
    def interrupt(est, X, y):
        if calls.append(0) or len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    calls = []
    clf.set_params(verbose=1, early_stopping=True, scoring=interrupt)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(*corpus)
    (bar,) = bars
    assert 0 < bar[1] < bar[2]


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("params", [{}, {"truncation": "windows", "max_length": 4}], ids=str)
def test_long_predictions_have_a_bar_that_goes_away(clf, corpus, bars, capsys, monkeypatch, params):
    clf.set_params(**params).fit(*corpus)
    monkeypatch.setattr("skqlora.base_estimator.PREDICTION_CHUNK", 20)
    n_texts = len(set(corpus[0]))
    clf.set_params(verbose=1).predict(corpus[0])
    assert bars == [("predict", n_texts, n_texts)]
    assert capsys.readouterr().err.endswith("\r")  # and no line stays
    clf.set_params(verbose=0).predict(corpus[0])
    assert len(bars) == 1


@pytest.mark.usefixtures("bars")
def test_short_predictions_show_nothing(clf, corpus, capsys):
    clf.fit(*corpus).set_params(verbose=1).predict(corpus[0])
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_patience")
def test_scores_of_early_stopping_have_no_bar(clf, corpus, bars):
    clf.set_params(verbose=1, early_stopping=True).fit(*corpus)
    assert [bar[0] for bar in bars] == ["fit"]


@pytest.mark.usefixtures("no_patience")
def test_a_prediction_writes_nothing_to_a_file(clf, corpus, capsys):
    clf.fit(*corpus).set_params(verbose=1).predict(corpus[0])
    assert capsys.readouterr().err == ""


def test_without_a_stderr_there_is_no_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert not progress.bars_can_move()


def test_bars_and_lines_are_of_the_first_process_with_a_stderr_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys, "stderr", None)
    with progress.FitProgress(4, 1, shown=True) as shown:
        shown.end_epoch()
    assert capsys.readouterr().out == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    assert progress.bars_can_move()
    monkeypatch.setenv("RANK", "1")
    assert not progress.bars_can_move()
    terminal.close()
    monkeypatch.delenv("RANK")
    assert not progress.bars_can_move()
