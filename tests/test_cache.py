"""One base for a process: found, loaded, dropped, and loaded again where its files changed."""

import gc
import re
import weakref
from pathlib import Path
from shutil import copytree, rmtree
from unittest.mock import patch

import pytest
import torch
from helpers import assert_equal_adapters, make_backbone, make_classifier
from sklearn.model_selection import GridSearchCV, cross_validate

import skqlora
from skqlora import backbone_cache_info, clear_backbone_cache
from skqlora.model.replicas import AdaptedReplica


@pytest.fixture(autouse=True)
def empty_cache():
    clear_backbone_cache()


def test_base_is_loaded_once_for_equal_specifications(model):
    first = make_backbone(model)
    assert make_backbone(model) is first
    info = backbone_cache_info()
    assert (info.hits, info.misses, info.n_backbones) == (1, 1, 1)
    assert info.bytes == first.nbytes


@pytest.mark.parametrize(
    "change",
    [
        {"double_quant": False},
        {"quantization": "fp4"},
        {"quantization": None},
        {"compute_dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
        {"revision": "main"},
    ],
    ids=str,
)
def test_whatever_changes_a_base_makes_another(encoder, change):
    assert make_backbone(encoder, **change) is not make_backbone(encoder)
    assert backbone_cache_info().misses == 2


def test_attention_kernel_is_the_one_that_was_asked_for(encoder, corpus):
    eager = make_classifier(encoder, attn_implementation="eager").fit(*corpus)
    (backbone,) = skqlora.model.cache._cache._bases.values()
    assert backbone.module.config._attn_implementation == "eager"
    other = make_classifier(encoder).fit(*corpus)
    assert eager.loss_curve_ == pytest.approx(other.loss_curve_, rel=1e-3)
    with pytest.raises(ValueError, match="cannot be built by transformers"):
        make_classifier(encoder, attn_implementation="fast").fit(*corpus)


def test_bytes_are_those_of_the_tensors(model):
    info = backbone_cache_info()
    assert (info.misses, info.bytes) == (0, 0)
    footprint = make_backbone(model).footprint(0)
    size = footprint.quantized_bytes + footprint.other_bytes
    assert size <= backbone_cache_info().bytes < 1.2 * size


def test_clear_frees_the_bases(model):
    reference = weakref.ref(make_backbone(model).module)
    clear_backbone_cache()
    assert reference() is None
    assert backbone_cache_info() == type(backbone_cache_info())(0, 0, 0, 0)


def test_fitted_classifiers_outlive_their_base(model, corpus):
    clf = make_classifier(model).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    clear_backbone_cache()
    assert (clf.predict_proba(corpus[0]) == expected).all()
    assert backbone_cache_info().misses == 1


def test_base_used_longest_ago_goes_first(tiny_model, monkeypatch):
    folders = [tiny_model(name) for name in ("bert", "electra", "roberta")]
    sizes = [make_backbone(folder).nbytes for folder in folders]
    clear_backbone_cache()
    monkeypatch.setenv("SKQLORA_BACKBONE_CACHE_BYTES", str(sum(sizes) - 1))
    first, second = (make_backbone(folder) for folder in folders[:2])
    make_backbone(folders[0])
    make_backbone(folders[2])
    assert backbone_cache_info().n_backbones == 2
    assert make_backbone(folders[0]) is first
    assert make_backbone(folders[1]) is not second


def test_without_a_setting_half_of_the_memory_is_the_limit(tiny_model, monkeypatch):
    size = make_backbone(tiny_model("bert")).nbytes
    clear_backbone_cache()
    monkeypatch.setattr("skqlora.model.cache._memory", lambda device: size)
    make_backbone(tiny_model("electra"))
    base = make_backbone(tiny_model("bert"))  # larger than half, but used last
    assert backbone_cache_info().n_backbones == 1
    assert make_backbone(tiny_model("bert")) is base


def test_limit_below_one_base_loads_it_again_and_says_so(model, corpus, monkeypatch):
    expected = make_classifier(model).fit(*corpus).predict_proba(corpus[0])
    clear_backbone_cache()
    monkeypatch.setenv("SKQLORA_BACKBONE_CACHE_BYTES", "1e4")
    with pytest.warns(UserWarning, match="is 10000, but model=.* it is not kept and will be"):
        clf = make_classifier(model).fit(*corpus)
    with pytest.warns(UserWarning, match="loaded again at each fit and predict"):
        assert (clf.predict_proba(corpus[0]) == expected).all()
    info = backbone_cache_info()
    assert (info.misses, info.hits, info.n_backbones, info.bytes) == (2, 0, 0, 0)


def test_base_over_the_limit_leaves_the_others_alone(tiny_model, monkeypatch):
    small, large = tiny_model("electra"), tiny_model("bert")
    size = make_backbone(small).nbytes
    assert size < make_backbone(large).nbytes
    clear_backbone_cache()
    monkeypatch.setenv("SKQLORA_BACKBONE_CACHE_BYTES", str(size))
    base = make_backbone(small)
    with pytest.warns(UserWarning, match="it is not kept"):
        make_backbone(large)
    assert make_backbone(small) is base


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_base_that_was_first_used_without_gradients_trains(model, corpus, context):
    expected = make_classifier(model).fit(*corpus)
    clear_backbone_cache()
    with context():
        expected.predict(corpus[0])
        inside = make_classifier(model).fit(*corpus)
    assert_equal_adapters(inside, expected)
    assert_equal_adapters(make_classifier(model).fit(*corpus), expected)
    assert backbone_cache_info().misses == 1


def test_folder_is_one_base_however_its_path_is_written(encoder, corpus, monkeypatch):
    path = Path(encoder)
    monkeypatch.chdir(path.parent)
    for name in (encoder, path, f"{encoder}/", path.name):
        make_classifier(name, num_train_epochs=1).fit(*corpus)
    assert backbone_cache_info().misses == 1


@pytest.mark.parametrize("text", ["8 GB", "-1", "nan"])
def test_limit_that_is_no_number_is_refused_before_a_load(encoder, monkeypatch, text):
    monkeypatch.setenv("SKQLORA_BACKBONE_CACHE_BYTES", text)
    with pytest.raises(ValueError, match=re.escape(f"SKQLORA_BACKBONE_CACHE_BYTES={text!r}")):
        make_backbone(encoder)
    assert backbone_cache_info().misses == 0


def test_nothing_is_kept_of_a_load_that_failed(model, monkeypatch):
    loaded = []

    def fail(module, _):
        loaded.append(weakref.ref(module))
        raise RuntimeError("half-built")

    with monkeypatch.context() as patch:
        patch.setattr("skqlora.model.backbone.freeze", fail)
        with pytest.raises(RuntimeError, match="half-built"):
            make_backbone(model)
    assert backbone_cache_info().n_backbones == 0
    make_backbone(model)
    assert loaded[0]() is None


def test_bases_make_room_where_an_accelerator_is_full(encoder, decoder, monkeypatch):
    from skqlora.model.backbone import Backbone

    load, attempts = Backbone.load, []

    def fail_once(spec):
        attempts.append(backbone_cache_info().n_backbones)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("full")
        return load(spec)

    make_backbone(encoder)
    monkeypatch.setattr(Backbone, "load", fail_once)
    make_backbone(decoder)
    assert attempts == [1, 0]
    monkeypatch.undo()
    clear_backbone_cache()
    monkeypatch.setattr(Backbone, "load", lambda spec: fail_always())
    with pytest.raises(torch.OutOfMemoryError):
        make_backbone(decoder)


def fail_always():
    raise torch.OutOfMemoryError("full")


def test_changed_folder_is_loaded_again(encoder, tiny_model, tmp_path, monkeypatch, corpus):
    folder = tmp_path / "model"
    copytree(encoder, folder)
    monkeypatch.chdir(tmp_path)
    first = make_classifier("model", num_train_epochs=1).fit(*corpus)
    rmtree(folder)
    copytree(tiny_model("electra"), folder)
    second = make_classifier("model", num_train_epochs=1).fit(*corpus)
    assert first.adapter_.fingerprint != second.adapter_.fingerprint
    with pytest.raises(ValueError, match="is not the base that was fitted"):
        first.predict(["text"])
    assert backbone_cache_info().n_backbones == 1  # the files of the other are no more


def test_folder_that_changes_while_it_is_read_is_refused(encoder, tmp_path, monkeypatch):
    from skqlora.checkpoint import fingerprint

    folder = copytree(encoder, tmp_path / "model")
    read = fingerprint._digest_of_values

    def read_and_write(file, name):
        (folder / "training_args.json").write_text(name)
        return read(file, name)

    monkeypatch.setattr(fingerprint, "_digest_of_values", read_and_write)
    with pytest.raises(ValueError, match="changed while it was read"):
        make_backbone(str(folder))
    gc.collect()
    assert backbone_cache_info().n_backbones == 0


def test_search_and_its_estimators_load_one_base_and_inject_once_a_rank(encoder, corpus):
    texts, labels = corpus
    make = AdaptedReplica.__init__
    with patch.object(AdaptedReplica, "__init__", autospec=True, side_effect=make) as injections:
        clf = make_classifier(encoder, num_train_epochs=1)
        GridSearchCV(clf, {"lora_r": [4, 8, 16]}, cv=3, error_score="raise").fit(texts, labels)
        assert injections.call_count == 3
        found = cross_validate(clf, texts, labels, cv=3, return_estimator=True)
        for _ in range(2):
            for estimator in found["estimator"]:
                estimator.predict(texts[:1])
        assert injections.call_count == 3
    assert backbone_cache_info().misses == 1


def test_fits_that_are_thrown_away_leave_no_replica_behind(encoder, corpus):
    def alive():
        gc.collect()
        return sum(type(x) is AdaptedReplica for x in gc.get_objects())

    before = alive()
    for seed in range(4):
        make_classifier(encoder, num_train_epochs=1, random_state=seed).fit(*corpus)
    assert alive() == before + 1
