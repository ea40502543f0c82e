"""`QLoRAClassifier` as a user meets it: real fits of tiny models."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_equal_adapters, make_classifier
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_parameters_default_constructible

from skqlora import QLoRAClassifier
from skqlora.model.prediction import predict_outputs


@pytest.fixture(scope="module", params=["bert", "llama"])
def fitted(request, tiny_model, corpus):
    """A classifier fitted on an encoder, then on a decoder; not to be changed."""
    clf = make_classifier(tiny_model(request.param), num_train_epochs=15, batch_size=4)
    return clf.fit(*corpus)


def test_learns_what_there_is_to_learn(fitted, corpus):
    texts, labels = corpus
    assert fitted.score(texts, labels) > 0.9
    assert fitted.n_iter_ == len(fitted.loss_curve_) == 15
    assert fitted.loss_curve_[-1] < 0.5 * fitted.loss_curve_[0]


def test_predictions_agree_with_each_other(fitted, corpus):
    texts, _ = corpus
    probabilities = fitted.predict_proba(texts)
    assert probabilities.dtype == np.float64
    assert probabilities.shape == (len(texts), 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(texts)), probabilities)
    best = fitted.classes_[probabilities.argmax(axis=1)]
    np.testing.assert_array_equal(fitted.predict(texts), best)
    scores = fitted.decision_function(texts)
    np.testing.assert_allclose(np.diff(scores), np.diff(np.log(probabilities)), atol=1e-6)


def test_two_classes_have_one_score(encoder):
    texts, labels = ["a cat", "a dog", "red", "blue"] * 4, [True, True, False, False] * 4
    clf = make_classifier(encoder).fit(texts, labels)
    scores, probabilities = clf.decision_function(texts), clf.predict_proba(texts)
    assert scores.shape == (16,)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), probabilities[:, 1], atol=1e-7)
    assert clf.predict(texts).dtype == bool


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_neighbours_order_and_padding_side_change_no_probability(
    model, corpus, dtype, tolerance, tmp_path
):
    texts, labels = corpus
    texts = [*texts, "", "a very " * 15 + "white sheep"][:50]
    labels = [*labels, "animal", "animal"][:50]
    clf = make_classifier(model, compute_dtype=dtype).fit(texts, labels)
    together = clf.predict_proba(texts)
    alone = np.vstack([clf.predict_proba([text]) for text in texts])
    np.testing.assert_allclose(alone, together, rtol=0, atol=tolerance)
    order = np.random.RandomState(0).permutation(len(texts))
    shuffled = clf.predict_proba([texts[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=tolerance)
    for side in ("left", "right"):
        folder = copy_with_padding_side(model, tmp_path / side, side)
        clf.set_params(model=folder)
        np.testing.assert_allclose(clf.predict_proba(texts), together, rtol=0, atol=tolerance)


def copy_with_padding_side(model, folder, side):
    from shutil import copytree

    from transformers import AutoTokenizer

    copytree(model, folder)
    AutoTokenizer.from_pretrained(model, padding_side=side).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "model", [pytest.param("bert", marks=pytest.mark.slow), "llama"], indirect=True
)
def test_same_seed_same_classifier_in_another_process_too(model, corpus, tmp_path):
    first, again = (make_classifier(model).fit(*corpus) for _ in range(2))
    assert_equal_adapters(first, again)
    assert_equal_adapters(first, fit_in_another_process(model, tmp_path))
    other = make_classifier(model, random_state=1).fit(*corpus)
    with pytest.raises(AssertionError):
        assert_equal_adapters(first, other)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("bert", "float32"),
        pytest.param("bert", "bfloat16", marks=pytest.mark.slow),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
        pytest.param("llama", "bfloat16", marks=pytest.mark.slow),
    ],
    indirect=["model"],
)
def test_fit_in_a_used_process_equals_one_in_a_fresh_process(
    model, corpus, dtype, tmp_path, monkeypatch
):
    texts, labels = corpus
    other = make_classifier(model, compute_dtype=dtype, random_state=5)
    other.fit(texts, ["a", "b"] * 24).predict(texts)  # another number of classes, the same shape
    make_classifier(model, compute_dtype=dtype, lora_r=7).fit(texts, labels)
    make_classifier(model, compute_dtype=dtype, use_dora=True, lora_dropout=0.3).fit(texts, labels)
    make_classifier(model, compute_dtype=dtype, lora_alpha=9, batch_size=3).fit(texts, labels)
    make_classifier(model, quantization=None).fit(texts, labels)
    for error in (RuntimeError, KeyboardInterrupt):
        with monkeypatch.context() as patch:
            patch.setattr("skqlora.training.trainer.Trainer._check_finite", Mock(side_effect=error))
            with pytest.raises(error):
                other.fit(texts, labels)
    used = make_classifier(model, compute_dtype=dtype).fit(texts, labels)
    assert_equal_adapters(used, fit_in_another_process(model, tmp_path, compute_dtype=dtype))


def test_bfloat16_is_reproducible_too(model, corpus):
    first, again = (make_classifier(model, compute_dtype="bfloat16").fit(*corpus) for _ in "ab")
    assert_equal_adapters(first, again)


def fit_in_another_process(model, folder, **params):
    script = (
        "import sys, joblib, torch, tiny; from helpers import make_classifier\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"clf = make_classifier(sys.argv[1], **{params!r}).fit(*tiny.corpus())\n"
        "joblib.dump(clf, sys.argv[2])"
    )
    path = folder / "fitted.joblib"
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", script, model, path], env=environment, check=True)
    return joblib.load(path)


def test_global_random_states_are_left_alone(model, corpus):
    import random

    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    make_classifier(model).fit(*corpus).predict(corpus[0])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_fitted_classifier_is_small_and_survives_pickle(fitted, corpus):
    data = pickle.dumps(fitted)
    tensors = [*fitted.adapter_.lora_tensors.values(), *fitted.adapter_.head_tensors.values()]
    assert len(data) < sum(tensor.nbytes for tensor in tensors) + 64 * 1024
    expected = fitted.predict_proba(corpus[0])
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(corpus[0]), expected)


def test_failed_fit_leaves_the_old_one(model, corpus, monkeypatch):
    texts, labels = corpus
    clf = make_classifier(model).fit(texts, labels)
    expected = clf.predict_proba(texts)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("skqlora.training.trainer.Trainer._apply", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            clf.fit(texts, ["x", "y"] * 24)
    np.testing.assert_array_equal(clf.predict_proba(texts), expected)
    assert clf.classes_.tolist() == ["animal", "colour", "number"]


def test_parameters_are_checked_before_a_prediction_too(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    with pytest.raises(ValueError, match="'quantization' parameter"):
        clf.set_params(quantization="int8").predict(["text"])


def test_moved_base_is_told_by_name_and_found_again(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    with pytest.raises(ValueError, match="model='/gone/away' is a folder that does not exist"):
        clf.set_params(model="/gone/away").predict(corpus[0])
    np.testing.assert_array_equal(clf.set_params(model=encoder).predict_proba(corpus[0]), expected)


def test_model_may_be_a_path(encoder, corpus):
    clf = make_classifier(Path(encoder), num_train_epochs=1).fit(*corpus)
    assert clf.predict(corpus[0]).shape == (48,)


def test_unfitted_classifier_says_so():
    with pytest.raises(NotFittedError):
        QLoRAClassifier().predict(["text"])


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test in which a base is loaded."""

    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.model.backbone.Backbone.load", load)


