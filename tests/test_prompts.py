"""Prompts with a field for each column, and tables without a prompt."""

import datetime

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tiny
from helpers import (
    assert_equal_adapters,
    ids_of,
    make_classifier,
    tokenized,
)

PROMPT = "One: {first}\nTwo: {second}\nSame:"


@pytest.fixture(scope="module")
def encoder(typed_encoder):
    """Folder of a tiny BERT that is told of which text a token is."""
    return typed_encoder


@pytest.fixture(scope="module")
def products():
    """A table with a text, a category, a number, a flag and a date."""
    n = 24
    frame = pd.DataFrame(
        {
            "title": [f"the {tiny.TOPICS['animal'][i % 8]} is here" for i in range(n)],
            "kind": pd.Categorical(["cheap" if i % 2 else "dear" for i in range(n)]),
            "price": [1.5 if i % 2 else 20.25 for i in range(n)],
            "sold": [i % 3 == 0 for i in range(n)],
            "day": pd.date_range("2026-01-01", periods=n),
        }
    )
    return frame, np.arange(n) % 2


def test_a_prompt_puts_columns_where_their_names_are(decoder, products):
    frame, labels = products
    prompt = "{kind!s:>6}: {title} ({price:.1f} EUR, {sold}, {day:%d.%m.%Y}) {{ok}} {0}"
    clf = make_classifier(decoder, num_train_epochs=1, prompt=prompt).fit(frame, labels)
    texts = [
        f"{kind!s:>6}: {title} ({price:.1f} EUR, {sold}, {day:%d.%m.%Y}) {{ok}} {title}"
        for title, kind, price, sold, day in frame.itertuples(index=False, name=None)
    ]
    as_one = make_classifier(decoder, num_train_epochs=1).fit(texts, labels)
    assert_equal_adapters(clf, as_one)
    np.testing.assert_array_equal(clf.predict_proba(frame), as_one.predict_proba(texts))


def test_values_are_printed_as_str_does(decoder):
    values = [3, 2.5, True, datetime.date(2026, 1, 2), np.float32(0.1), np.int64(7), "x{0}"]
    frame = pd.DataFrame({"text": ["a"] * len(values), "value": pd.Series(values, dtype=object)})
    labels = [0, 1] * 3 + [0]
    clf = make_classifier(decoder, num_train_epochs=1, prompt="{text}={value}").fit(frame, labels)
    expected = make_classifier(decoder, num_train_epochs=1).fit(
        [f"a={v!s}" for v in values], labels
    )
    assert_equal_adapters(clf, expected)


def test_braces_in_the_data_are_text(decoder, pairs):
    frame, labels = pairs
    clf = make_classifier(decoder, num_train_epochs=1, prompt=PROMPT).fit(frame, labels)
    odd = pd.DataFrame(
        {"first": ["{second}", "{0}", "{{", "}"], "second": ["{first}", "a", "{", ""]}
    )
    for first, second in odd.itertuples(index=False, name=None):
        (ids,) = ids_of(tokenized("decoder", [(first, second)], prompt=PROMPT)[0])
        text = "One: " + first + "\nTwo: " + second + "\nSame:"
        assert ids == tiny.make_tokenizer("decoder")(text)["input_ids"]
    assert np.isfinite(clf.predict_proba(odd)).all()


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
@pytest.mark.parametrize("truncation", ["head", "tail", "head+tail", "windows"])
def test_a_prompt_with_fields_is_never_cut(truncation):
    words = [word for topic in tiny.TOPICS.values() for word in topic]
    row = "the cat", " ".join(words * 2)
    tokens, _ = tokenized("decoder", [row], max_length=30, truncation=truncation, prompt=PROMPT)
    assert len(tokens) == 1 if truncation != "windows" else len(tokens) > 1
    for ids in ids_of(tokens):
        text = tiny.make_tokenizer("decoder").decode(ids)
        assert len(ids) == 30
        assert text.startswith(" One: the cat\nTwo:")
        assert text.endswith("\nSame:")


def test_tables_without_a_prompt_are_lines(decoder, encoder, pairs, products):
    frame, labels = pairs
    clf = make_classifier(decoder, num_train_epochs=1).fit(frame, labels)
    assert clf.settings_.prompt == "first: {0}\nsecond: {1}"
    lines = [f"first: {a}\nsecond: {b}" for a, b in frame.itertuples(index=False, name=None)]
    assert_equal_adapters(clf, make_classifier(decoder, num_train_epochs=1).fit(lines, labels))
    odd = frame.rename(columns={"first": "a{b}", "second": "c d"})
    odd_lines = [line.replace("first", "a{b}").replace("second", "c d") for line in lines]
    clf.fit(odd, labels)
    assert_equal_adapters(clf, make_classifier(decoder, num_train_epochs=1).fit(odd_lines, labels))
    clf.fit(frame.to_numpy(), labels)
    assert clf.settings_.prompt == "{0}\n{1}"
    numbers = frame.assign(second=np.arange(48))  # a text and a number are no pair of texts
    clf = make_classifier(encoder, num_train_epochs=1).fit(numbers, labels)
    assert clf.settings_.prompt == "first: {0}\nsecond: {1}"
    assert clf.settings_.as_params()["prompt"] == clf.settings_.prompt
    assert "prompt" in str(clf.settings_)
    table, kinds = products
    clf = make_classifier(encoder, num_train_epochs=1).fit(table, kinds)
    assert clf.settings_.prompt.startswith("title: {0}\nkind: {1}\nprice: {2}\n")


