"""Texts to token ids, remembered."""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.template import Template
from skqlora.text.encoding import RowEncoder
from skqlora.text.tokenization import CachingTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("encoder")


def tokenize(tokenizer, texts, max_length, vocab_size):
    return encode(tokenizer, texts, vocab_size, max_length=max_length)[0]


def encode(tokenizer, texts, vocab_size=1000, **settings):
    return CachingTokenizer(tokenizer).tokenize(texts, TextSettings(**settings), vocab_size)


def test_long_text_loses_its_end_but_not_its_closing_token(tokenizer):
    text = "the cat is here " * 20
    whole = tokenizer(text)["input_ids"]
    (cut,) = tokenize(tokenizer, [text], max_length=10, vocab_size=1000).sequences
    assert cut.tolist() == [*whole[:9], whole[-1]]


def test_cut_equals_the_tokenizers_own_truncation(tokenizer):
    text = "I saw a horse and a bird " * 10
    (cut,) = tokenize(tokenizer, [text], max_length=17, vocab_size=1000).sequences
    assert cut.tolist() == tokenizer(text, truncation=True, max_length=17)["input_ids"]


def test_truncation_settings_of_the_tokenizer_do_not_matter(tmp_path):
    tokenizer = tiny.make_tokenizer("encoder")
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    reloaded.backend_tokenizer.enable_truncation(4)
    reloaded.backend_tokenizer.enable_padding(length=50)
    texts = ["the cat is here and the dog too", "a"]
    expected = tokenize(tokenizer, texts, 64, 1000).sequences
    for ours, theirs in zip(tokenize(reloaded, texts, 64, 1000).sequences, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_closing_token_is_kept_also_where_short_texts_are_normalized_away(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    strict = type(tokenizer).from_pretrained(tmp_path)
    strict.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    (cut,) = tokenize(strict, ["the cat is here " * 20], max_length=10, vocab_size=1000).sequences
    assert (len(cut), cut[-1]) == (10, strict.eos_token_id)


@pytest.mark.parametrize("style", ["encoder", "decoder"])
def test_empty_text_has_a_token(style):
    tokens = tokenize(tiny.make_tokenizer(style), ["", "cat"], max_length=10, vocab_size=1000)
    assert (tokens.lengths >= 1).all()


def test_max_length_without_room_for_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=2 but the tokenizer adds 2 special tokens"):
        tokenize(tokenizer, ["cat"], max_length=2, vocab_size=1000)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="only 100 token embeddings"):
        tokenize(tokenizer, ["the cat is here"], max_length=10, vocab_size=100)


def counting(tokenizer, **options):
    """A caching tokenizer, and a mock of the one that it calls."""
    spy = Mock(wraps=tokenizer, is_fast=True)
    names = "pad_token_id", "bos_token_id", "eos_token_id", "all_special_tokens"
    for name in (*names, "added_tokens_decoder"):
        setattr(spy, name, getattr(tokenizer, name))
    return CachingTokenizer(spy, **options), spy


def n_encoded(spy):
    return sum(len(call.args[0]) for call in spy.call_args_list)


def test_a_text_is_tokenized_once(tokenizer, corpus):
    texts = sorted(set(corpus[0]))
    caching, spy = counting(tokenizer)
    first, _ = caching.tokenize(texts[:20] * 2, TextSettings(32), 1000)
    again, _ = caching.tokenize(texts[10:], TextSettings(32), 1000)
    assert n_encoded(spy) == len(texts)
    expected = tokenize(tokenizer, texts, 32, 1000).sequences
    for ours, theirs in zip(first.sequences[20:], expected[:20], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(again.sequences, expected[10:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_max_length_is_another_cut(tokenizer):
    caching, _ = counting(tokenizer)
    text = "the cat is here " * 10
    assert [
        caching.tokenize([text], TextSettings(n), 1000)[0].lengths[0] for n in (10, 20, 10)
    ] == [10, 20, 10]


def test_memory_is_bounded_and_the_text_used_longest_ago_goes_first(tokenizer):
    caching, spy = counting(tokenizer, max_bytes=1500)
    for text in ("one", "two", "three", "one", "four", "five", "one"):
        caching.tokenize([text], TextSettings(32), 1000)
        assert caching._n_bytes <= 1500
    assert n_encoded(spy) == 5
    caching.tokenize(["two"], TextSettings(32), 1000)
    assert n_encoded(spy) == 6


def test_a_pass_over_more_text_than_fits_pushes_nothing_out(tokenizer):
    caching, spy = counting(tokenizer, max_bytes=2000)
    caching.tokenize(["cat"], TextSettings(32), 1000)
    caching.tokenize([f"number {i}" for i in range(100)], TextSettings(32), 1000)
    caching.tokenize(["cat"], TextSettings(32), 1000)
    assert n_encoded(spy) == 101


def test_threads_get_their_own_texts(tokenizer):
    caching, _ = counting(tokenizer, max_bytes=20_000)
    texts = [f"the {word} of number {i}" for i in range(60) for word in ("cat", "dog")]
    expected = tokenize(tokenizer, texts, 12, 1000).sequences
    rows = [np.random.RandomState(i).permutation(len(texts))[:40] for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(
            lambda r: caching.tokenize([texts[i] for i in r], TextSettings(12), 1000)[0], rows
        )
        for chosen, result in zip(rows, results, strict=True):
            for row, ids in zip(chosen, result.sequences, strict=True):
                np.testing.assert_array_equal(ids, expected[row])


def test_a_worker_with_one_thread_tokenizes_on_one(tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    caching, spy = counting(tokenizer)
    caching.tokenize(["a cat", "a dog"], TextSettings(32), 1000)
    assert [call.args[0] for call in spy.call_args_list] == [["a cat"], ["a dog"]]


# Long texts


@pytest.fixture
def long_text():
    return " ".join(f"{word}{number}" for number in range(10) for word in ("cat", "dog"))


def of_text(tokenizer, ids):
    """The ids between one opening and one closing token, which must be there."""
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return ids[1:-1].tolist()


@pytest.mark.parametrize(("truncation", "n_head"), [("head", 10), ("tail", 0), ("head+tail", 2)])
def test_truncation_says_what_is_kept_of_a_long_text(tokenizer, long_text, truncation, n_head):
    whole = tokenizer(long_text)["input_ids"][1:-1]
    tokens, counts = encode(tokenizer, ["a cat", long_text], max_length=12, truncation=truncation)
    kept = of_text(tokenizer, tokens.sequences[1])
    assert kept == whole[:n_head] + whole[len(whole) - 10 + n_head :]
    assert counts.tolist() == [1, 1]
    assert tokens.sequences[0].tolist() == tokenizer("a cat")["input_ids"]


@pytest.mark.parametrize("stride", [0, 3, 5])
def test_windows_hold_the_whole_text_and_share_stride_tokens(tokenizer, long_text, stride):
    whole = tokenizer(long_text)["input_ids"][1:-1]
    tokens, counts = encode(
        tokenizer, [long_text, "a cat"], max_length=12, truncation="windows", stride=stride
    )
    assert counts.tolist() == [len(tokens) - 1, 1]
    windows = [of_text(tokenizer, ids) for ids in tokens.sequences[:-1]]
    assert [len(window) for window in windows] == [10] * counts[0]
    starts = [*range(0, len(whole) - 10, 10 - stride), len(whole) - 10]
    assert windows == [whole[start : start + 10] for start in starts]


def test_stride_of_more_than_half_a_window_is_refused(tokenizer):
    with pytest.raises(ValueError, match="stride=6 but a window of max_length=12 holds 10"):
        encode(tokenizer, ["a"], max_length=12, truncation="windows", stride=6)


@pytest.mark.parametrize("truncation", ["head", "tail", "head+tail", "windows"])
def test_text_of_special_tokens_alone_is_cut(tokenizer, truncation):
    text = tokenizer.eos_token * 50
    tokens, _ = encode(tokenizer, [text], max_length=12, truncation=truncation)
    assert tokens.lengths.max() <= 12


# Prompts

PROMPT = "the text: {text} the label:"


@pytest.mark.parametrize("style", ["encoder", "decoder"])
def test_prompt_surrounds_the_text(style):
    tokenizer = tiny.make_tokenizer(style)
    (ids,) = encode(tokenizer, ["a cat"], max_length=64, prompt=PROMPT)[0].sequences
    assert ids.tolist() == tokenizer("the text: a cat the label:")["input_ids"]


@pytest.mark.parametrize("truncation", ["head", "tail", "head+tail", "windows"])
@pytest.mark.parametrize("style", ["encoder", "decoder"])
def test_only_the_text_is_cut_and_never_its_prompt(style, truncation, long_text):
    tokenizer = tiny.make_tokenizer(style)
    opening, closing = (part.strip() for part in PROMPT.split("{text}"))
    n_opening = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    n_closing = len(tokenizer(" " + closing, add_special_tokens=False)["input_ids"])
    whole = tokenizer(PROMPT.replace("{text}", long_text))["input_ids"]
    tokens, _ = encode(tokenizer, [long_text], max_length=30, prompt=PROMPT, truncation=truncation)
    for ids in tokens.sequences:
        assert len(ids) <= 30
        assert ids[:n_opening].tolist() == whole[:n_opening]
        assert ids[-n_closing:].tolist() == whole[-n_closing:]


def test_prompt_without_room_for_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the prompt and 2 special tokens take"):
        encode(tokenizer, ["a"], max_length=5, prompt=PROMPT)


def test_prompt_wants_a_tokenizer_that_tells_where_tokens_come_from(tokenizer):
    _, spy = counting(tokenizer)
    spy.is_fast = False
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        encode(spy, ["a"], max_length=50, prompt=PROMPT)


def trained_tokenizer(pre_tokenizer, decoder):
    """A BPE tokenizer of a few hundred pieces, as decoders have, without special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    words = ["the", "movie", "was", "great", "and", "bad", "Review", "Label", "one", "two", "three"]
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\u2581", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(words)] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


STYLES = {
    "qwen": (
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
        decoders.ByteLevel(),
    ),
    "gpt2": (
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True),
        decoders.ByteLevel(),
    ),
    "llama": (pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
}


@pytest.mark.parametrize("truncation", ["head", "tail", "head+tail", "windows"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "text",
    [
        "one two three " * 10,
        "one two three" + " " * 60,
        " " * 60 + "one two three",
        " " * 80,
        "great. " * 15 + "bad.",
    ],
)
@pytest.mark.parametrize("template", ["Review: {text}\nLabel:", "{text}\nLabel:", "the {text} was"])
def test_prompt_is_whole_whatever_the_tokenizer_makes_of_spaces(style, text, template, truncation):
    tokenizer = trained_tokenizer(*STYLES[style])
    whole = tokenizer(template.format(text=text))["input_ids"]
    opening, closing = template.split("{text}")
    tokens, counts = encode(
        tokenizer, [text, "great"], max_length=18, prompt=template, truncation=truncation, stride=2
    )
    assert counts[0] >= 1
    assert counts[1] == 1
    for ids in tokens.sequences:
        assert len(ids) <= 18
    n_windows = int(counts[0])
    for ids in tokens.sequences[:n_windows]:
        decoded = tokenizer.decode(ids).replace(" ", "")
        assert decoded.startswith(opening.replace(" ", ""))
        assert decoded.endswith(closing.replace(" ", ""))
    if truncation == "windows" and len(whole) > 18:
        assert all(len(ids) == 18 for ids in tokens.sequences[:n_windows])


@pytest.mark.parametrize("style", STYLES)
def test_first_word_of_the_text_is_cut_as_the_others_are(style):
    tokenizer = trained_tokenizer(*STYLES[style])
    text = "great " + "one two three " * 10
    tokens, _ = encode(
        tokenizer, [text], max_length=14, prompt="Review: {text}\nLabel:", truncation="tail"
    )
    assert "great" not in tokenizer.decode(tokens.sequences[0]).replace(" ", "")


def ids_of(tokens):
    return [row.tolist() for row in tokens.sequences]


@pytest.mark.parametrize("style", ["encoder", "decoder"])
@pytest.mark.parametrize("prompt", [None, "Text: {text}\nKind:", "<s>a {text} b</s> c"])
def test_special_tokens_in_a_text_are_text(style, prompt):
    tokenizer = tiny.make_tokenizer(style)
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<mask>")}
    texts = ["the </s> cat", "<mask>", "the cat", "<s>"]
    parsed, _ = encode(tokenizer, texts, max_length=64, prompt=prompt, parse_special_tokens=True)
    plain, _ = encode(tokenizer, texts, max_length=64, prompt=prompt)
    parsed, plain = ids_of(parsed), ids_of(plain)
    assert plain[2] == parsed[2]
    own = [token for token in plain[2] if token in special]  # of the prompt and around the text
    for row in plain:
        assert [token for token in row if token in special] == own
    assert all(row != other for row, other in zip(plain[::3], parsed[::3], strict=True))
    decoded = tokenizer.decode([token for token in plain[0] if token not in special])
    assert "the </s> cat" in decoded


@pytest.mark.parametrize("truncation", ["head", "tail", "windows"])
def test_long_text_of_special_tokens_keeps_the_prompt(tokenizer, truncation):
    text, prompt = "</s> cat " * 20, "<s>a {text} b</s> c"
    settings = {"max_length": 24, "prompt": prompt, "truncation": truncation}
    tokens, counts = encode(tokenizer, [text], **settings)
    whole = ids_of(encode(tokenizer, ["cat"], max_length=64, prompt=prompt)[0])[0]
    assert counts[0] == len(tokens)
    for row in ids_of(tokens):
        assert len(row) == 24
        assert row[:3] == whole[:3]
        assert row[-3:] == whole[-3:]


@pytest.mark.parametrize("style", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "prompt",
    ["<s>Text:{text}</s>", "<s>\n{text}\n</s>", "<s> {text} </s>", "a<s>{text}", "{text}</s> b"],
)
def test_both_ways_to_encode_a_text_in_a_prompt_agree(style, prompt):
    tokenizer = tiny.make_tokenizer(style)
    encoder = RowEncoder(tokenizer)
    for text in ("cat", " the cat", "c at\n", "a red dog is here"):
        template = Template.of_one_text(prompt)
        [(expected, part_of)] = encoder._encode(tokenizer, [text], template)
        found = encoder._as_text(text, template, types=False)
        assert found.ids.tolist() == expected.tolist()
        assert found.part_of.tolist() == part_of.tolist()


@pytest.mark.parametrize("style", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "prompt",
    [
        "{0}</s>{1}",
        "<s>the {0}</s> <s> {1}</s>",
        "{0} and {1}</s>{0}",
        "a</s><s>{1}<s>b</s>c{0}",
        "<s>{0} is\n{1}</s>",
    ],
)
def test_both_ways_to_encode_several_fields_agree(style, prompt):
    tokenizer = tiny.make_tokenizer(style)
    encoder = RowEncoder(tokenizer)
    template = Template.of_columns(prompt)
    for texts in [("cat", "dog"), ("the cat is", ""), ("a red", "dog is here\n")]:
        parts = tuple(texts[int(field.key)] for field in template.fields)
        [(expected, part_of)] = encoder._encode(tokenizer, [parts], template)
        found = encoder._as_text(parts, template, types=False)
        assert found.ids.tolist() == expected.tolist()
        assert found.part_of.tolist() == part_of.tolist()


def test_special_tokens_that_match_in_other_letters_are_text():
    backend = Tokenizer.from_str(tiny.make_tokenizer("decoder").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<cut>", special=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    special = tokenizer.convert_tokens_to_ids("<cut>")
    tokens, _ = encode(tokenizer, ["a <CUT> b", "a <cut> b"], max_length=32)
    assert not any(special in row for row in ids_of(tokens))