TWO = (["one text", "another"], ["a", "b"])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        ("one text", ["a"], TypeError, "single str"),
        (["one", None], ["a", "b"], TypeError, r"X\[1\] = None"),
        (
            [["one", "two"], ["three"]],
            ["a", "b"],
            ValueError,
            "1 entries.* rows of the same length",
        ),
        (["one", "two", "three"], ["a", "b"], ValueError, "3 texts in X but 2 labels"),
        ([], [], ValueError, r"0 sample\(s\)"),
        (["one", "two"], ["a", "a"], ValueError, "only one class"),
        (["one", "two"], ["a", None], ValueError, "missing label"),
    ],
)
def test_bad_data_is_refused_before_a_model_is_loaded(encoder, X, y, error, message):
    with pytest.raises(error, match=message):
        make_classifier(encoder).fit(X, y)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("quantization", "int8"),
        ("compute_dtype", "int8"),
        ("lora_r", 0),
        ("lora_dropout", 1.0),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", False),
        ("pooling", "max"),
        ("max_length", 0),
        ("num_train_epochs", 0),
        ("batch_size", 2.5),
        ("gradient_checkpointing", "maybe"),
        ("learning_rate", 0),
        ("lr_scheduler_type", "bent"),
        ("optim", "sgd"),
    ],
)
def test_unknown_parameter_value_is_refused_before_a_model_is_loaded(encoder, name, value):
    with pytest.raises(ValueError, match=f"The '{name}' parameter of QLoRAClassifier must be"):
        make_classifier(encoder, **{name: value}).fit(*TWO)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": "no/such/folder"}, "is a folder that does not exist"),
        ({"model": "no-such-model"}, "could not be read: .*HF_HUB_OFFLINE.*organisation/name"),
        ({"device": "mps"}, "bitsandbytes cannot train"),
        ({"compute_dtype": "float16"}, "float16' on a CPU"),
        ({"max_length": 129}, "max_length=129 but .* takes 128 tokens"),
        ({"max_length": 2}, "tokenizer adds 2 special tokens"),
        ({"target_modules": ["nothing"]}, "target_modules=.* cannot be adapted"),
        ({"target_modules": ["query", "v_proj"]}, "no module 'v_proj'.*: query, key, value, dense"),
        ({"target_modules": "query"}, r"Wanted: a list of names, \['query'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(encoder, params, message):
    with pytest.raises(ValueError, match=message):
        make_classifier(encoder, **params).fit(*TWO)


@pytest.mark.usefixtures("no_model")
def test_folder_without_a_tokenizer_is_refused(encoder, tmp_path):
    from shutil import copytree, ignore_patterns

    folder = copytree(encoder, tmp_path / "mute", ignore=ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        make_classifier(str(folder)).fit(*TWO)


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
@pytest.mark.parametrize(
    "params",
    [
        {"quantization": "fp4"},
        {"quantization": None},
        {"double_quant": False},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*(query|q_proj)"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "adamw"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "cosine"},
        {"max_grad_norm": None},
        {"max_length": 8},
        {"compute_dtype": "bfloat16"},
        {"compute_dtype": "bfloat16", "quantization": None},
    ],
    ids=str,
)
def test_every_choice_learns_and_predicts(model, corpus, params):
    texts, labels = corpus
    clf = make_classifier(model, **params).fit(texts, labels)
    assert clf.loss_curve_[-1] < clf.loss_curve_[0]
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(clf)).predict(texts), clf.predict(texts)
    )


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
def test_parameters_arrive_where_they_act(encoder, corpus):
    lora = {
        "lora_alpha": 7,
        "target_modules": ["query", "value"],
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "gaussian",
    }
    recipe = {
        "num_train_epochs": 1,
        "batch_size": 5,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 1e-3,
        "weight_decay": 0.25,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "optim": "adamw",
    }
    clf = make_classifier(
        encoder, lora_r=3, max_length=9, head_learning_rate="auto", **lora, **recipe
    ).fit(*corpus)
    expected = lora | {"r": 3, "target_modules": ("query", "value")}
    assert vars(clf.adapter_.lora) == expected
    assert clf.adapter_.text_settings.max_length == 9
    assert {name: getattr(clf.settings_, name) for name in recipe} == recipe
    assert clf.settings_.head_learning_rate == 10 * clf.settings_.learning_rate


