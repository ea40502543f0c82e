"""The parameters as typed values, and what a fit chose where one of them is "auto"."""

import inspect
import pickle
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import numpy as np
import pytest
from helpers import make_classifier, make_settings

from skqlora import QLoRAClassifier
from skqlora.settings.parameters import Parameters
from skqlora.settings.settings import SETTLED, Settings

# What the estimator uses up itself: what a fit begins with, is scored by and ends with.
OF_THE_ESTIMATOR = {
    "class_weight",
    "early_stopping",
    "validation_fraction",
    "n_iter_no_change",
    "tol",
    "scoring",
    "warm_start",
    "checkpoint_dir",
    "checkpoint_every",
    "random_state",
}


@pytest.fixture(scope="module")
def fitted(tiny_model, corpus):
    """A classifier that left open what it could; not to be changed."""
    clf = QLoRAClassifier(tiny_model("llama"), lora_r=2, num_train_epochs=2, random_state=0)
    return clf.set_params(device="cpu", compute_dtype="float32").fit(*corpus)


def test_every_parameter_is_read_or_is_the_estimators():
    names = set(inspect.signature(QLoRAClassifier).parameters)
    assert {field.name for field in fields(Parameters)} == names - OF_THE_ESTIMATOR


def test_every_parameter_that_may_be_auto_is_settled():
    defaults = QLoRAClassifier().get_params()
    open_ones = {name for name, value in defaults.items() if value == "auto"}
    assert open_ones - {"cache_dtype"} == set(SETTLED)  # its "auto" is a precision of each model


def test_parameters_are_plain_values():
    params = QLoRAClassifier(
        Path("some/folder"),
        lora_r=np.int64(3),
        lora_alpha=np.float32(2),
        double_quant=np.True_,
        target_modules=["a", "b"],
        layers=[np.int64(1)],
    ).get_params()
    parameters = Parameters.of(params)
    assert hash(parameters) == hash(Parameters.of(params))
    assert parameters.model == "some/folder"
    assert (parameters.lora_r, type(parameters.lora_r)) == (3, int)
    assert parameters.double_quant is True
    assert parameters.target_modules == ("a", "b")
    assert parameters.layers == (1,)
    assert (parameters.lora.lora_alpha, type(parameters.lora.lora_alpha)) == (2, int)


def test_a_fit_tells_what_it_chose(fitted):
    settings = fitted.settings_
    assert settings.pooling == "last"
    assert settings.max_length == 128
    assert settings.learning_rate == pytest.approx(0.5 * 5e-4 * (2000 / 64) ** 0.781)
    assert settings.head_learning_rate == 10 * settings.learning_rate
    assert settings.gradient_checkpointing is False
    assert (settings.device, settings.compute_dtype) == ("cpu", "float32")
    assert settings.num_train_epochs == 2
    assert settings.chosen == (
        "max_length",
        "pooling",
        "learning_rate",
        "head_learning_rate",
        "gradient_checkpointing",
    )
    assert not any(getattr(settings, name) == "auto" for name in SETTLED)


def test_what_was_chosen_is_what_acts(fitted, corpus):
    asked = {name: getattr(fitted.settings_, name) for name in SETTLED}
    again = QLoRAClassifier(**fitted.get_params() | asked).fit(*corpus)
    np.testing.assert_array_equal(again.predict_proba(corpus[0]), fitted.predict_proba(corpus[0]))
    assert again.settings_.chosen == ()
    assert "auto" not in str(again.settings_)


def test_settings_are_read_by_people(fitted):
    table = str(fitted.settings_).splitlines()
    assert [line.split()[0] for line in table] == list(SETTLED)
    assert 'pooling                 last     chosen by "auto"' in table
    assert "num_train_epochs        2        as asked" in table
    page = fitted.settings_._repr_html_()
    assert page.count("<tr>") == len(SETTLED)
    assert "<td>last</td>" in page
    assert repr(fitted.settings_).startswith("Settings(device='cpu'")


def test_settings_cannot_be_changed(fitted):
    with pytest.raises(FrozenInstanceError):
        fitted.settings_.learning_rate = 1.0


def test_settings_survive_save_and_pickle(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    assert QLoRAClassifier.load(tmp_path / "saved").settings_ == fitted.settings_
    assert pickle.loads(pickle.dumps(fitted)).settings_ == fitted.settings_


def test_settings_of_a_piece_of_the_data(encoder, corpus, tmp_path):
    clf = make_classifier(encoder, warmup_steps=2).partial_fit(
        *corpus, classes=sorted({*corpus[1]})
    )
    assert clf.settings_.incremental
    assert clf.settings_.num_train_epochs == 1
    clf.save(tmp_path / "saved")
    assert QLoRAClassifier.load(tmp_path / "saved").settings_ == clf.settings_


def test_a_scorer_that_cannot_be_pickled_is_not_in_the_settings(encoder, corpus):
    clf = make_classifier(
        encoder, num_train_epochs=1, early_stopping=True, scoring=lambda est, X, y: 1.0
    ).fit(*corpus)
    pickle.dumps(clf.set_params(scoring=None))


def test_settings_are_parameters():
    settings = make_settings(batch_size=4, gradient_accumulation_steps=3)
    assert isinstance(settings, Parameters)
    assert settings.batch_rows == 12
    assert Settings.from_settled(settings, settings.settled()) == settings
