"""Layers before the first adapted one are computed once for each text."""

import os
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tiny
import torch
from helpers import (
    LORA,
    assert_equal_adapters,
    make_backbone,
    make_classifier,
    make_model,
    make_settings,
    random_tokens,
    train,
    trained_values,
)
from sklearn.model_selection import GridSearchCV
from torch import nn

from skqlora.model.blocks import modules_in_layers, transformer_blocks
from skqlora.model.cache import clear_backbone_cache
from skqlora.model.lora import targeted_modules
from skqlora.training import state_store
from skqlora.training.prefix import cached_prefix
from skqlora.training.state_store import MEMORY_SHARE
from skqlora.training.trainer import Trainer

TARGETS = np.arange(32) % 3
STACKED = [family for family in [*tiny.DECODERS, *tiny.ENCODERS] if family != "albert"]


def last_layers_model(backbone, n_layers=1, **changes):
    """A model with LoRA on the linear modules of the last layers."""
    names = targeted_modules("all-linear", backbone.module)
    chosen = modules_in_layers(names, n_layers, backbone.module)
    return make_model(backbone, replace(LORA, target_modules=chosen), lora_dropout=0.1, **changes)


def trained_from_cache(backbone, tokens, **changes):
    model = last_layers_model(backbone)
    with cached_prefix(model, tokens, 12) as prefix:
        assert prefix is not None
        train(model, tokens, TARGETS, make_settings(num_train_epochs=3, **changes), prefix=prefix)
    return model


@pytest.fixture
def deep(tmp_path):
    """Folder of a tiny BERT of four layers."""
    return tiny.save_model(tmp_path / "deep", "bert", num_hidden_layers=4)


@pytest.fixture
def passes(monkeypatch):
    """Numbers of the layers that compute in trainings, one for each pass."""
    numbers = []
    start = Trainer.train_epoch

    def watch(self, *args):
        blocks = transformer_blocks(self.model.encoder)
        handles = [  # of the first projection within the layer: a layer that is skipped has none
            next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_hook(
                lambda *_, number=number: numbers.append(number)
            )
            for number, block in enumerate(blocks)
        ]
        loss = start(self, *args)
        for handle in handles:
            handle.remove()
        return loss

    monkeypatch.setattr(Trainer, "train_epoch", watch)
    return numbers


@pytest.mark.parametrize("family", STACKED)
def test_training_from_the_cache_equals_training_without(tiny_model, family):
    backbone, tokens = make_backbone(tiny_model(family)), random_tokens(32)
    plain = last_layers_model(backbone)
    start = plain.adapter_state(12)
    train(plain, tokens, TARGETS, make_settings(num_train_epochs=3))
    expected, found = (
        plain.adapter_state(12),
        trained_from_cache(backbone, tokens).adapter_state(12),
    )
    for kind in ("lora_tensors", "head_tensors"):
        for name, value in getattr(expected, kind).items():
            np.testing.assert_allclose(getattr(found, kind)[name], value, rtol=0, atol=3e-5)
            assert np.abs(value - getattr(start, kind)[name]).max() > 1e-3


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"batch_size": 4}])
def test_the_cache_goes_with_checkpointing_and_smaller_passes(backbone, changes):
    tokens = random_tokens(32)
    plain = last_layers_model(backbone)
    changes = {"gradient_accumulation_steps": 16 // changes.get("batch_size", 16)} | changes
    train(plain, tokens, TARGETS, make_settings(num_train_epochs=3))
    found = trained_from_cache(backbone, tokens, **changes).adapter_state(12)
    for name, value in plain.adapter_state(12).lora_tensors.items():
        np.testing.assert_allclose(found.lora_tensors[name], value, rtol=0, atol=3e-5)


def test_a_lent_replica_comes_back_whole(backbone):
    model, tokens = last_layers_model(backbone), random_tokens(32)
    inputs = tokens.batch(np.arange(4))
    with torch.no_grad():
        before = model(**inputs)
        with cached_prefix(model, tokens, 12) as prefix:
            prefix.feed([3, 2, 1, 0])  # other texts
            assert not torch.allclose(model(**inputs), before)
        torch.testing.assert_close(model(**inputs), before, rtol=0, atol=0)


def test_a_fit_computes_the_first_layers_once(deep, corpus, passes):
    clf = make_classifier(deep, layers=1, num_train_epochs=3).fit(*corpus)
    assert passes == [3] * 9
    passes.clear()
    plain = make_classifier(deep, layers=1, num_train_epochs=3, cache_dtype=None).fit(*corpus)
    assert passes == [0, 1, 2, 3] * 9
    np.testing.assert_allclose(trained_values(clf), trained_values(plain), rtol=0, atol=3e-5)


@pytest.mark.parametrize("params", [{"layers": [0, 3]}, {"num_train_epochs": 1, "layers": 1}])
def test_no_cache_where_it_saves_nothing(deep, corpus, passes, params):
    make_classifier(deep, **params).fit(*corpus)
    assert passes[:4] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_fit_is_the_same_whatever_was_fitted_before(tmp_path, family):
    deep = tiny.save_model(tmp_path, family, num_hidden_layers=4)
    rng = np.random.RandomState(0)
    words = [word for topic in tiny.TOPICS.values() for word in topic]
    # Lengths that share a shape, with and without padding.
    texts = np.array([" ".join(rng.choice(words, n)) for n in [*range(10, 40)] * 2], dtype=object)
    labels = np.arange(60) % 3
    params = {"layers": 2, "num_train_epochs": 2}
    clear_backbone_cache()
    alone = make_classifier(deep, **params).fit(texts, labels)
    clear_backbone_cache()
    make_classifier(deep, **params).fit(texts[7:30], labels[7:30])
    make_classifier(deep, **params | {"layers": 1}).fit(texts, labels)
    make_classifier(deep, **params | {"max_length": 8}).fit(texts, labels)
    assert_equal_adapters(make_classifier(deep, **params).fit(texts, labels), alone)


def test_folds_and_candidates_share_the_cache(deep, texts, labels, monkeypatch):
    computed = []
    keep = state_store.keep

    def note(backbone, states):
        computed.extend(states)
        keep(backbone, states)

    monkeypatch.setattr(state_store, "keep", note)
    clf = make_classifier(deep, layers=1, num_train_epochs=2)
    search = GridSearchCV(clf, {"lora_r": [2, 4]}, cv=2, error_score="raise")
    search.fit(texts, labels)
    assert len(computed) == len(set(texts))


def test_a_cache_in_bfloat16(deep, texts, labels):
    params = {"layers": 1, "num_train_epochs": 4}
    exact = make_classifier(deep, **params).fit(texts, labels)
    coarse = make_classifier(deep, **params, cache_dtype="bfloat16").fit(texts, labels)
    difference = np.abs(exact.predict_proba(texts) - coarse.predict_proba(texts)).max()
    assert 0 < difference < 0.02


@pytest.fixture
def no_memory(monkeypatch):
    """Let a file be the only place for what is cached."""
    monkeypatch.setattr("skqlora.training.state_store.free_memory", lambda device: 0)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10, total=10**10)
    )
    clear_backbone_cache()