@pytest.mark.parametrize("pooling", ["cls", "pooler", "last", "mean"])
def test_every_pooling_of_an_encoder_learns(encoder, corpus, pooling):
    clf = make_classifier(encoder, pooling=pooling).fit(*corpus)
    assert clf.loss_curve_[-1] < clf.loss_curve_[0]
    assert clf.adapter_.pooling == pooling


def test_works_inside_scikit_learn(encoder, corpus):
    texts, labels = (np.array(values) for values in corpus)
    pipeline = make_pipeline(FunctionTransformer(np.char.upper), make_classifier(encoder))
    search = GridSearchCV(pipeline, {"qloraclassifier__lora_r": [2, 4]}, cv=2, error_score="raise")
    search.fit(texts, labels)
    assert search.best_estimator_[-1].adapter_.lora.r in (2, 4)
    scores = cross_val_score(make_classifier(encoder), pd.Series(texts), labels, cv=2)
    assert np.isfinite(scores).all()


def test_is_a_scikit_learn_estimator():
    clf = QLoRAClassifier(lora_r=3)
    check_parameters_default_constructible("QLoRAClassifier", clf)
    assert clone(clf).lora_r == 3
    assert repr(clf) == "QLoRAClassifier(lora_r=3)"


def test_quiet_by_default_and_progress_on_request(tmp_path, corpus, capfd):
    import tiny

    folder = tiny.save_model(tmp_path, "mistral")
    capfd.readouterr()
    make_classifier(folder).fit(*corpus).predict(corpus[0])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    make_classifier(folder, verbose=1).fit(*corpus)
    shown = capfd.readouterr().err  # no terminal: also no bars of loading
    assert [line[:14] for line in shown.splitlines()] == [f"fit: epoch {n}/3" for n in (1, 2, 3)]


