"""`QLoRARegressor`: numbers of texts, by the behaviour that a user sees."""

import inspect
import json
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_equal_adapters, fit_interrupted, make_classifier
from numpydoc.docscrape import ClassDoc
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import StackingRegressor, VotingRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.multioutput import MultiOutputRegressor
from sklearn.utils import get_tags

from skqlora import LossCurveDisplay, QLoRAClassifier, QLoRARegressor, estimate_memory

VALUES = {"animal": 1.0, "colour": 2.5, "number": 4.0}


def make_regressor(model, /, **params):
    """A regressor that learns a tiny model's topics in a second or two."""
    params = make_classifier(model).get_params() | {"num_train_epochs": 12} | params
    return QLoRARegressor(**{k: v for k, v in params.items() if k != "class_weight"})


@pytest.fixture
def y(labels):
    """A number for each topic."""
    return np.array([VALUES[label] for label in labels])


@pytest.fixture
def reg(encoder):
    """A regressor to be fitted for two epochs."""
    return make_regressor(encoder, num_train_epochs=2)


@pytest.mark.parametrize("loss", ["squared_error", "absolute_error", "huber"])
def test_numbers_are_learned(model, texts, y, loss):
    reg = make_regressor(model, loss=loss, num_train_epochs=20).fit(texts, y)
    assert reg.score(texts, y) > 0.5
    assert reg.loss_curve_[-1] < reg.loss_curve_[0] / 2
    assert reg.predict(texts).shape == (48,)
    assert reg.predict(texts).dtype == np.float64
    np.testing.assert_allclose([reg.target_mean_[0], reg.target_scale_[0]], [y.mean(), y.std()])
    assert not hasattr(reg, "classes_")
    assert not hasattr(reg, "predict_proba")


def test_several_numbers_of_a_text(encoder, texts, y):
    both = np.column_stack([y, -100 * y])
    reg = make_regressor(encoder).fit(texts, both)
    assert reg.predict(texts).shape == (48, 2)
    assert reg.score(texts, both) > 0.3
    column = make_regressor(encoder, num_train_epochs=1).fit(texts, y[:, None])
    assert column.predict(texts).shape == (48, 1)
    assert make_regressor(encoder, num_train_epochs=1).fit(texts, list(y)).predict(texts).ndim == 1


@pytest.mark.parametrize(
    ("factor", "offset"), [(1e6, 1e9), (3.0, -5.0), (1e-170, 0.0), (1e160, 0.0)]
)
def test_the_units_of_y_change_only_the_units(reg, texts, y, factor, offset):
    expected = reg.fit(texts, y).predict(texts)
    found = reg.fit(texts, factor * y + offset).predict(texts)
    np.testing.assert_allclose((found - offset) / factor, expected, rtol=1e-5)


def test_equal_numbers_are_predicted_with_a_warning(reg, texts):
    with pytest.warns(UserWarning, match="All numbers in y are the same"):
        reg.fit(texts, np.full(48, 0.1))
    np.testing.assert_array_equal(reg.predict(texts), np.full(48, 0.1))
    with pytest.warns(UserWarning, match=r"All numbers in 1 column\(s\) of y are the same"):
        reg.fit(texts, np.column_stack([np.arange(48), np.full(48, 7.0)]))
    assert set(reg.predict(texts)[:, 1]) == {7.0}


def test_a_weight_of_two_is_the_row_twice(encoder, texts, y):
    # In one batch, so that the two fits see the same.
    params = {"batch_size": 128, "lora_dropout": 0.0, "num_train_epochs": 6}
    weights = np.ones(48)
    weights[:10] = 2
    weights[40:] = 0
    weighted = make_regressor(encoder, **params).fit(texts, y, sample_weight=weights)
    rows = np.concatenate([np.arange(40), np.arange(10)])
    repeated = make_regressor(encoder, **params).fit(texts[rows], y[rows])
    np.testing.assert_allclose(weighted.target_mean_, repeated.target_mean_)
    np.testing.assert_allclose(weighted.target_scale_, repeated.target_scale_)
    np.testing.assert_allclose(weighted.predict(texts), repeated.predict(texts), atol=1e-3)
    assert weighted.n_samples_seen_ == 40


READ = """
import json, sys
import joblib, numpy as np
from skqlora import QLoRARegressor
saved, dumped, texts, expected = json.load(sys.stdin)
for reg in (QLoRARegressor.load(saved), joblib.load(dumped)):
    np.testing.assert_allclose(reg.predict(texts), expected, rtol=1e-6)
"""