@pytest.mark.usefixtures("no_memory")
def test_what_is_too_large_for_memory_goes_to_a_file(deep, corpus, passes, monkeypatch):
    files = []
    make = tempfile.TemporaryFile

    def note(*args, **kwargs):
        files.append(make(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", note)
    from_file = make_classifier(deep, layers=1).fit(*corpus)
    assert len(files) == 1
    assert passes == [3] * 9
    # A file is of one fit; what comes later does not depend on it.
    assert_equal_adapters(make_classifier(deep, layers=1).fit(*corpus), from_file)
    assert passes == [3] * 18
    assert state_store._count_kept() == 0
    monkeypatch.undo()
    clear_backbone_cache()
    assert_equal_adapters(from_file, make_classifier(deep, layers=1).fit(*corpus))


@pytest.mark.usefixtures("no_memory")
def test_a_file_where_space_cannot_be_reserved_at_once(deep, corpus, passes, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    make_classifier(deep, layers=1).fit(*corpus)
    assert passes == [3] * 9


def test_memory_for_later_fits_is_bounded(deep, texts, labels, monkeypatch):
    clear_backbone_cache()
    make_classifier(deep, layers=1).fit(texts[:24], labels[:24])
    one_fit = state_store._count_kept()
    # As much as one fit, whatever is held: a second on other texts forgets the first's.
    monkeypatch.setattr(
        "skqlora.training.state_store.free_memory",
        lambda device: one_fit / MEMORY_SHARE - state_store._count_kept(),
    )
    make_classifier(deep, layers=1).fit(texts[20:44], labels[20:44])
    assert 0 < state_store._count_kept() <= one_fit
    clear_backbone_cache()
    assert state_store._count_kept() == 0


def test_threads_share_the_bound(deep, monkeypatch):
    backbone = make_backbone(deep)
    monkeypatch.setattr(
        "skqlora.training.state_store.free_memory", lambda device: 1000 / MEMORY_SHARE
    )
    with (
        state_store.reserved_memory(600, backbone, {}) as first,
        state_store.reserved_memory(600, backbone, {}) as second,
    ):
        assert (first, second) == (True, False)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a disk takes what it is given")
@pytest.mark.usefixtures("no_memory")
def test_a_full_disk_only_makes_it_slower(deep, corpus, passes, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.warns(RuntimeWarning, match=r"There are no 0\.0 GB in .*cache_dtype=None"):
        make_classifier(deep, layers=1).fit(*corpus)
    assert passes == [0, 1, 2, 3] * 9


def test_a_model_whose_layers_hand_on_more_than_hidden_states_is_not_cut(deep):
    backbone = make_backbone(deep)
    model, tokens = last_layers_model(backbone), random_tokens(32)
    blocks = transformer_blocks(model.encoder)
    first, last = blocks[0], blocks[-1]
    made = {}
    forward_of_first, forward_of_last = first.forward, last.forward

    def leave(hidden, *args, **kwargs):
        made["skipped"] = hidden
        return forward_of_first(hidden, *args, **kwargs)

    def take(hidden, *args, **kwargs):
        return forward_of_last(hidden + made["skipped"], *args, **kwargs)

    first.forward, last.forward = leave, take
    with cached_prefix(model, tokens, 12) as prefix:
        assert prefix is None
    assert first.forward is leave
