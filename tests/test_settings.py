"""The parameters as typed values, and what a fit chose where one of them is "auto"."""

import copy
import enum
import inspect
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import numpy as np
import pytest
from helpers import make_classifier, make_settings
from sklearn.base import clone

from skqlora import QLoRAClassifier
from skqlora.persistence.saved_format import FILES, checksum
from skqlora.settings.parameters import Parameters, read_parameters
from skqlora.settings.settings import SETTLED

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
    class Rank(enum.IntEnum):
        LOW = 3

    class Pooling(str, enum.Enum):  # noqa: UP042 (its str is its name)
        LAST = "last"

    clf = QLoRAClassifier(
        Path("some/folder"),
        lora_r=Rank.LOW,
        lora_alpha=np.float32(2),
        double_quant=np.True_,
        target_modules=["a", "b"],
        layers=[np.int64(1)],
        pooling=Pooling.LAST,
        stride=False,
        max_length=np.int64(8),
        learning_rate=1,
    )
    parameters = read_parameters(clf)
    assert hash(parameters) == hash(read_parameters(clf))
    assert json.loads(json.dumps(asdict(parameters)))["layers"] == [1]
    expected = {
        "model": "some/folder",
        "lora_r": 3,
        "lora_alpha": 2.0,
        "double_quant": True,
        "target_modules": ("a", "b"),
        "layers": (1,),
        "pooling": "last",
        "stride": 0,
        "max_length": 8,
        "learning_rate": 1.0,
    }
    for name, value in expected.items():
        assert (getattr(parameters, name), type(getattr(parameters, name))) == (value, type(value))


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


def test_what_was_chosen_can_be_given_to_another_estimator(fitted, encoder, corpus):
    params = fitted.settings_.as_params()
    assert tuple(params) == fitted.settings_.chosen
    again = clone(fitted).set_params(**params).fit(*corpus)
    np.testing.assert_array_equal(again.predict_proba(corpus[0]), fitted.predict_proba(corpus[0]))
    piece = make_classifier(encoder, num_train_epochs="auto")
    piece.partial_fit(*corpus, classes=sorted(set(corpus[1])))
    assert "num_train_epochs" not in piece.settings_.as_params()  # one epoch is no choice


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
    assert clf.settings_.lr_scheduler_type == "constant_with_warmup"
    assert "one epoch at each partial_fit" in str(clf.settings_)
    assert "constant_with_warmup  the rates do not decay" in str(clf.settings_)
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


def test_a_subclass_with_few_parameters_is_fitted_saved_and_loaded(encoder, corpus, tmp_path):
    class Small(QLoRAClassifier):
        def __init__(self, model, lora_r=4, num_train_epochs=1):
            super().__init__(model, lora_r=lora_r, num_train_epochs=num_train_epochs, device="cpu")

    clf = Small(encoder).fit(*corpus)
    clf.save(tmp_path / "saved")
    loaded = Small.load(tmp_path / "saved")
    assert loaded.settings_ == clf.settings_
    np.testing.assert_array_equal(loaded.predict(corpus[0]), clf.predict(corpus[0]))


def test_settings_stay_those_of_the_fit_whatever_is_set_later(fitted, tmp_path, decoder):
    moved = copy.copy(fitted).set_params(lora_r=64, batch_size=3)
    moved.save(tmp_path / "saved")
    settings = QLoRAClassifier.load(tmp_path / "saved").settings_
    assert (settings.lora_r, settings.batch_size) == (2, 16)
    assert settings == fitted.settings_


def change_settings(folder, change):
    """Write other settings into a saved folder, with a right checksum."""
    manifest = json.loads((folder / FILES.manifest).read_text())
    del manifest["checksum"]
    manifest["settings"] = change(manifest["settings"])
    text = json.dumps(manifest | {"checksum": checksum(manifest)})
    (folder / FILES.manifest).write_text(text)


@pytest.mark.parametrize("change", [lambda saved: None, lambda saved: {"lora_r": saved["lora_r"]}])
def test_settings_of_another_version_are_left_out(fitted, corpus, tmp_path, change):
    fitted.save(tmp_path / "saved")
    change_settings(tmp_path / "saved", change)
    loaded = QLoRAClassifier.load(tmp_path / "saved")
    assert loaded.settings_ is None
    assert loaded.predict(corpus[0]).shape == (48,)


@pytest.mark.parametrize(
    "damage",
    [
        {"max_length": -5},
        {"num_train_epochs": "auto"},
        {"pooling": "<script>"},
        {"learning_rate": float("nan")},
        {"head_learning_rate": float("inf")},
        {"chosen": [{"a": 1}, 3]},
        {"chosen": ["lora_r"]},
        {"target_modules": [["a"]]},
        {"device": 3},
    ],
    ids=str,
)
def test_settings_that_no_fit_has_are_refused(fitted, tmp_path, damage):
    fitted.save(tmp_path / "saved")
    change_settings(tmp_path / "saved", lambda saved: saved | damage)
    with pytest.raises(ValueError, match=r"skqlora\.json.*is not what it should be"):
        QLoRAClassifier.load(tmp_path / "saved")