@pytest.mark.filterwarnings("error")
def test_columns_without_a_field_are_named_once(decoder, pairs):
    frame, labels = pairs
    table = frame.assign(number=None, empty=np.nan)  # what nobody reads may be anything
    clf = make_classifier(decoder, num_train_epochs=1, prompt="{first} or {second}")
    with pytest.warns(UserWarning, match="no field for 'number', 'empty' of X") as caught:
        clf.fit(table, labels)
    assert len(caught) == 1
    clf.predict(table)


@pytest.mark.parametrize("names", [("1", "2"), ("1", "0"), ("0", "1"), (5, 7), (1, 0)])
def test_columns_that_are_called_by_numbers(decoder, pairs, names):
    frame, labels = pairs
    expected = make_classifier(decoder, num_train_epochs=1, prompt="{0}|{1}").fit(
        frame.to_numpy(), labels
    )
    frame = frame.set_axis(names, axis=1)
    clf = make_classifier(decoder, num_train_epochs=1).fit(frame, labels)
    rows = list(frame.itertuples(index=False, name=None))
    start = [f"{name}: " if isinstance(name, str) else "" for name in names]
    lines = [f"{start[0]}{a}\n{start[1]}{b}" for a, b in rows]
    of_lines = make_classifier(decoder, num_train_epochs=1).fit(lines, labels)
    np.testing.assert_array_equal(clf.predict_proba(frame), of_lines.predict_proba(lines))
    clf.set_params(prompt="{0}|{1}")
    if names in [("1", "2"), ("1", "0"), (1, 0)]:
        with pytest.raises(ValueError, match=r"field \{[01]\}, a position, but another column"):
            clf.fit(frame, labels)
    else:
        assert_equal_adapters(clf.fit(frame, labels), expected)


@pytest.mark.parametrize("name", ["column_names", "columns", "with_format", "shape"])
def test_columns_that_are_called_like_attributes(encoder, pairs, name):
    frame, labels = pairs
    expected = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    frame = frame.rename(columns={"first": name})
    assert_equal_adapters(make_classifier(encoder, num_train_epochs=1).fit(frame, labels), expected)
    single = make_classifier(encoder, num_train_epochs=1).fit(frame[[name]], labels)
    assert single.feature_names_in_.tolist() == [name]


def test_text_decoders_of_vision_models_read_lines(tmp_path, pairs):
    for family in ("qwen2_5_vl", "mllama"):
        tiny.save_whole(tmp_path / family, family)
        clf = make_classifier(str(tmp_path / family), num_train_epochs=1).fit(*pairs)
        assert clf.settings_.prompt == "first: {0}\nsecond: {1}"
        assert clf.settings_.pooling == "last"
    tiny.save_whole(tmp_path / "t5", "t5")
    clf = make_classifier(str(tmp_path / "t5"), num_train_epochs=1).fit(*pairs)
    assert clf.settings_.prompt is None


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
def test_max_length_below_what_the_prompt_takes_is_refused():
    prompt = "the{0}the{1}the"  # which merge to fewer tokens if nothing is between them
    row = "dog dog dog", "red red red"
    whole = ids_of(tokenized("encoder", [row], prompt=prompt)[0])[0]
    for max_length in range(2, len(whole)):
        try:
            tokens, _ = tokenized("encoder", [row], max_length=max_length, prompt=prompt)
        except ValueError as error:
            assert "special tokens take" in str(error)  # noqa: PT017
        else:
            (ids,) = ids_of(tokens)
            text = tiny.make_tokenizer("encoder").decode(ids)
            assert len(ids) == max_length
            assert ids[0] == 1
            assert ids[-1] == 2
            assert text.count("the") == 3


def test_a_prompt_for_a_table_warns_on_one_column(decoder, corpus):
    texts, labels = corpus
    clf = make_classifier(decoder, num_train_epochs=1, prompt="{title}: {text}")
    with pytest.warns(UserWarning, match=r"reads \{title\} as it stands there"):
        clf.fit(texts, labels)


def test_numbers_have_the_digits_that_they_have(decoder):
    values = np.array([0.1, 0.2] * 4, dtype=np.float32)
    frame = pd.DataFrame({"text": ["a"] * 8, "value": values})
    labels = [0, 1] * 4
    expected = make_classifier(decoder, num_train_epochs=1).fit(
        [f"text: a\nvalue: {value}" for value in (0.1, 0.2)] * 4, labels
    )
    for X in (frame, pl.from_pandas(frame), pa.Table.from_pandas(frame)):
        assert_equal_adapters(make_classifier(decoder, num_train_epochs=1).fit(X, labels), expected)


def test_fields_of_one_column(decoder, corpus):
    texts, labels = corpus
    expected = make_classifier(decoder, num_train_epochs=1, prompt="{text} is").fit(texts, labels)
    for prompt, X in [
        ("{0} is", texts),
        ("{review} is", pd.DataFrame({"review": texts})),
        ("{text} is", pd.DataFrame({"review": texts})),
    ]:
        clf = make_classifier(decoder, num_train_epochs=1, prompt=prompt).fit(X, labels)
        assert_equal_adapters(clf, expected)
        np.testing.assert_array_equal(clf.predict_proba(X), expected.predict_proba(texts))
