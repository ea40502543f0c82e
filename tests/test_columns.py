"""Tables of several columns: pairs of texts, and prompts with a field for each column."""

import datetime
import json
import warnings
from decimal import Decimal

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tiny
import torch
from helpers import assert_equal_adapters, fit_interrupted, make_classifier, trained_values
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoTokenizer, pipeline

from skqlora import QLoRAClassifier
from skqlora.settings.adapter_settings import TextSettings
from skqlora.text.cutting import share_room
from skqlora.text.tokenization import CachingTokenizer

PROMPT = "One: {first}\nTwo: {second}\nSame:"


@pytest.fixture(scope="module")
def pairs():
    """Pairs of words, and whether both are of one topic."""
    rng = np.random.RandomState(0)
    topics = list(tiny.TOPICS.values())
    kinds = rng.randint(3, size=(48, 2))
    words = [[topics[kind][rng.randint(8)] for kind in row] for row in kinds]
    frame = pd.DataFrame(words, columns=["first", "second"])
    return frame, np.where(kinds[:, 0] == kinds[:, 1], "same", "other")


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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT with a tokenizer that says of which text a token is."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.save_model(folder, "bert")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(config))
    return str(folder)


def ids_of(tokens):
    return [ids.tolist() for ids in tokens.sequences]


def tokenized(model_or_style, rows, *, max_length=64, **settings):
    """Tokenize rows as a fit does; return their tokens and the number of windows of each."""
    tokenizer = tiny.make_tokenizer(model_or_style)
    settings = TextSettings(max_length, **settings)
    return CachingTokenizer(tokenizer).tokenize(rows, settings, 1000)


# Containers


@pytest.mark.parametrize(
    "convert",
    [
        pl.from_pandas,
        lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
        lambda frame: pa.RecordBatch.from_pandas(frame, preserve_index=False),
        lambda frame: frame.to_numpy(dtype=object),
        lambda frame: frame.to_numpy().astype(str),
        lambda frame: list(frame.itertuples(index=False, name=None)),
        lambda frame: frame.to_numpy().tolist(),
        lambda frame: tuple(map(tuple, frame.to_numpy().tolist())),
        lambda frame: frame.astype("category"),
        lambda frame: pd.DataFrame(frame.to_numpy(), index=range(100, 100 + len(frame))),
    ],
    ids=[
        "polars",
        "pyarrow",
        "batch",
        "object",
        "str",
        "tuples",
        "lists",
        "tuple",
        "category",
        "numbered",
    ],
)
def test_every_kind_of_table_gives_the_same(encoder, pairs, convert):
    frame, labels = pairs
    expected = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    clf = make_classifier(encoder, num_train_epochs=1).fit(convert(frame), labels)
    assert_equal_adapters(clf, expected)
    assert clf.n_features_in_ == 2
    np.testing.assert_array_equal(clf.predict(convert(frame)), expected.predict(frame))


@pytest.mark.filterwarnings("error")
def test_names_are_remembered_and_compared_as_in_scikit_learn(encoder, pairs):
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    assert clf.feature_names_in_.tolist() == ["first", "second"]
    with pytest.raises(ValueError, match="must be in the same order as they were in fit"):
        clf.predict(frame[["second", "first"]])
    with pytest.raises(ValueError, match=r"unseen at fit time:\n- other\n.*yet now missing"):
        clf.predict(frame.rename(columns={"second": "other"}))
    with pytest.raises(ValueError, match="must be in the same order"):
        clf.predict(pl.from_pandas(frame[["second", "first"]]))
    with pytest.raises(ValueError, match="must be in the same order"):
        clf.predict(pa.RecordBatch.from_pandas(frame[["second", "first"]]))
    with (
        pytest.warns(UserWarning, match="valid feature names"),
        pytest.raises(ValueError, match="X has 3 features, but QLoRAClassifier is expecting 2"),
    ):
        clf.predict([("a", "b", "c")])
    with pytest.raises(ValueError, match="one text a row, but QLoRAClassifier was fitted with 2"):
        clf.predict(frame["first"])
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        proba = clf.predict_proba(frame.to_numpy())
    np.testing.assert_array_equal(proba, clf.predict_proba(frame))
    with pytest.warns(UserWarning, match="X has feature names, but QLoRAClassifier was fitted wi"):
        make_classifier(encoder, num_train_epochs=1).fit(frame.to_numpy(), labels).predict(frame)
    with pytest.raises(ValueError, match=r"should match.*\n.*\n- second"):
        clf.set_params(early_stopping=True).fit(frame, labels, X_val=frame[["first"]], y_val=labels)


