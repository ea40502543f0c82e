"""Pairs of texts: encoded, cut and exported as Transformers does it."""

import numpy as np
import pytest
import tiny
import torch
from helpers import ids_of, make_classifier, tokenized, trained_values
from transformers import AutoTokenizer, pipeline

from skqlora import QLoRAClassifier
from skqlora.text.cutting import share_room

PROMPT = "One: {first}\nTwo: {second}\nSame:"


@pytest.fixture(scope="module")
def encoder(typed_encoder):
    """Folder of a tiny BERT that is told of which text a token is."""
    return typed_encoder


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