@pytest.mark.parametrize("several", [False, True])
def test_saved_regressors_predict_the_same_in_another_process(reg, texts, y, several, tmp_path):
    reg.fit(texts, np.column_stack([y, y**2]) if several else y)
    reg.save(tmp_path / "saved")
    joblib.dump(reg, tmp_path / "dumped")
    paths = str(tmp_path / "saved"), str(tmp_path / "dumped")
    sent = json.dumps([*paths, texts.tolist(), reg.predict(texts).tolist()])
    subprocess.run([sys.executable, "-W", "ignore", "-c", READ], input=sent, text=True, check=True)
    again = QLoRARegressor.load(tmp_path / "saved")
    assert again.get_params() == reg.get_params()
    np.testing.assert_array_equal(again.target_scale_, reg.target_scale_)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(reg)).predict(texts), reg.predict(texts)
    )
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "reg = QLoRARegressor.load" in card
    assert "1.225" in card  # the standard deviation


def test_folders_of_the_other_estimator_are_refused(encoder, texts, y, labels, tmp_path):
    make_regressor(encoder, num_train_epochs=1).fit(texts, y).save(tmp_path / "numbers")
    make_classifier(encoder, num_train_epochs=1).fit(texts, labels).save(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"holds a QLoRARegressor\. Wanted: a QLoRAClassifier"):
        QLoRAClassifier.load(tmp_path / "numbers")
    with pytest.raises(ValueError, match=r"holds a QLoRAClassifier\. Wanted: a QLoRARegressor"):
        QLoRARegressor.load(tmp_path / "classes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [1.0, 2.0]}, "numbers are not those of a fit"),
        ({"scale": [-1.0]}, "numbers are not those of a fit"),
        ({"scale": [float("inf")]}, "numbers are not those of a fit"),
        ({"loss": "cross_entropy"}, "numbers are not those of a fit"),
        ({"one_dimensional": 1}, "no 'one_dimensional' of type bool"),
    ],
)
def test_damaged_numbers_are_named(reg, texts, y, tmp_path, change, message):
    from skqlora.persistence.saved_format import checksum

    reg.set_params(num_train_epochs=1).fit(texts, y).save(tmp_path)
    path = tmp_path / "skqlora.json"
    manifest = json.loads(path.read_text())
    manifest["numbers"] |= change
    del manifest["checksum"]
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    with pytest.raises(ValueError, match=rf"skqlora\.json.*{message}"):
        QLoRARegressor.load(tmp_path)