def test_texts_and_a_table_of_one_column_are_the_same(encoder, corpus):
    texts, labels = corpus
    frame = pd.DataFrame({"text": texts})
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    of_texts = make_classifier(encoder, num_train_epochs=1).fit(texts, labels)
    assert_equal_adapters(clf, of_texts)
    assert clf.feature_names_in_.tolist() == ["text"]
    assert not hasattr(of_texts, "n_features_in_")
    expected = of_texts.predict(texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for X in (texts, frame["text"], frame):
            np.testing.assert_array_equal(clf.predict(X), expected)
            np.testing.assert_array_equal(of_texts.predict(X), expected)
    with pytest.raises(ValueError, match="unseen at fit time"):
        clf.predict(frame.rename(columns={"text": "body"}))
    with pytest.raises(ValueError, match="X has 2 features, but QLoRAClassifier is expecting 1"):
        of_texts.predict([("a", "b")])
    clf.fit(texts, labels)  # which forgets the table
    assert not hasattr(clf, "n_features_in_")
    assert not hasattr(clf, "feature_names_in_")


# Pairs


def test_a_pair_is_encoded_as_the_tokenizer_does_it(encoder, pairs):
    rows = list(pairs[0].itertuples(index=False, name=None))
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokens, counts = tokenized("encoder", rows, token_type_ids=True)
    expected = tokenizer(*map(list, zip(*rows, strict=True)), return_token_type_ids=True)
    assert counts.tolist() == [1] * len(rows)
    for ids, *theirs in zip(
        tokens.sequences, expected["input_ids"], expected["token_type_ids"], strict=True
    ):
        assert ids.tolist() == theirs
    inputs = tokens.batch(np.array([0, 1]))
    assert inputs["token_type_ids"].shape == inputs["input_ids"].shape
    assert not inputs["token_type_ids"][inputs["attention_mask"] == 0].any()


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
@pytest.mark.parametrize("lengths", [(3, 40), (40, 3), (30, 30), (31, 20), (1, 60), (0, 50)])
@pytest.mark.parametrize("max_length", [12, 13, 24])
def test_a_long_pair_is_cut_as_transformers_cuts_it(lengths, max_length):
    first, second = (" ".join(["the cat is here"] * 20).split()[:n] for n in lengths)
    row = " ".join(first), " ".join(second)
    (ids,) = tokenized("encoder", [row], max_length=max_length, token_type_ids=True)[0].sequences
    expected = tiny.make_tokenizer("encoder")(
        *row, truncation=True, max_length=max_length, return_token_type_ids=True
    )
    assert ids[0].tolist() == expected["input_ids"]
    assert ids[1].tolist() == expected["token_type_ids"]


def test_room_is_shared_so_that_the_longest_are_cut_first():
    assert share_room([5, 9], 20) == [5, 9]
    assert share_room([2, 30], 12) == [2, 10]
    assert share_room([30, 2], 12) == [10, 2]
    assert share_room([30, 20], 11) == [6, 5]
    assert share_room([1, 50, 4, 50], 20) == [1, 7, 4, 8]
    assert share_room([9, 9, 9], 2) == [0, 1, 1]


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
@pytest.mark.parametrize("truncation", ["head", "tail", "head+tail"])
def test_each_part_of_a_pair_is_cut_in_its_own_place(truncation):
    words = [word for topic in tiny.TOPICS.values() for word in topic]
    row = " ".join(words[:12]), " ".join(words[12:])
    (ids,) = tokenized("encoder", [row], max_length=19, truncation=truncation)[0].sequences
    tokenizer = tiny.make_tokenizer("encoder")
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in row]
    for part, kept in zip(parts, (ids[1:9], ids[10:18]), strict=True):
        n_head = {"head": 8, "tail": 0, "head+tail": 2}[truncation]
        assert kept.tolist() == part[:n_head] + part[len(part) - (8 - n_head) :]


