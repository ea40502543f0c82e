"""Long texts and prompts, from `fit` to the saved folder."""

from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
from helpers import assert_equal_adapters, make_classifier
from sklearn.model_selection import GridSearchCV

from skqlora import QLoRAClassifier
from skqlora.settings.adapter_settings import TextSettings

SHORT = {"max_length": 12, "num_train_epochs": 2}
CUT = "texts have more than max_length=12 tokens and are cut"


@pytest.fixture(scope="module")
def late_corpus():
    """Texts of forty words that tell their class by the last few alone."""
    rng = np.random.RandomState(0)
    noise = ["the", "a", "is", "here", "and", "too"]
    labels = np.array(["animal", "colour"])[np.arange(48) % 2]
    words = {"animal": ["cat", "dog", "horse"], "colour": ["red", "green", "blue"]}
    texts = [" ".join([*rng.choice(noise, 40), *rng.choice(words[y], 4)]) for y in labels]
    return texts, labels


def test_fit_and_predict_tell_the_share_of_texts_that_are_cut(encoder, late_corpus):
    texts, labels = late_corpus
    with pytest.warns(UserWarning, match=rf"98\.0% of 49 {CUT} \(truncation='head'\)"):
        clf = make_classifier(encoder, **SHORT).fit([*texts, "a cat"], [*labels, "animal"])
    with pytest.warns(UserWarning, match=f"50.0% of 2 {CUT}.* fit with truncation='windows'"):
        clf.predict([texts[0], "a cat"])


def test_many_chunks_of_a_prediction_warn_once(encoder, late_corpus, monkeypatch):
    texts, labels = late_corpus
    clf = make_classifier(encoder, **SHORT, truncation="windows").fit(texts, labels)
    clf.adapter_ = replace(clf.adapter_, text_settings=TextSettings(12))
    monkeypatch.setattr("skqlora.base_estimator.PREDICTION_CHUNK", 5)
    with pytest.warns(UserWarning, match=rf"98\.0% of 49 {CUT}") as caught:
        clf.predict([*texts, "a cat"])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("max_length", "remedy"),
    [
        (12, r"Pass a greater max_length, or truncation='windows'"),
        (128, r"Pass truncation='windows' .* a model that takes more tokens, which this one"),
    ],
)
def test_the_remedy_fits_the_model(encoder, max_length, remedy):
    clf = make_classifier(encoder, max_length=max_length, num_train_epochs=1)
    with pytest.warns(UserWarning, match=f"are cut .*{remedy}"):
        clf.fit(["cat " * 200, "dog"], [0, 1])