@pytest.mark.filterwarnings("ignore:prompt=")
def test_exports_predict_in_the_units_of_y(encoder, decoder, texts, y, tmp_path):
    y = 100 * y + 7
    for model, pooling in [(encoder, "pooler"), (decoder, "auto")]:
        reg = make_regressor(model, pooling=pooling, num_train_epochs=2).fit(texts, y)
        expected = reg.predict(texts[:5])
        if model == decoder:
            with pytest.warns(UserWarning, match=r"have no bias.* Add \[257\.0\]"):
                theirs, tokenizer = reg.to_transformers()
            expected = expected - reg.target_mean_
        else:
            theirs, tokenizer = reg.to_transformers()
        assert theirs.config.problem_type == "regression"
        assert theirs.config.num_labels == 1
        batch = tokenizer(texts[:5].tolist(), padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            found = theirs(**batch).logits[:, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    reg = make_regressor(encoder, pooling="pooler", num_train_epochs=2).fit(texts, y)
    reg.to_peft(tmp_path / "peft")
    options = {"compute_dtype": "float32", "device": "cpu"}
    again = QLoRARegressor.from_peft(tmp_path / "peft", **options)
    np.testing.assert_allclose(again.predict(texts), reg.predict(texts), rtol=1e-5)
    with pytest.raises(ValueError, match="Got classes for an adapter whose outputs are"):
        QLoRARegressor.from_peft(tmp_path / "peft", classes=["a"], **options)
    with pytest.raises(ValueError, match=r"QLoRARegressor\.from_peft"):
        QLoRAClassifier.from_peft(tmp_path / "peft", **options)


def test_pieces_keep_the_units_of_the_first(encoder, texts, y):
    reg = make_regressor(encoder)
    reg.partial_fit(texts[:24], y[:24])
    mean, scale = reg.target_mean_, reg.target_scale_
    reg.partial_fit(texts[24:], 10 * y[24:])
    np.testing.assert_array_equal([reg.target_mean_, reg.target_scale_], [mean, scale])
    assert reg.n_samples_seen_ == 48
    with pytest.raises(ValueError, match="early_stopping=True"):
        reg.set_params(early_stopping=True).partial_fit(texts, y)
    with pytest.raises(ValueError, match=r"Got y with 2 column\(s\).*has one dimension"):
        reg.set_params(early_stopping=False).partial_fit(texts, np.column_stack([y, y]))


def test_a_piece_of_equal_numbers_has_no_units(encoder, texts, y):
    reg = make_regressor(encoder)
    with pytest.warns(UserWarning, match="All numbers in y are the same"):
        reg.partial_fit(texts[:1], y[:1])
    assert reg.predict(texts[:2]).tolist() == [y[0]] * 2
    for _ in range(12):
        reg.partial_fit(texts, y)
    assert reg.score(texts, y) > 0.3
    scale = reg.target_scale_
    reg.partial_fit(texts[:1], y[:1])  # without a warning, which would be an error here
    np.testing.assert_array_equal(reg.target_scale_, scale)


def test_a_column_of_equal_numbers_does_not_count(encoder, texts, y):
    both = np.column_stack([y, np.full(48, 7.0)])
    held_out = np.column_stack([y, np.full(48, 1e4)])
    reg = make_regressor(encoder, early_stopping=True, scoring="loss", num_train_epochs=2)
    with pytest.warns(UserWarning, match="1 column"):
        reg.fit(texts, both, X_val=texts, y_val=held_out)
    errors = (reg.predict(texts)[:, 0] - y) / reg.target_scale_[0]
    assert reg.best_validation_score_ == pytest.approx(-np.mean(errors**2))


@pytest.mark.parametrize(("factor", "offset"), [(1e50, 0.0), (1e-50, 0.0), (1e6, 1e12)])
def test_units_that_float32_cannot_hold_are_not_exported(encoder, texts, y, factor, offset):
    reg = make_regressor(encoder, pooling="pooler", num_train_epochs=1)
    reg.fit(texts, factor * y + offset)
    assert np.std(reg.predict(texts)) > 0
    with pytest.raises(ValueError, match="which the float32 of this format cannot tell apart"):
        reg.to_transformers()


def test_equal_weights_change_nothing(reg, texts, y):
    expected = reg.fit(texts, y).predict(texts)
    for weight in (1e300, 1e-300):
        found = reg.fit(texts, y, sample_weight=np.full(48, weight)).predict(texts)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_warm_start_continues(encoder, texts, y):
    reg = make_regressor(encoder, warm_start=True, num_train_epochs=4)
    first = reg.fit(texts, y).score(texts, y)
    assert reg.fit(texts, y).score(texts, y) > first
    assert len(reg.loss_curve_) == 8


@pytest.mark.parametrize("scoring", [None, "loss", "r2", "neg_mean_absolute_error"])
def test_early_stopping(encoder, texts, y, scoring):
    reg = make_regressor(encoder, early_stopping=True, scoring=scoring, num_train_epochs=3)
    reg.fit(texts, y, X_val=texts[:12], y_val=y[:12])
    best = reg.best_validation_score_
    assert best == max(reg.validation_scores_)
    if scoring is None:
        assert best == reg.score(texts[:12], y[:12])
    if scoring == "loss":
        errors = (reg.predict(texts[:12]) - y[:12]) / reg.target_scale_
        assert best == pytest.approx(-np.mean(errors**2))
    with pytest.raises(ValueError, match="Got y_val of shape"):
        reg.fit(texts, y, X_val=texts, y_val=np.column_stack([y, y]))


def test_a_killed_fit_resumes(encoder, texts, y, tmp_path):
    expected = make_regressor(encoder, num_train_epochs=3).fit(texts, y)
    params = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, "num_train_epochs": 3}
    reg = make_regressor(encoder, **params)
    assert len(fit_interrupted(reg, (texts, y), at=5)) == 5
    assert fit_interrupted(reg, (texts, y), at=None)[0] == 4
    assert_equal_adapters(reg, expected)
    other = make_regressor(encoder, **params)
    fit_interrupted(other, (texts, y), at=5)
    assert fit_interrupted(other.set_params(loss="huber"), (texts, y), at=None)[0] == 0


def test_a_head_that_starts_as_a_ridge_regression(decoder, texts, y):
    both = np.column_stack([y, -y])
    started = {"init_head_weights": "probe", "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    reg = make_regressor(decoder, num_train_epochs=1, **started).fit(texts, both)
    assert reg.score(texts, both) > 0.3
    with pytest.raises(ValueError, match="init_head_weights"):
        make_regressor(decoder, init_head_weights="class_names").fit(texts, y)


def test_tables_have_numbers_too(encoder, texts, y):
    frame = pd.DataFrame({"first": texts, "second": texts[::-1]})
    reg = make_regressor(encoder, num_train_epochs=2).fit(frame, y)
    assert reg.feature_names_in_.tolist() == ["first", "second"]
    assert reg.predict(frame).shape == (48,)
    windows = make_regressor(encoder, num_train_epochs=1, truncation="windows", max_length=5)
    assert windows.fit(texts, y).predict(texts).shape == (48,)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "target y is None"),
        ([1.0], "48 texts but 1 rows in y"),
        ([np.nan] + [1.0] * 47, r"y\[0\] = nan, a missing number"),
        ([1.0] * 47 + [np.inf], r"y\[47\] = inf"),
        (["3"] * 48, r"y\[0\] = '3', of type str.*`QLoRAClassifier` predicts classes"),
        ([None] + [1.0] * 47, r"y\[0\] = None, a missing number"),
        (np.zeros((48, 1, 1)), r"shape \(48, 1, 1\)"),
        (np.zeros((48, 0)), r"shape \(48, 0\)"),
        ([1.5e308, -1.5e308] * 24, "whose spread is not finite"),
        ([10**400] * 48, "a number beyond float64"),
        ([[1, 2], [3]] * 24, "no array of numbers"),
        ([1j] * 48, "no array of numbers"),
        (np.ma.masked_equal(np.arange(48), 3), "masked entries"),
        (np.arange(48).astype("m8[ns]"), "of type timedelta64"),
        (pd.Series([1, 2, None] * 16, dtype="Int64"), r"y\[2\] = (<NA>|nan), a missing number"),
        (np.array(["2026-01-01"] * 48, "M8[D]"), "of type"),
    ],
)
def test_bad_numbers_are_refused_before_a_model_is_loaded(encoder, texts, y, message, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.model.backbone.Backbone.load", load)
    with pytest.raises(ValueError, match=message):
        make_regressor(encoder).fit(texts, y)


def test_what_is_of_classes_is_refused(encoder, texts, y):
    with pytest.raises(TypeError, match="class_weight"):
        QLoRARegressor(encoder, class_weight="balanced")
    with pytest.raises(TypeError, match="classes"):
        make_regressor(encoder).partial_fit(texts, y, classes=[1, 2])
    with pytest.raises(NotFittedError):
        make_regressor(encoder).predict(texts)


def test_scikit_learn_takes_it_as_a_regressor(encoder, texts, y):
    reg = make_regressor(encoder, num_train_epochs=1)
    tags = get_tags(reg)
    assert tags.estimator_type == "regressor"
    assert tags.target_tags.multi_output
    search = GridSearchCV(reg, {"loss": ["squared_error", "huber"]}, cv=2, error_score="raise")
    assert search.fit(texts, y).cv_results_["mean_test_score"].shape == (2,)
    assert cross_val_predict(reg, texts, y, cv=2).shape == (48,)
    logarithm = TransformedTargetRegressor(reg, func=np.log, inverse_func=np.exp)
    assert (logarithm.fit(texts, y).predict(texts) > 0).all()
    rows = texts[:, None]  # these pass on tables only
    for ensemble in (
        VotingRegressor([("a", reg), ("b", reg)]),
        StackingRegressor([("a", reg)], LinearRegression(), cv=2),
    ):
        assert ensemble.fit(rows, y).predict(rows).shape == (48,)
    several = MultiOutputRegressor(reg).fit(rows, np.column_stack([y, y]))
    assert several.predict(rows).shape == (48, 2)


def test_its_parameters_are_those_of_the_classifier():
    ours, theirs = (
        inspect.signature(kind.__init__).parameters for kind in (QLoRARegressor, QLoRAClassifier)
    )
    assert set(theirs) - set(ours) == {"class_weight"}
    assert set(ours) - set(theirs) == {"loss"}
    assert all(ours[name].default == theirs[name].default for name in set(ours) & set(theirs))


# Described anew, since they are about classes or numbers.
DESCRIBED_ANEW = {
    *("init_head_weights", "truncation", "prompt", "learning_rate", "head_learning_rate"),
    *("early_stopping", "validation_fraction", "scoring", "warm_start"),
}


def test_parameters_are_described_as_those_of_the_classifier():
    ours, theirs = (
        {each.name: each.desc for each in ClassDoc(kind)["Parameters"]}
        for kind in (QLoRARegressor, QLoRAClassifier)
    )
    differ = {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]}
    assert differ == DESCRIBED_ANEW


def test_memory_and_curves(encoder, reg, texts, y):
    pytest.importorskip("matplotlib").use("Agg")
    reg.fit(texts, y)
    display = LossCurveDisplay.from_estimator(reg)
    assert display.ax_.get_ylabel() == "Training loss (squared error)"
    estimate = estimate_memory(**reg.get_params(), n_classes=1)
    assert estimate.total > 0
