"""scikit-learn's callbacks in a fit, a search and a pipeline; the progress bar without them."""

import pickle

import numpy as np
import pytest
from helpers import assert_equal_adapters, make_classifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier, QLoRARegressor


class StopAfter:
    """A callback that stops a fit after some epochs."""

    def __init__(self, n_epochs):
        self.n_epochs, self.seen = n_epochs, []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None, X=None):
        if context.task_name == "epoch":
            self.seen.append(fitted_estimator.predict(X))
            return len(self.seen) >= self.n_epochs
        return False


class Scores:
    """A scorer that gives one score after another."""

    def __init__(self, scores):
        self.scores = list(scores)

    def __call__(self, estimator, X, y):
        return self.scores.pop(0)


needs_callbacks = pytest.mark.skipif(
    not hasattr(QLoRAClassifier, "set_callbacks"), reason="scikit-learn < 1.9 has no callbacks"
)


@needs_callbacks
def test_callback_stops_a_fit_and_stays_out_of_the_pickle(encoder, corpus):
    callback = StopAfter(2)
    clf = make_classifier(encoder, num_train_epochs=5).set_callbacks(callback).fit(*corpus)
    assert clf.n_iter_ == len(callback.seen) == 2
    np.testing.assert_array_equal(callback.seen[-1], clf.predict(corpus[0]))
    assert "_skl_callbacks" not in vars(pickle.loads(pickle.dumps(clf)))


@needs_callbacks
def test_callback_stops_the_fit_of_a_regressor(encoder, corpus):
    texts, labels = corpus
    y = np.unique(labels, return_inverse=True)[1]
    callback = StopAfter(2)
    params = make_classifier(encoder, num_train_epochs=5).get_params()
    del params["class_weight"]
    reg = QLoRARegressor(**params).set_callbacks(callback).fit(texts, y)
    assert reg.n_iter_ == len(callback.seen) == 2
    np.testing.assert_array_equal(callback.seen[-1], reg.predict(texts))


@needs_callbacks
def test_callback_sees_what_the_fit_would_leave_if_it_ended_now(encoder, corpus):
    class Recorder(StopAfter):
        def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
            if context.task_name == "epoch":
                self.seen.append(pickle.loads(pickle.dumps(fitted_estimator)))

        def __reduce__(self):
            raise TypeError("a callback was pickled")

    recorder = Recorder(9)
    clf = make_classifier(encoder, early_stopping=True, scoring=Scores([0.0, 0.3, 0.1, 0.2]))
    clf.set_callbacks(recorder).fit(*corpus)
    first, second, third = recorder.seen
    assert first.best_validation_score_ == third.best_validation_score_ == 0.3
    assert second.validation_scores_ == [0.3, 0.1]
    assert_equal_adapters(third, first)
    assert_equal_adapters(third, clf)


@needs_callbacks
@pytest.mark.parametrize("nested", [False, True])
def test_callback_stops_fits_within_other_estimators(encoder, texts, labels, nested):
    clf = make_classifier(encoder, num_train_epochs=5).set_callbacks(StopAfter(1))
    if nested:
        assert make_pipeline(clf).fit(texts, labels)[-1].n_iter_ == 1
    else:
        search = GridSearchCV(clf, {"lora_r": [2, 4]}, cv=2).fit(texts, labels)
        assert search.best_estimator_.n_iter_ == 1


@needs_callbacks
@pytest.mark.parametrize("nested", [False, True])
def test_callbacks_of_scikit_learn_in_searches_and_pipelines(clf, texts, labels, nested, capsys):
    from sklearn.callback import ProgressBar, ScoringMonitor

    monitor = ScoringMonitor(scoring="accuracy")
    clf.set_callbacks(monitor)
    search = make_pipeline(clf) if nested else GridSearchCV(clf, {"lora_r": [2, 4]}, cv=2)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(texts, labels)
    scores = monitor.get_logs().data_as_pandas["accuracy"].dropna()
    assert len(scores) >= (2 if nested else 10)
    assert "QLoRAClassifier - fit" in capsys.readouterr().out


@needs_callbacks
@pytest.mark.slow  # the workers import torch, which test_processes.py waits for already
def test_scores_come_back_from_worker_processes(clf, texts, labels):
    from sklearn.callback import ScoringMonitor

    monitor = ScoringMonitor(scoring="accuracy")
    search = GridSearchCV(clf.set_callbacks(monitor), {"lora_r": [2, 4]}, cv=2, n_jobs=2)
    search.fit(texts, labels)
    scores = monitor.get_logs().data_as_pandas["accuracy"].dropna()
    # An epoch or a whole fit each; four fits in the workers and the last one here.
    assert len(scores) == 5 * (clf.num_train_epochs + 1)