def test_windows_of_a_pair_keep_the_first_text_whole():
    first, second = "the cat is", " ".join(["one two three four"] * 10)
    tokens, counts = tokenized(
        "encoder", [(first, second)], max_length=16, truncation="windows", token_type_ids=True
    )
    tokenizer = tiny.make_tokenizer("encoder")
    n_first = len(tokenizer(first)["input_ids"])
    assert counts.tolist() == [len(tokens)]
    assert len(tokens) > 2
    for ids in tokens.sequences:
        assert ids.shape == (2, 16)
        assert ids[0, :n_first].tolist() == tokenizer(first)["input_ids"]
        assert ids[1].tolist() == [0] * n_first + [1] * (16 - n_first)
    with pytest.raises(ValueError, match=r"the row \('one.*the first column takes all of max_leng"):
        tokenized("encoder", [(second, first)], max_length=16, truncation="windows")


def test_special_tokens_in_a_pair_are_text():
    rows = [("a </s> b", "c"), ("a", "<s>")]
    special = {1, 2}
    for ids in ids_of(tokenized("encoder", rows)[0]):
        assert ids[0] == 1
        assert [token for token in ids if token in special] == [1, 2, 2]


@pytest.mark.parametrize("family", ["typed", "bert", "roberta", "distilbert", "modernbert"])
def test_encoders_read_pairs(tiny_model, encoder, pairs, family):
    frame, labels = pairs
    folder = encoder if family == "typed" else tiny_model(family)
    clf = make_classifier(folder, num_train_epochs=2).fit(frame, labels)
    assert clf.settings_.prompt is None
    assert clf.adapter_.text_settings.token_type_ids == (family == "typed")
    proba = clf.predict_proba(frame)
    assert not np.allclose(proba, clf.predict_proba(frame.assign(first="red")))
    assert not np.allclose(proba, clf.predict_proba(frame.assign(second="red")))


@pytest.mark.filterwarnings("ignore:prompt=")
def test_logits_are_those_of_transformers(encoder, decoder, pairs):
    frame, labels = pairs
    for model, changes in [(encoder, {"pooling": "pooler"}), (decoder, {"prompt": PROMPT})]:
        clf = make_classifier(model, num_train_epochs=1, **changes).fit(frame, labels)
        theirs, tokenizer = clf.to_transformers()
        rows = list(frame.itertuples(index=False, name=None))
        with torch.no_grad():
            if "prompt" in changes:
                texts = [PROMPT.format(first=a, second=b) for a, b in rows]
                batch = tokenizer(texts, padding=True, return_tensors="pt")
                batch.pop("token_type_ids", None)
            else:
                batch = tokenizer(
                    *map(list, zip(*rows, strict=True)), padding=True, return_tensors="pt"
                )
                assert batch["token_type_ids"].any()
            logits = theirs(**batch).logits.numpy()
        ours = np.log(clf.predict_proba(frame))
        np.testing.assert_allclose(ours - ours[:, :1], logits - logits[:, :1], rtol=0, atol=1e-5)
    pipe = pipeline("text-classification", model=theirs, tokenizer=tokenizer, device="cpu")
    assert pipe(texts[0], top_k=1)[0]["label"] == clf.predict(frame[:1])[0]