@pytest.mark.parametrize("prompt", [None, "{body} of {title}", "{0}: {body}"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_columns_that_are_cut_are_named(tiny_model, family, prompt):
    frame = pd.DataFrame({"title": ["cat", "red", "dog"], "body": ["cat " * 90, "is", "dog"]})
    clf = make_classifier(tiny_model(family), max_length=40, num_train_epochs=1, prompt=prompt)
    with pytest.warns(
        UserWarning, match=r"33\.3% of 3 texts .* \(truncation='head'\), in 'body'\."
    ):
        clf.fit(frame, [0, 1, 0])


@pytest.mark.filterwarnings(f"ignore:.*{CUT}")
def test_what_is_kept_decides_what_can_be_learned(encoder, late_corpus):
    texts, labels = late_corpus
    scores = {
        truncation: make_classifier(encoder, **SHORT | {"num_train_epochs": 6})
        .set_params(truncation=truncation)
        .fit(texts, labels)
        .score(texts, labels)
        for truncation in ("head", "tail", "head+tail", "windows")
    }
    assert scores["head"] < 0.9
    assert min(scores["tail"], scores["head+tail"], scores["windows"]) > 0.9


def test_windows_logits_are_averaged(encoder, late_corpus):
    texts, labels = late_corpus
    clf = make_classifier(encoder, **SHORT, truncation="windows").fit(texts, labels)
    words = [["cat"] * 10, ["red"] * 10, ["dog"] * 10]  # one token each, ten in a window
    logits = clf.predict_log_proba([" ".join(np.concatenate(words))])
    parts = clf.predict_log_proba([" ".join(part) for part in words])
    mean = parts.mean(axis=0)
    np.testing.assert_allclose(logits[0], mean - np.log(np.exp(mean).sum()), atol=1e-5)


def test_windows_of_short_texts_are_the_texts(encoder, corpus):
    plain = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    windows = make_classifier(encoder, num_train_epochs=1, truncation="windows").fit(*corpus)
    assert_equal_adapters(plain, windows)


def test_a_text_counts_once_however_many_windows_it_has(encoder):
    """Rows that are weighted as windows are give the same training."""
    cats, reds = " ".join(["cat"] * 10), " ".join(["red"] * 10)
    texts = [f"{cats} {cats}", reds]
    params = SHORT | {"num_train_epochs": 1, "lora_dropout": 0.0, "batch_size": 8}
    windows = make_classifier(encoder, **params, truncation="windows").fit(texts, ["a", "b"])
    rows = [cats, cats, reds]
    weighted = make_classifier(encoder, **params).fit(rows, ["a", "a", "b"], [0.5, 0.5, 1])
    np.testing.assert_allclose(
        windows.predict_proba(rows), weighted.predict_proba(rows), rtol=0, atol=1e-5
    )
    assert windows.loss_curve_ == pytest.approx(weighted.loss_curve_, abs=1e-5)


def test_windows_go_with_several_labels_and_class_weights(encoder, late_corpus):
    texts, labels = late_corpus
    y = np.column_stack([labels == "animal", labels == "colour"]).astype(int)
    clf = make_classifier(encoder, **SHORT, truncation="windows", stride=2)
    clf.set_params(class_weight=[{0: 1, 1: 2}, {0: 1, 1: 3}]).fit(texts, y)
    assert clf.predict_proba(texts[:3]).shape == (3, 2)


def test_windows_go_with_cached_layers_checkpoints_and_early_stopping(
    encoder, late_corpus, tmp_path
):
    clf = make_classifier(encoder, **SHORT, truncation="windows", layers=1)
    clf.set_params(early_stopping=True, checkpoint_dir=tmp_path, checkpoint_every=3)
    clf.fit(*late_corpus)
    assert len(clf.validation_scores_) == 2


def test_how_texts_are_read_is_kept_with_the_adapter(encoder, late_corpus, tmp_path):
    texts, labels = late_corpus
    settings = {"truncation": "windows", "stride": 1, "prompt": "the {text} is"}
    clf = make_classifier(encoder, **SHORT, **settings).fit(texts, labels)
    expected = clf.predict_proba(texts)
    assert clf.adapter_.text_settings == TextSettings(12, **settings)
    clf.save(tmp_path / "saved")
    joblib.dump(clf, tmp_path / "dumped")
    others = [QLoRAClassifier.load(tmp_path / "saved"), joblib.load(tmp_path / "dumped")]
    for other in [*others, clf.set_params(prompt=None, truncation="head", max_length=30)]:
        np.testing.assert_array_equal(other.predict_proba(texts), expected)


def test_prompt_can_be_searched_over(decoder, corpus):
    search = GridSearchCV(
        make_classifier(decoder, num_train_epochs=1),
        {"prompt": [None, "{text}\nLabel:"]},
        cv=2,
        error_score="raise",
    )
    search.fit(*corpus)
    assert search.best_estimator_.adapter_.text_settings.prompt == search.best_params_["prompt"]


@pytest.mark.parametrize("prompt", ["", "Label:", "{text} and {text}", "{Text}"])
def test_prompt_without_one_place_for_the_text_is_refused(encoder, corpus, prompt):
    with pytest.raises(ValueError, match=r"Wanted: a template with one \{text\}"):
        make_classifier(encoder, prompt=prompt).fit(*corpus)


def test_other_braces_of_a_prompt_are_text(decoder, corpus):
    clf = make_classifier(decoder, num_train_epochs=1, prompt='{"text": "{text}", {}').fit(*corpus)
    assert clf.predict(["{text} {}"]).shape == (1,)


@pytest.mark.parametrize(
    "settings",
    [{"prompt": "the {text} is"}, {"truncation": "windows"}, {"truncation": "head+tail"}],
)
def test_formats_that_cannot_hold_it_say_so(encoder, corpus, settings, tmp_path):
    clf = make_classifier(encoder, num_train_epochs=1, pooling="pooler", **settings)
    clf.fit(*corpus)
    with pytest.warns(UserWarning, match=f"{next(iter(settings))}=.* cannot be written"):
        clf.to_transformers()
    with pytest.warns(UserWarning, match=f"{next(iter(settings))}=.* cannot be written"):
        clf.to_peft(tmp_path / "peft")


@pytest.mark.filterwarnings(f"ignore:.*{CUT}")
def test_exported_tokenizer_keeps_the_tail(encoder, late_corpus):
    clf = make_classifier(encoder, **SHORT, truncation="tail", pooling="pooler").fit(*late_corpus)
    model, tokenizer = clf.to_transformers()
    texts = late_corpus[0][:4]
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    probabilities = model(**batch).logits.softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(probabilities, clf.predict_proba(texts), atol=1e-2)
