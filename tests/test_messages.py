"""The line that a warning points to, and what is suggested for a name that does not exist."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import make_classifier
from joblib import parallel_config
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

import skqlora
from skqlora import QLoRAClassifier, QLoRARegressor
from skqlora._utils.messages import nearest

SHORT = {"max_length": 4, "num_train_epochs": 1}


def lines_of(caught):
    return {(warning.filename, warning.lineno) for warning in caught}


def test_warnings_point_to_the_users_line(encoder, corpus):
    clf = make_classifier(encoder, **SHORT)
    with pytest.warns(UserWarning, match="are cut") as caught:
        clf.fit(*corpus)
    here = inspect.currentframe().f_lineno
    assert lines_of(caught) == {(__file__, here - 1)}
    with pytest.warns(UserWarning, match="are cut") as caught:
        clf.predict(corpus[0])
    assert lines_of(caught) == {(__file__, here + 3)}


def test_warnings_within_a_search_point_to_the_users_line(encoder, corpus):
    clf = make_pipeline("passthrough", make_classifier(encoder, **SHORT))
    search = GridSearchCV(clf, {"qloraclassifier__lora_r": [2, 4]}, cv=2)
    with pytest.warns(UserWarning, match="are cut") as caught:
        search.fit(*corpus)
    assert lines_of(caught) == {(__file__, inspect.currentframe().f_lineno - 1)}


def test_warnings_from_a_thread_point_to_the_outermost_method(encoder, corpus):
    with pytest.warns(UserWarning, match="are cut"):
        clf = make_classifier(encoder, **SHORT).fit(*corpus)
    with pytest.warns(UserWarning, match="are cut") as caught, ThreadPoolExecutor(1) as pool:
        pool.submit(clf.predict, corpus[0]).result()
    ((file, _),) = lines_of(caught)
    assert Path(file) == Path(skqlora.__file__).parent / "classifier.py"


def test_warnings_from_threads_of_a_search_do_not_point_to_the_standard_library(encoder, corpus):
    clf = make_classifier(encoder, **SHORT)
    with pytest.warns(UserWarning, match="are cut") as caught, parallel_config("threading"):
        cross_val_score(clf, *corpus, cv=2, n_jobs=2)
    assert {Path(file).parent.name for file, _ in lines_of(caught)} == {"joblib"}


def test_all_warnings_are_issued_in_one_place():
    files = Path(skqlora.__file__).parent.rglob("*.py")
    assert [path.name for path in files if "warnings.warn(" in path.read_text()] == ["messages.py"]


@pytest.mark.parametrize("estimator", [QLoRAClassifier, QLoRARegressor])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("epochs", "num_train_epochs"),
        ("lr", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("dropout", "lora_dropout"),
        ("r", "lora_r"),
        ("seed", "random_state"),
        ("model_name_or_path", "model"),
        ("n_epochs", "num_train_epochs"),
        ("dtype", "compute_dtype"),
        ("torch_dtype", "compute_dtype"),
        ("lora_layers", "layers"),
        ("lora_target", "target_modules"),
        ("max_tokens", "max_length"),
        ("quant", "quantization"),
        ("quant_type", "quantization"),
        ("load_in_4bit", "quantization"),
        ("patience", "n_iter_no_change"),
        ("eval_split", "validation_fraction"),
        ("val_split", "validation_fraction"),
        ("warmup", "warmup_steps"),
    ],
)
def test_unknown_parameters_suggest_the_nearest(estimator, name, meant):
    message = f"{estimator.__name__} has no parameter '{name}'. Did you mean '{meant}'?"
    with pytest.raises(TypeError) as error:
        estimator("folder", **{name: 1})
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match="Wanted: one of those in `help") as error:
        estimator().set_params(**{name: 1})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("known", [("top_b", "top_a"), ("top_a", "top_b")])
def test_the_suggestion_does_not_depend_on_the_order(known):
    assert nearest("top", known) == "top_a"


@pytest.mark.parametrize(
    ("estimator", "name", "hint"),
    [
        (QLoRAClassifier, "weights", "Did you mean 'class_weight'? Weights of texts are "),
        (QLoRAClassifier, "weight", "Did you mean 'class_weight'? Weights of texts are "),
        (QLoRARegressor, "weights", "Weights of texts are the argument sample_weight of `fit`."),
        (QLoRAClassifier, "sample_weight", "Weights of texts are the argument sample_weight of "),
        (QLoRAClassifier, "loss", "Only QLoRARegressor has it, for targets that are numbers."),
    ],
)
def test_parameters_that_are_elsewhere_are_found(estimator, name, hint):
    with pytest.raises(TypeError) as error:
        estimator("folder", **{name: 1})
    start = f"{estimator.__name__} has no parameter '{name}'. {hint}"
    assert str(error.value).startswith(start)


def test_a_name_like_no_other_suggests_nothing():
    with pytest.raises(TypeError, match=r"no parameter 'zzz'\. Wanted:"):
        QLoRAClassifier(zzz=1)


def test_the_signature_of_the_constructor_stays():
    parameters = inspect.signature(QLoRAClassifier).parameters
    assert list(parameters)[:2] == ["model", "revision"]
    assert parameters["lora_r"].default == 16
    assert clone(QLoRAClassifier(lora_r=3).set_params(lora_alpha=9)).lora_alpha == 9
    with pytest.raises(TypeError, match="positional argument"):
        QLoRAClassifier("folder", "main")


@pytest.mark.parametrize(
    ("scoring", "meant"),
    [
        ("f1_marco", r" Did you mean 'f1_macro'\?"),
        ("accuracyy", r" Did you mean 'accuracy'\?"),
        ("f1_score", r" Did you mean 'f1'\?"),
        ("r2_score", r" Did you mean 'r2'\?"),
        ("recall_score", r" Did you mean 'recall'\?"),
        ("precision_score", r" Did you mean 'precision'\?"),
        ("auc", r" Did you mean 'roc_auc'\?"),
        ("zzz", ""),
    ],
)
def test_unknown_scorers_suggest_the_nearest(scoring, meant):
    message = rf"scoring='{scoring}', which is no scorer\.{meant} Wanted: 'loss', a name"
    with pytest.raises(ValueError, match=message) as error:
        QLoRAClassifier(scoring=scoring).fit(["a", "b"], [0, 1])
    assert len(str(error.value)) < 250


def test_warm_start_with_some_of_the_classes_names_partial_fit(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=1, warm_start=True).fit(*corpus)
    some = [i for i, label in enumerate(corpus[1]) if label != "number"]
    texts, labels = (np.array(values)[some] for values in corpus)
    with pytest.raises(ValueError, match=r"texts of only some classes, call `partial_fit`\.$"):
        clf.fit(texts, labels)
    with pytest.raises(ValueError, match=r"warm_start=False\.$"):
        clf.fit(texts, [f"new {label}" for label in labels])
    clf.partial_fit(texts, labels)