def test_equal_texts_are_computed_once_and_many_in_chunks(clf, corpus, monkeypatch):
    texts, labels = corpus
    clf.fit(texts, labels)
    expected = clf.predict_proba(texts)
    computed = []

    def noting(model, tokens, show):
        computed.append(len(tokens))
        return predict_outputs(model, tokens, show)

    monkeypatch.setattr("skqlora.model.prediction.predict_outputs", noting)
    monkeypatch.setattr("skqlora.base_estimator.PREDICTION_CHUNK", 20)
    repeated = np.array(texts, dtype=object).repeat(3)
    probabilities = clf.predict_proba(repeated)
    np.testing.assert_allclose(probabilities, expected.repeat(3, axis=0), rtol=0, atol=1e-6)
    assert len(computed) == -(-len(set(texts)) // 20)
    assert sum(computed) == len(set(texts))


def test_an_iterator_of_texts_is_predicted_in_chunks(clf, corpus, monkeypatch):
    texts, labels = corpus
    clf.fit(texts, labels)
    monkeypatch.setattr("skqlora.base_estimator.PREDICTION_CHUNK", 20)
    for method in (clf.predict, clf.predict_proba, clf.decision_function):
        expected = method(texts)
        found = method(text for text in texts)
        assert found.dtype == expected.dtype
        if method == clf.predict:
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="0 sample"):
        clf.predict(iter([]))
    with pytest.raises(TypeError, match=r"X\[0\] = 1 "):
        clf.predict(iter([1]))


class Stream:
    """A column without a length, as a streamed `datasets.IterableDataset` has them."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, name):
        return Stream([row[name] for row in self.rows])


class Table(Stream):
    """A table with names of columns, as `datasets.Dataset`."""

    def __init__(self, rows):
        super().__init__(rows)
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def test_streams_and_tables_of_datasets(clf, corpus):
    texts, labels = corpus
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    clf.fit(Table(rows)["text"], Table(rows)["label"])
    expected = clf.predict_proba(texts)
    for X in (Stream(texts), Stream(rows)["text"], Table([{"text": text} for text in texts])):
        np.testing.assert_array_equal(clf.predict_proba(X), expected)
    for X in (Stream(rows), rows):
        with pytest.raises(TypeError, match=r"of type dict.* Pass a column, such as X\['text'\]"):
            clf.predict(X)
    with pytest.raises(TypeError, match=r"Got X of type Stream.* Pass list\(X\)"):
        clf.fit(Stream(texts), labels)
