"""Random combinations of all parameters end in results that last, or in errors of this package."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from sklearn.utils._param_validation import InvalidParameterError

from skqlora import QLoRAClassifier

FAMILIES = ["bert", "llama", "gpt2", "roberta", "qwen3", "mixtral"]
N_EXAMPLES = 75  # in each of four parts, which run side by side
VALUES = {
    "quantization": ["nf4", "fp4", None],
    "double_quant": [True, False, np.bool_(True)],
    "compute_dtype": ["auto", "float32", "bfloat16", "float16"],
    "device": ["auto", "cpu", "cuda", "meta", "nowhere"],
    "attn_implementation": [None, "eager", "sdpa", "unheard of"],
    "lora_r": [1, 3, np.int64(8), 200],
    "lora_alpha": [1, 0.5, 32.0, np.float32(3)],
    "lora_dropout": [0.0, 0.1, 0.9],
    "target_modules": [
        "all-linear",
        ["query"],
        ["q_proj"],
        ["c_attn"],
        r".*(query|v_proj)",
        [],
        "no",
    ],
    "layers": ["all", 1, [-1], [0, 1], 7, [], [0.5]],
    "cache_dtype": ["auto", "bfloat16", None],
    "use_rslora": [True, False],
    "use_dora": [True, False],
    "init_lora_weights": [True, "gaussian", False],
    "init_head_weights": ["normal", "probe", "class_names"],
    "pooling": ["auto", "last", "mean", "cls", "pooler"],
    "max_length": ["auto", 3, 16, 500],
    "truncation": ["head", "tail", "head+tail", "windows"],
    "stride": [0, 2, 40],
    "prompt": [
        *[None, "{text} is", "Say: {text}\nIt is a", "nothing", "{text}{text}", "<s>{text}"],
        *["{0}: {1}", "{1:>9}</s>{0}{0}", "{0:.2f}", "{0} {2}"],
    ],
    "num_train_epochs": [1, 2, np.int32(3)],
    "batch_size": [1, 5, 64],
    "gradient_accumulation_steps": [1, 3],
    "gradient_checkpointing": ["auto", True, False],
    "learning_rate": ["auto", 1e-3, 1e-30, 1e3],
    "head_learning_rate": ["auto", 1e-2, 1e4],
    "weight_decay": [0.0, 0.1, 100],
    "warmup_steps": [0, 0.5, 3, 1000],
    "lr_scheduler_type": ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"],
    "max_grad_norm": [1.0, 1e-9, None],
    "optim": ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"],
    "class_weight": [None, "balanced", {"a": 3.0}, {0: 2}, {"zebra": 1}],
    "early_stopping": [True, False],
    "validation_fraction": [0.2, 0.9, 0.01],
    "n_iter_no_change": [1, 3],
    "tol": [0.0, 10.0],
    "scoring": [None, "loss", "f1_macro", "roc_auc", "neg_log_loss"],
    "warm_start": [True, False],
    "random_state": [0, None, np.random.RandomState(0)],
    "verbose": [0, False],
}
TEXTS = ["the cat is here", "", "red", "</s> dog " * 30, "一只猫", "a\tb\n\nc", "seven " * 12, "?!"]
LABELS = {
    "two": ["a", "b"],
    "three": ["a", "b", "c"],
    "numbers": [0, 1],
    "dates": [np.datetime64("2026-01-01"), np.datetime64("2026-01-02")],
    "several": [[0, 1], [1, 1], [1, 0]],
}


@st.composite
def cases(draw):
    """Draw a family, a few parameters that are not the defaults, rows, labels and weights."""
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=7, unique=True))
    params = {name: draw(st.sampled_from(VALUES[name])) for name in names}
    n_texts = draw(st.integers(4, 14))
    kind = draw(st.sampled_from(sorted(LABELS)))
    row = st.sampled_from(TEXTS)
    n_columns = draw(st.sampled_from([0, 0, 1, 2, 3]))
    if n_columns:
        row = st.lists(row, min_size=n_columns, max_size=n_columns)
    texts = draw(st.lists(row, min_size=n_texts, max_size=n_texts))
    y = [LABELS[kind][i % len(LABELS[kind])] for i in range(n_texts)]
    weights = draw(st.sampled_from([None, 1.0, np.arange(n_texts), np.full(n_texts, 1e-20)]))
    y = np.array(y) if kind in ("several", "dates") else y
    return draw(st.sampled_from(FAMILIES)), params, texts, y, weights


def is_ours(error):
    """Return whether an error says what is wanted, or is scikit-learn's about a parameter."""
    if isinstance(error, InvalidParameterError | FloatingPointError):
        return True
    return any(word in str(error) for word in ("Wanted: ", "Pass ", "Set "))


READ = """
import json, sys
import numpy as np
from skqlora import QLoRAClassifier
for folder, texts in json.load(sys.stdin):
    found = QLoRAClassifier.load(folder).predict_proba(texts)
    np.testing.assert_array_equal(found, np.load(folder + ".npy"), folder)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what is odd about the parameters
@pytest.mark.parametrize("part", range(4))
def test_random_parameters(tiny_model, tmp_path, part):
    saved = []

    @seed(part)
    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def run(case):
        family, params, texts, y, weights = case
        clf = QLoRAClassifier(tiny_model(family), **{"num_train_epochs": 1} | params)
        try:
            clf.fit(texts, y, sample_weight=weights)
        except (ValueError, TypeError, FloatingPointError, MemoryError) as error:
            if not is_ours(error):
                raise
            return
        expected = clf.predict_proba(texts)
        assert expected.shape == (len(texts), len(clf.classes_))
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(clf.predict_proba(texts), expected)
        again = pickle.loads(pickle.dumps(clf))
        np.testing.assert_array_equal(again.predict_proba(texts), expected)
        clf.set_params(random_state=0)  # a RandomState cannot be written without pickle
        folder = str(tmp_path / str(len(saved)))
        clf.save(folder)
        again = QLoRAClassifier.load(folder)
        np.testing.assert_array_equal(again.predict_proba(texts), expected)
        assert again.predict(texts).tolist() == clf.predict(texts).tolist()
        np.save(folder + ".npy", expected)
        saved.append((folder, texts))
        if clf.warm_start:
            clf.fit(texts, y, sample_weight=weights)

    run()
    assert len(saved) > N_EXAMPLES / 5
    command = [sys.executable, "-W", "ignore", "-c", READ]
    subprocess.run(command, input=json.dumps(saved), text=True, check=True)
