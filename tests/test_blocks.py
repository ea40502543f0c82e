"""Adapters on some of the model's layers."""

import numpy as np
import pytest
import tiny
from helpers import assert_equal_adapters, make_classifier
from sklearn.model_selection import GridSearchCV

from skqlora import QLoRAClassifier


def layers_of(clf):
    """Numbers of the layers that have an adapter."""
    names = clf.adapter_.lora_tensors
    return {int(part) for name in names for part in name.split(".") if part.isdigit()}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", {0, 1}), (2, {0, 1}), (1, {1}), ([0], {0}), ((-1,), {1}), ([0, -1], {0, 1})],
)
def test_only_the_layers_that_are_named_get_an_adapter(model, corpus, layers, expected):
    clf = make_classifier(model, layers=layers, num_train_epochs=1).fit(*corpus)
    assert layers_of(clf) == expected


def test_layers_and_target_modules_choose_together(decoder, corpus):
    params = {"target_modules": ["q_proj", "v_proj"], "layers": 1, "num_train_epochs": 1}
    clf = make_classifier(decoder, **params).fit(*corpus)
    modules = {name.rsplit(".lora_", 1)[0] for name in clf.adapter_.lora_tensors}
    assert modules == {f"layers.1.self_attn.{name}_proj" for name in "qv"}


def test_a_classifier_of_some_layers_learns_and_is_kept(model, texts, labels, tmp_path):
    clf = make_classifier(model, layers=1, num_train_epochs=15).fit(texts, labels)
    assert clf.score(texts, labels) > 0.8
    clf.save(tmp_path / "clf")
    loaded = QLoRAClassifier.load(tmp_path / "clf")
    assert loaded.layers == 1
    np.testing.assert_array_equal(loaded.predict_proba(texts), clf.predict_proba(texts))
    loaded.set_params(warm_start=True, num_train_epochs=1).fit(texts, labels)
    assert loaded.n_iter_ == 16


def test_a_search_over_layers(encoder, texts, labels):
    clf = make_classifier(encoder, num_train_epochs=1)
    search = GridSearchCV(clf, {"layers": [1, "all"]}, cv=2, error_score="raise")
    best = search.fit(texts, labels).best_estimator_
    assert_equal_adapters(
        best, make_classifier(encoder, num_train_epochs=1, layers=best.layers).fit(texts, labels)
    )


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"layers": 3}, r"layers=3, but the model has 2 layers.*0 to 1"),
        ({"layers": [2]}, r"layers=\[2\], but the model has 2 layers"),
        ({"layers": [-3]}, "but the model has 2 layers"),
        ({"layers": ["0"]}, "but the model has 2 layers"),
        ({"layers": []}, "but the model has 2 layers"),
        ({"layers": 0}, "'layers' parameter"),
        ({"layers": "last"}, "'layers' parameter"),
        ({"layers": [0], "target_modules": r".*1\.self_attn\.q_proj"}, "is in none of them"),
    ],
)
def test_layers_that_are_not_there_are_refused(decoder, corpus, params, match):
    with pytest.raises(ValueError, match=match):
        make_classifier(decoder, **params).fit(*corpus)


def test_a_model_whose_layers_share_weights_is_refused(corpus, tmp_path):
    albert = tiny.save_model(tmp_path / "albert", "albert")
    with pytest.raises(ValueError, match="no single stack of like layers"):
        make_classifier(albert, layers=1).fit(*corpus)