def test_an_adapter_of_peft_reads_pairs(encoder, pairs, tmp_path):
    frame, labels = pairs
    clf = make_classifier(encoder, pooling="pooler", num_train_epochs=1).fit(frame, labels)
    clf.to_peft(tmp_path / "peft")
    read = QLoRAClassifier.from_peft(
        tmp_path / "peft", classes=clf.classes_, compute_dtype="float32", device="cpu"
    )
    np.testing.assert_allclose(read.predict_proba(frame), clf.predict_proba(frame), atol=1e-6)
    assert not hasattr(read, "n_features_in_")
    with pytest.raises(ValueError, match="Got 3 columns without a prompt"):
        read.predict([("a", "b", "c")])
    again = read.partial_fit(frame, labels)
    assert again.feature_names_in_.tolist() == ["first", "second"]


def test_layers_before_the_adapters_are_computed_once_for_pairs_too(encoder, pairs):
    frame, labels = pairs
    clf = make_classifier(encoder, layers=1, num_train_epochs=2)
    cached = clf.fit(frame, labels)
    values = trained_values(cached)
    plain = clf.set_params(cache_dtype=None).fit(frame, labels)
    np.testing.assert_allclose(values, trained_values(plain), rtol=1e-3, atol=1e-5)
    # The same tokens without their types are other texts.
    single = [" ".join(row) for row in frame.itertuples(index=False, name=None)]
    clf.set_params(cache_dtype="auto").fit(single, labels)
    np.testing.assert_array_equal(trained_values(clf.fit(frame, labels)), values)


# Prompts


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


