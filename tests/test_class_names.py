"""A head that starts from a decoder's output embeddings of the classes' names."""

import ast
import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import transformers
from helpers import make_classifier
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "{text} here is"
LABELS = np.array(["cat", "red", "one_dog"])
HARDLY = {"num_train_epochs": 1, "learning_rate": 1e-12, "head_learning_rate": 1e-12}


def save_causal(folder, family, *, tied):
    """Write a tiny causal language model."""
    tiny.save_model(folder, family)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_first_guess_is_the_language_models_own(family, tied, tmp_path, corpus):
    folder = save_causal(tmp_path, family, tied=tied)
    texts = corpus[0][:6]
    clf = make_classifier(
        folder, quantization=None, prompt=PROMPT, init_head_weights="class_names", **HARDLY
    )
    clf.fit(texts, LABELS[np.arange(6) % 3])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in texts:
        ids = tokenizer(PROMPT.format(text=text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = causal(input_ids=ids).logits[0, -1]
        expected = [
            logits[tokenizer(" " + label.replace("_", " "), add_special_tokens=False)["input_ids"]]
            .mean()
            .item()
            for label in clf.classes_
        ]
        np.testing.assert_allclose(clf.decision_function([text])[0], expected, atol=1e-4)


def test_training_goes_on_from_there(tmp_path, corpus):
    texts, labels = corpus
    folder = save_causal(tmp_path, "llama", tied=False)
    clf = make_classifier(
        folder, init_head_weights="class_names", prompt=PROMPT, num_train_epochs=9
    )
    clf.fit(texts, labels)
    assert clf.score(texts, labels) > 0.9


def test_partial_fit_starts_there_too(tmp_path, corpus):
    texts, labels = corpus
    folder = save_causal(tmp_path, "llama", tied=True)
    first, second = (
        make_classifier(folder, init_head_weights="class_names", prompt=PROMPT, **HARDLY)
        for _ in range(2)
    )
    first.fit(texts, labels)
    second.partial_fit(texts, labels, classes=np.unique(labels))
    heads = [clf.adapter_.head_tensors["weight"] for clf in (first, second)]
    np.testing.assert_allclose(*heads, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [({"pooling": "mean"}, "with pooling='mean'"), ({}, "which is no decoder")],
)
def test_encoders_have_no_guess(encoder, corpus, params, message):
    clf = make_classifier(encoder, init_head_weights="class_names", prompt=PROMPT, **params)
    with pytest.raises(ValueError, match=message):
        clf.fit(*corpus)


@pytest.mark.parametrize("labels", [np.arange(4), np.eye(4, dtype=int), [True, False] * 2])
def test_labels_that_are_no_words_are_refused(decoder, corpus, labels):
    clf = make_classifier(decoder, init_head_weights="class_names", prompt=PROMPT)
    with pytest.raises(ValueError, match="Wanted: one label of type str"):
        clf.fit(corpus[0][:4], labels)


def test_name_without_a_token_is_refused(decoder, corpus):
    clf = make_classifier(decoder, init_head_weights="class_names", prompt=PROMPT)
    with pytest.raises(ValueError, match="Got the class '', of which the tokenizer makes no token"):
        clf.fit(corpus[0][:4], ["", "cat"] * 2)


def test_checkpoint_without_output_embeddings_is_refused(tmp_path, corpus):
    folder = tiny.save_model(tmp_path, "llama", tie_word_embeddings=False)  # the headless model
    clf = make_classifier(folder, init_head_weights="class_names", prompt=PROMPT)
    with pytest.raises(ValueError, match=r"has no lm_head\.weight in its files"):
        clf.fit(*corpus)


def test_name_that_is_no_unicode_is_refused(decoder, corpus):
    labels = ["\ud800" if label == "animal" else label for label in corpus[1]]
    clf = make_classifier(decoder, init_head_weights="class_names", prompt=PROMPT)
    with pytest.raises(ValueError, match=r"Got the class .* no valid Unicode"):
        clf.fit(corpus[0], labels)


def test_a_start_without_a_prompt_is_warned_of_with_one_for_these_columns(tmp_path, corpus):
    texts, labels = corpus
    folder = save_causal(tmp_path, "llama", tied=True)
    clf = make_classifier(folder, init_head_weights="class_names", **HARDLY)
    table = pd.DataFrame({"title": texts, "body": texts})
    with pytest.warns(UserWarning, match="without a prompt") as found:
        clf.fit(table, labels)
    [example] = {re.search(r"e\.g\. ('.*')\.$", str(each.message))[1] for each in found}
    prompt = ast.literal_eval(example)
    assert prompt.endswith("\nLabel:")
    clf.set_params(prompt=prompt).fit(table, labels)  # warnings are errors
    with pytest.warns(UserWarning, match=r"e\.g\. '{text}\\nLabel:'\.$"):
        clf.set_params(prompt=None).fit(texts, labels)


def test_an_encoder_is_refused_without_advice_on_prompts(encoder, corpus):
    with pytest.raises(ValueError, match="no decoder"):
        make_classifier(encoder, init_head_weights="class_names").fit(*corpus)
