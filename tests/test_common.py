"""scikit-learn's own checks: of the estimator, and of a tabular subclass that makes them run."""

import contextlib
import copy
import warnings

import pytest
import tiny
from helpers import make_classifier
from sklearn.exceptions import SkipTestWarning
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

from skqlora import QLoRAClassifier, QLoRARegressor
from skqlora.text.columns import Table
from skqlora.text.feature_names import find_columns
from skqlora.text.inputs import CheckedTexts

# The parametrization runs before any fixture, so this is a folder that a fixture makes.
MODEL = "tiny_bert"

EXPECTED_FAILED_CHECKS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "a repeated row falls into other batches than a weighted one; test_weights.py shows the "
        "equality where all rows are one batch"
    ),
}


class ReadsNumbers:
    """Rows of numbers as `X`, which are read as text.

    scikit-learn has a single check for estimators of text. All code but the reading of `X` is the
    real one.
    """

    def _check_texts(self, X, start):
        return self._of_numbers(X, None, reset=start is None)

    def _check_texts_with(self, X, known, prompt, name="X"):
        if isinstance(X, list) and X and isinstance(X[0], str):  # scored by early stopping
            return super()._check_texts_with(X, None, prompt, name)
        return self._of_numbers(X, known, reset=False)

    def _of_numbers(self, X, known, reset):
        seen = copy.copy(self)
        numbers = validate_data(seen, X, reset=reset, dtype="numeric", ensure_min_samples=1)
        columns = find_columns(self, X, Table([], None, two_dimensional=True)) if reset else known
        texts = [" ".join(f"{10 * number:.0f}" for number in row[:8]) for row in numbers]
        return CheckedTexts(texts, texts, columns)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = False
        tags.input_tags.two_d_array = True
        tags.input_tags.one_d_array = False
        return tags


class TabularClassifier(ReadsNumbers, QLoRAClassifier):
    """`QLoRAClassifier` of numbers."""


class TabularRegressor(ReadsNumbers, QLoRARegressor):
    """`QLoRARegressor` of numbers, whose digits say little to a tiny random model.

    That numbers are learned is in test_regressor.py.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    """Write the tiny model that the checks fit, and go to where it is."""
    folder = tmp_path_factory.mktemp("checks")
    tiny.save_model(folder / MODEL, "bert")
    with contextlib.chdir(folder):
        yield


def tabular(kind):
    params = make_classifier(MODEL, num_train_epochs=8, lora_dropout=0.0).get_params()
    names = kind._get_param_names()
    return kind(**{name: value for name, value in params.items() if name in names})


with warnings.catch_warnings():
    # Of the text estimator: "one_d_array=True", which is what the subclass is for.
    warnings.simplefilter("ignore", SkipTestWarning)
    CHECKS = parametrize_with_checks(
        [
            QLoRAClassifier(),
            QLoRARegressor(),
            tabular(TabularClassifier),
            tabular(TabularRegressor),
        ],
        expected_failed_checks=lambda estimator: (
            EXPECTED_FAILED_CHECKS if isinstance(estimator, ReadsNumbers) else {}
        ),
    )
    # Made here, where the warning is caught: in version 1.8 the checks are a generator.
    names, checks = CHECKS.args
    # The longest check, once more on arrays that cannot be written, in two dtypes.
    checks = [
        pytest.param(*each, marks=pytest.mark.slow)
        if "check_classifiers_train" in str(each) and "readonly_memmap" in str(each)
        else each
        for each in checks
    ]
    CHECKS = pytest.mark.parametrize(names, checks, **CHECKS.kwargs)


@CHECKS
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_tags_tell_the_truth():
    tags = get_tags(QLoRAClassifier())
    assert tags.input_tags.string
    assert tags.input_tags.one_d_array
    assert not tags.input_tags.two_d_array
    assert not tags.input_tags.sparse
    assert not tags.input_tags.allow_nan
    assert tags.target_tags.required
    assert tags.classifier_tags.multi_class
    assert tags.classifier_tags.multi_label
    assert not tags.target_tags.multi_output
    assert not tags.non_deterministic
    assert not hasattr(QLoRAClassifier(), "get_feature_names_out")