# Bad input


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test in which a base is loaded."""

    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.model.backbone.Backbone.load", load)


AB = pd.DataFrame({"a": ["x", "y"], "b": ["u", "v"]})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("X", "prompt", "error", "message"),
    [
        (pd.DataFrame(index=[0, 1]), None, ValueError, "X with 0 columns"),
        (np.empty((2, 0), dtype=object), None, ValueError, "X with 0 columns"),
        (AB[:0], None, ValueError, r"0 sample\(s\)"),
        (
            AB.assign(b=[["u"], ["v"]]),
            None,
            TypeError,
            r"\['u'\] of type list in row 0 of column 'b'",
        ),
        (pd.concat([AB, AB], axis=1), None, ValueError, "several columns named 'a'"),
        (
            AB.rename(columns={"a": 1}),
            None,
            TypeError,
            "only supported if all input features have s",
        ),
        (
            [("x", "u"), ("y",)],
            None,
            ValueError,
            r"X\[0\] with 2 entries and X\[1\] with 1 entries",
        ),
        ([("x", "u"), "yv"], None, ValueError, r"X\[1\] with 'yv'.*same length"),
        (np.zeros((2, 3)), None, ValueError, r"shape \(2, 3\) without any text"),
        (np.zeros((2, 3, 1)), None, ValueError, r"shape \(2, 3, 1\)"),
        (AB.assign(b=["u", None]), None, TypeError, "row 1 of column 'b' of X.*fillna"),
        (AB.assign(b=[1.0, np.nan]), None, TypeError, "nan in row 1 of column 'b'"),
        (
            pl.DataFrame({"a": ["x", None], "b": [1, 2]}),
            None,
            TypeError,
            "None in row 1 of column 'a'",
        ),
        (AB.assign(b=[pd.NaT, pd.NaT]), None, TypeError, "NaT in row 0 of column 'b'"),
        ([("x", None), ("y", "v")], None, TypeError, "None in row 0 of column 1 of X"),
        (AB.assign(b=[b"u", b"v"]), None, TypeError, "b'u' of type bytes in row 0 of column 'b'"),
        (
            [("x", "u"), ("y", "\ud800")],
            None,
            ValueError,
            "row 1 in column 1 of X.*no valid Unicode",
        ),
        (AB, "{a} and {c}", ValueError, r"field \{c\}, which is no column of X.*\{a\}, \{b\}"),
        ([("x", np.timedelta64("NaT")), ("y", "v")], None, TypeError, "NaT.* in row 0 of column 1"),
        ([("x", Decimal("nan")), ("y", "v")], None, TypeError, "NaN.* in row 0 of column 1"),
        (AB, "{text}", ValueError, r"field \{text\}, which is no column of X.*\{a\}, \{b\}"),
        (AB, "{a} {2}", ValueError, r"field \{2\}, which is no column"),
        (AB, "{a} {}", ValueError, r"field \{\}, which is no column"),
        (AB, "no field", ValueError, "with a field|fields with their names"),
        (AB, "{a} {b", ValueError, "expected '}'"),
        (AB, "{a:{b}}", ValueError, "fields with their names"),
        (
            AB.assign(b=[1.0, np.nan]),
            "{a}{b:.1f}",
            TypeError,
            "turn the column into text, with a word",
        ),
        (
            AB.assign(b=[pd.Timestamp(0)] * 2),
            "{a}{b:.2f}",
            ValueError,
            "is no format of a date",
        ),
        ([{"a": "x"}], None, TypeError, r"or pandas\.DataFrame\(X\) for all columns"),
        ({"a": "x", "b": "y"}, None, TypeError, r"Pass pandas\.DataFrame\(\[X\]\) if it is a row"),
        (AB, "{a:.2f}{b}", ValueError, "'x' in row 0 of column 'a' of X.*cannot be formatted"),
        (AB.to_numpy(), "{a} {b}", ValueError, r"which have no names: \{0\} to \{1\}"),
        (AB["a"], "{b}", ValueError, r"a template with one \{text\}"),
    ],
)
def test_bad_tables_are_refused_before_a_model_is_loaded(encoder, X, prompt, error, message):
    with pytest.raises(error, match=message):
        make_classifier(encoder, prompt=prompt).fit(X, ["p", "q"])


def test_a_tokenizer_that_cannot_tell_two_texts_apart_is_refused(encoder, pairs, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ValueError, match="Got two columns but the model's tokenizer cannot say"):
        make_classifier(encoder).fit(*pairs)


# What surrounds an estimator


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompt", [None, PROMPT, "{second:>9}|{first}"])
def test_a_fitted_table_is_saved_and_read(encoder, pairs, prompt, tmp_path):
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1, prompt=prompt).fit(frame, labels)
    expected = clf.predict_proba(frame)
    clf.save(tmp_path / "saved")
    joblib.dump(clf, tmp_path / "dumped")
    for other in [QLoRAClassifier.load(tmp_path / "saved"), joblib.load(tmp_path / "dumped")]:
        np.testing.assert_array_equal(other.predict_proba(frame), expected)
        assert other.feature_names_in_.tolist() == ["first", "second"]
        with pytest.raises(ValueError, match="same order"):
            other.predict(frame[["second", "first"]])
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "['first', 'second']" in card
    assert "clf.predict(X)  # a table with the columns ['first', 'second']" in card
    assert prompt is None or "| prompt |" in card


@pytest.mark.filterwarnings("error")
def test_early_stopping_scores_tables(decoder, pairs):
    frame, labels = pairs
    seen = []

    def scorer(clf, X, y):
        seen.append(X)
        assert (clf.predict(X[:4]) == clf.predict(X)[:4]).all()
        return clf.score(X, y)

    clf = make_classifier(
        decoder, early_stopping=True, prompt="{second:>9}|{first}", num_train_epochs=2
    )
    clf.fit(frame, labels, X_val=frame[:10], y_val=labels[:10])
    assert clf.score(frame[:10], labels[:10]) == clf.best_validation_score_
    clf.set_params(scoring=scorer).fit(frame, labels)
    rows = set(frame.itertuples(index=False, name=None))
    assert all(row in rows for X in seen for row in X)


def test_pieces_and_warm_starts_of_tables(encoder, pairs):
    frame, labels = pairs
    clf = make_classifier(encoder)
    clf.partial_fit(frame[:24], labels[:24], classes=["other", "same"])
    with pytest.raises(ValueError, match="same order"):
        clf.partial_fit(frame[["second", "first"]], labels)
    with pytest.raises(ValueError, match="one text a row"):
        clf.partial_fit(frame["first"], labels)
    clf.partial_fit(frame[24:], labels[24:])
    assert clf.n_samples_seen_ == 48
    assert clf.feature_names_in_.tolist() == ["first", "second"]
    clf.set_params(warm_start=True, num_train_epochs=1).fit(frame, labels)
    assert clf.n_iter_ == 3
    with pytest.raises(ValueError, match="same order"):
        clf.fit(frame[["second", "first"]], labels)


def test_a_fit_of_an_earlier_version_predicts(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    state = vars(clf)
    del state["_columns_"], state["_weight_scale_"]
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)


@pytest.mark.filterwarnings("ignore:The prompt has no field for 'other'")
def test_a_killed_fit_of_a_table_resumes_whatever_is_not_read(encoder, pairs, tmp_path):
    frame, labels = pairs
    params = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, "prompt": "{first}: {second}"}
    expected = make_classifier(encoder, prompt=params["prompt"]).fit(frame, labels)
    clf = make_classifier(encoder, **params)
    made = fit_interrupted(clf, (frame.assign(other=[lambda: 1] * 48), labels), at=5)
    assert made == [0, 1, 2, 3, 4]
    resumed = fit_interrupted(clf, (frame.assign(other=2), labels), at=None)
    assert resumed[0] == 4
    assert_equal_adapters(clf, expected)


@pytest.mark.filterwarnings("ignore:The prompt has no field for 'first'")
def test_tables_go_through_scikit_learn(decoder, pairs):
    frame, labels = pairs
    clf = make_classifier(decoder, num_train_epochs=1, prompt="{first}, {second}?")
    search = GridSearchCV(
        clf, {"prompt": ["{first}, {second}?", "{second}"]}, cv=2, error_score="raise"
    )
    search.fit(frame.assign(second=labels), labels)
    assert set(search.cv_results_["param_prompt"]) == {"{first}, {second}?", "{second}"}
    assert len(cross_val_predict(clf, frame, labels, cv=2)) == len(frame)
    calibrated = CalibratedClassifierCV(clf, cv=2, ensemble=False).fit(frame, labels)
    assert calibrated.predict_proba(frame).shape == (48, 2)
    positions = make_classifier(decoder, num_train_epochs=1)
    bagging = BaggingClassifier(positions, n_estimators=2, random_state=0)
    assert len(bagging.fit(frame, labels).predict(frame)) == 48
    upper = FunctionTransformer(
        lambda table: table.apply(lambda column: column.str.upper()),
        feature_names_out="one-to-one",
    )
    table = ColumnTransformer(
        [("upper", upper, ["second"])], remainder="passthrough", verbose_feature_names_out=False
    ).set_output(transform="pandas")
    pipe = make_pipeline(table, clf).fit(frame, labels)
    assert pipe[-1].feature_names_in_.tolist() == ["second", "first"]
    assert len(pipe.predict(frame)) == 48


def test_permutation_importance_tells_which_column_matters(decoder, pairs):
    frame, _ = pairs
    labels = frame["second"].isin(tiny.TOPICS["animal"]).astype(int)
    clf = make_classifier(decoder, num_train_epochs=8).fit(frame, labels)
    found = permutation_importance(clf, frame, labels, n_repeats=3, random_state=0)
    assert found.importances_mean[1] > 0.2
    assert abs(found.importances_mean[0]) < 0.1


def test_partitions_of_dask_are_tables(encoder, pairs):
    dataframe = pytest.importorskip("dask.dataframe")
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    partitions = dataframe.from_pandas(frame, npartitions=3)
    predicted = partitions.map_partitions(clf.predict, meta=pd.Series(dtype=object))
    assert predicted.compute(scheduler="threads").tolist() == clf.predict(frame).tolist()
