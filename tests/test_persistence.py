"""Classifiers on disk: joblib, and folders without pickle that load anywhere or say why not."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import skops.io
import tiny
import torch
from helpers import (
    assert_equal_adapters,
    draw_damage,
    make_backbone,
    make_classifier,
    restore_model,
)
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from sklearn.ensemble import VotingClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoModel

from skqlora import TRUSTED_TYPES, QLoRAClassifier, QLoRARegressor
from skqlora.persistence.saved_format import ALL_FILES, FILES, checksum

DIGEST_OF_VERSION_1 = "095d4af9b9c85dd401d2defbafcd56ba3380bcbe538c0ab488e33295ba457728"
TENSOR_FILES = (FILES.adapter, FILES.head)


@pytest.fixture(scope="module")
def fitted(tiny_model, corpus):
    """A fitted classifier, not to be changed."""
    return make_classifier(tiny_model("bert"), early_stopping=True).fit(*corpus)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    """The folder of a fitted classifier, not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "classifier"
    fitted.save(path)
    return path


@pytest.fixture(scope="module")
def learning(tiny_model, corpus, tmp_path_factory):
    """The folder of a classifier that `partial_fit` goes on with, not to be changed."""
    path = tmp_path_factory.mktemp("learning") / "classifier"
    clf = make_classifier(tiny_model("bert"))
    clf.partial_fit(*corpus, classes=corpus[1]).save(path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    """Such a folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copied")


def adapter_bytes(clf):
    tensors = [*clf.adapter_.lora_tensors.values(), *clf.adapter_.head_tensors.values()]
    return sum(tensor.nbytes for tensor in tensors)


# Pickles


@pytest.mark.parametrize("wrap", ["alone", "pipeline", "search", "voting"])
def test_a_pickle_holds_each_adapter_once_and_no_base(encoder, texts, labels, wrap, tmp_path):
    clf = make_classifier(encoder, lora_r=64, num_train_epochs=1)
    clean = FunctionTransformer(np.asarray)
    estimator, n_adapters = {
        "alone": (clf, 1),
        "pipeline": (make_pipeline(clean, clf), 1),
        "search": (GridSearchCV(clf, {"lora_r": [64]}, cv=2), 1),
        "voting": (VotingClassifier([("a", clf), ("b", clf)], voting="soft"), 2),
    }[wrap]
    estimator.fit(texts, labels)
    file = tmp_path / "estimator.joblib"
    joblib.dump(estimator, file)
    one = adapter_bytes(clf.fit(texts, labels))
    assert n_adapters * one < file.stat().st_size <= n_adapters * one + 64_000
    expected = estimator.predict_proba(texts)
    np.testing.assert_array_equal(joblib.load(file).predict_proba(texts), expected)


@pytest.mark.parametrize("device", ["auto", "cuda:7"])
def test_a_classifier_of_another_machine_loads_here(fitted, texts, tmp_path, device):
    expected = fitted.predict_proba(texts)
    elsewhere = copy.copy(fitted).set_params(device=device)
    joblib.dump(elsewhere, tmp_path / "clf.joblib")
    elsewhere.save(tmp_path / "clf")
    loads = (joblib.load(tmp_path / "clf.joblib"), QLoRAClassifier.load(tmp_path / "clf"))
    for loaded in loads:
        if device == "cuda:7":
            with pytest.raises(ValueError, match=r"device='cuda:7'.*Pass device='auto'"):
                loaded.predict(texts)
        loaded.set_params(device="cpu")
        np.testing.assert_array_equal(loaded.predict_proba(texts), expected)


def test_skops_loads_with_the_types_that_are_to_be_trusted(encoder, corpus, tmp_path):
    texts, labels = corpus
    clf = make_classifier(Path(encoder)).partial_fit(texts, labels, classes=labels)
    reg = QLoRARegressor(encoder, num_train_epochs=1, random_state=0, device="cpu")
    reg.fit(pd.DataFrame({"text": texts}), range(len(texts)))
    found = set()
    for fitted, X in ((clf, texts), (reg, pd.DataFrame({"text": texts}))):
        skops.io.dump(fitted, tmp_path / "fitted.skops")
        found.update(skops.io.get_untrusted_types(file=tmp_path / "fitted.skops"))
        loaded = skops.io.load(tmp_path / "fitted.skops", trusted=TRUSTED_TYPES)
        assert_equal_adapters(loaded, fitted)
        np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert sorted(found) == TRUSTED_TYPES


# Folders


def test_a_fresh_process_predicts_the_same_and_reads_no_base_before(fitted, texts, tmp_path):
    joblib.dump(fitted, tmp_path / "c.joblib")
    fitted.save(tmp_path / "c")
    np.save(tmp_path / "texts.npy", texts.astype(str))
    code = f"""
import sys, joblib, numpy as np
texts = np.load({str(tmp_path / "texts.npy")!r})
pickled = joblib.load({str(tmp_path / "c.joblib")!r})
assert "torch" not in sys.modules
import skqlora
saved = skqlora.QLoRAClassifier.load({str(tmp_path / "c")!r})
try:
    saved.predict("a single text")
except TypeError as error:  # before anything is loaded
    assert "single str" in str(error)
else:
    raise AssertionError
assert "torch" not in sys.modules
np.save({str(tmp_path / "p.npy")!r}, [saved.predict_proba(texts), pickled.predict_proba(texts)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    expected = fitted.predict_proba(texts)
    for found in np.load(tmp_path / "p.npy"):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_everything_fitted_comes_back(fitted, saved):
    loaded = QLoRAClassifier.load(saved)
    assert loaded.get_params() == fitted.get_params()
    assert_equal_adapters(loaded, fitted)
    for name, value in vars(fitted).items():
        if name.endswith("_") and name not in ("adapter_", "classes_", "_target_"):
            assert getattr(loaded, name) == value, name
    assert loaded.adapter_.lora == fitted.adapter_.lora
    assert loaded._target_.identity == fitted._target_.identity
    assert sorted(file.name for file in saved.iterdir()) == sorted(
        set(ALL_FILES) - {FILES.optimizer}
    )


@pytest.mark.parametrize(
    "y",
    [
        np.array(["ä", "b\ud800"] * 24, dtype=object),
        np.array(["x", "yy"] * 24),
        np.array([3, -7] * 24),
        np.array([True, False] * 24),
        np.array([0.1, 1 / 3 + 1] * 24).round(0),
        np.array(["2026-01-01", "2026-01-02"] * 24, dtype="datetime64[D]"),
        np.array([[0, 1], [1, 0]] * 24),
    ],
    ids=["object", "text", "int", "bool", "float", "date", "multilabel"],
)
def test_labels_of_every_dtype_survive(encoder, texts, y, tmp_path):
    clf = make_classifier(encoder, num_train_epochs=1, random_state=1).fit(texts, y)
    clf.save(tmp_path / "clf")
    loaded = QLoRAClassifier.load(tmp_path / "clf")
    assert loaded.classes_.dtype == clf.classes_.dtype
    np.testing.assert_array_equal(loaded.classes_, clf.classes_)
    np.testing.assert_array_equal(loaded.predict(texts), clf.predict(texts))
    assert loaded.predict(texts).dtype == clf.predict(texts).dtype


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw"])
def test_pieces_go_on_after_loading(encoder, corpus, tmp_path, optim):
    weights = {"animal": 2.0, "number": np.float64(0.5)}
    clf = make_classifier(encoder, optim=optim, class_weight=weights, lora_alpha=np.int64(8))
    clf.partial_fit(*corpus, classes=corpus[1]).save(tmp_path / "clf")
    loaded = QLoRAClassifier.load(tmp_path / "clf")
    assert loaded.class_weight == weights
    assert_equal_adapters(clf.partial_fit(*corpus), loaded.partial_fit(*corpus))


def test_a_folder_of_version_1_stays_readable():
    """The folder was written by version 0.1.0 and is never to be written again."""
    clf = QLoRAClassifier.load(Path(__file__).parent / "data" / "saved_version_1")
    assert clf.get_params()["model"] == "organisation/base"
    assert clf.get_params()["class_weight"] == {"animal": 2.0}
    assert clf.classes_.tolist() == ["animal", "colour", "number"]
    assert (clf.n_iter_, clf.n_samples_seen_, clf.multilabel_) == (2, 96, False)
    assert clf.optimizer_state_.n_updates == 6
    assert clf.adapter_.lora.r == 1
    assert len(clf.adapter_.lora_tensors) == 2 * 6 * 2
    digest = hashlib.sha256()
    for tensors in (clf.adapter_.lora_tensors, clf.adapter_.head_tensors):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].tobytes())
    assert digest.hexdigest() == DIGEST_OF_VERSION_1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_peft_loads_the_folder_onto_the_headless_base(model, corpus, tmp_path):
    for case, params in enumerate([{}, {"use_dora": True, "use_rslora": True}]):
        clf = make_classifier(model, quantization=None, **params).fit(*corpus)
        clf.save(tmp_path / f"clf{case}")
        base = AutoModel.from_pretrained(model, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / f"clf{case}").eval()
        ours = restore_model(make_backbone(model, quantization=None), clf.adapter_)
        ids = torch.arange(5, 15)[None]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            np.testing.assert_allclose(
                theirs(input_ids=ids, attention_mask=mask)[0],
                ours.encoder(input_ids=ids, attention_mask=mask)[0],
                rtol=0,
                atol=1e-5,
            )


def test_overwriting_is_asked_for(fitted, copied):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fitted.save(copied)
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        fitted.save(copied, overwrite=True)
    (copied / "notes.txt").unlink()
    (copied / FILES.manifest).rename(copied.parent / "manifest")
    with pytest.raises(FileExistsError, match=r"holds no 'skqlora\.json'"):
        fitted.save(copied, overwrite=True)  # perhaps what PEFT wrote
    (copied.parent / "manifest").rename(copied / FILES.manifest)
    (copied / FILES.head).write_bytes(b"")
    fitted.save(copied, overwrite=True)
    assert_equal_adapters(QLoRAClassifier.load(copied), fitted)


def test_what_needs_pickle_is_refused_and_nothing_is_written(encoder, corpus, tmp_path):
    clf = make_classifier(encoder, random_state=np.random.RandomState(0)).fit(*corpus)
    with pytest.raises(
        ValueError, match=r"random_state=RandomState.*set_params\(random_state=None"
    ):
        clf.save(tmp_path / "clf")
    assert list(tmp_path.iterdir()) == []


# What is damaged, missing or not ours


def edit(folder, change):
    file = folder / FILES.manifest
    manifest = json.loads(file.read_text())
    change(manifest)
    manifest.pop("checksum", None)
    file.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def replace_tensors(folder, name, change):
    """Tamper with tensors, and with their hash too."""
    tensors = safetensors.numpy.load_file(folder / name)
    first = min(tensors)
    tensors[first] = change(tensors[first].copy())
    data = safetensors.numpy.save(tensors)
    (folder / name).write_bytes(data)
    edit(folder, lambda m: m["sha256"].update({name: hashlib.sha256(data).hexdigest()}))


@pytest.mark.parametrize("name", [FILES.manifest, *TENSOR_FILES])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_files_are_named(copied, name, damage):
    file = copied / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    error = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(error, match=name.replace(".", r"\.")):
        QLoRAClassifier.load(copied)


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_swapped_file_is_refused(encoder, copied, corpus, tmp_path, name):
    make_classifier(encoder, random_state=1).fit(*corpus).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, copied / name)
    with pytest.raises(ValueError, match=f"{name}.*SHA-256"):
        QLoRAClassifier.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=5), "format_version is 5.*upgrade skqlora"),
        (lambda m: m.pop("format_version"), "no 'format_version' of type int"),
        (lambda m: m["classes"].update(dtype="V8"), "labels are of"),
        (lambda m: m["classes"]["values"].reverse(), "not sorted"),
        (lambda m: m["classes"]["values"].pop(), r"shape .* for 2 outputs"),
        (lambda m: m["parameters"].update(lora_q=3), "parameter 'lora_q'"),
        (lambda m: m["parameters"].update(lora_r=-3), "'lora_r' parameter"),
        (lambda m: m["adapter"]["lora"].update(r=5), "the rank is 5"),
        (lambda m: m["adapter"]["lora"].update(lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda m: m["adapter"]["lora"].update(use_dora=True), "does not hold A and B of"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(copied, change, message):
    edit(copied, change)
    with pytest.raises(ValueError, match=message):
        QLoRAClassifier.load(copied)


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], "shape"),
        (lambda x: x.astype(np.float16), "float16 instead of float32"),
        (lambda x: np.full_like(x, np.nan), "not finite"),
    ],
)
def test_tampered_tensors_are_refused(copied, name, change, message):
    replace_tensors(copied, name, change)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        QLoRAClassifier.load(copied)


def test_tensors_that_do_not_fit_the_base_are_refused_at_the_prediction(copied, texts):
    replace_tensors(copied, FILES.adapter, lambda x: np.zeros((len(x), x.shape[1] + 1), "f"))
    clf = QLoRAClassifier.load(copied)
    with pytest.raises(ValueError, match=r"lora_A.*shape \(4, .*the base wants"):
        clf.predict(texts)


def test_a_folder_that_is_not_ours_or_not_there(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"skqlora\.json"):
        QLoRAClassifier.load(tmp_path)
    with pytest.raises(NotADirectoryError, match="no folder"):
        QLoRAClassifier.load(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError, match="no folder"):
        QLoRAClassifier.load(saved / FILES.manifest)
    with pytest.raises(FileNotFoundError, match=r"path='mistyped'.*no such folder"):
        QLoRAClassifier.load("mistyped")


def test_saving_first_of_all_prints_nothing(saved, tmp_path):
    code = f"""
from skqlora import QLoRAClassifier
QLoRAClassifier.load({str(saved)!r}).save({str(tmp_path / "again")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_missing_base_is_named_at_the_prediction(copied, texts):
    edit(copied, lambda m: m["parameters"].update(model="/nowhere/base"))
    clf = QLoRAClassifier.load(copied)
    with pytest.raises(ValueError, match=r"/nowhere/base.*does not exist"):
        clf.predict(texts)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_files_hold_only_our_errors_come_out(fitted, saved, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from([FILES.manifest, *TENSOR_FILES]))
    content = draw_damage(data, (saved / name).read_bytes())
    (folder / name).write_bytes(content)
    if name != FILES.manifest:  # past the hash
        digest = hashlib.sha256(content).hexdigest()
        edit(folder, lambda m: m["sha256"].update({name: digest}))
    with contextlib.suppress(ValueError, OSError):
        loaded = QLoRAClassifier.load(folder)
        if name == FILES.manifest:  # its checksum tells
            assert loaded.get_params() == fitted.get_params()
            assert loaded.adapter_.pooling == fitted.adapter_.pooling


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_the_optimizer_file_holds_only_our_errors_come_out(
    learning, tmp_path_factory, data
):
    folder = tmp_path_factory.mktemp("fuzzed")
    content = draw_damage(data, (learning / FILES.optimizer).read_bytes())
    shutil.copytree(learning, folder, dirs_exist_ok=True)
    (folder / FILES.optimizer).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit(folder, lambda m: m["sha256"].update({FILES.optimizer: digest}))
    with contextlib.suppress(ValueError, OSError):
        QLoRAClassifier.load(folder)


def test_pickles_are_not_read(copied):
    (copied / FILES.head).write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ValueError, match="SHA-256"):
        QLoRAClassifier.load(copied)


# Where the base comes from


def test_another_tokenizer_is_refused(tiny_model, texts, labels, tmp_path):
    folder = shutil.copytree(tiny_model("bert"), tmp_path / "base")
    clf = make_classifier(str(folder), num_train_epochs=1).fit(texts, labels)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer of model=.*fingerprint .*fingerprint"):
        clf.predict(texts)
    # Files that differ in nothing that counts are the same tokenizer.
    del tokenizer["normalizer"]
    file.write_text(json.dumps(tokenizer, indent=4))
    assert clf.predict(texts).shape == (48,)


HUB = """
import sys, pickle, numpy as np
from pathlib import Path
from skqlora import QLoRAClassifier
sys.path.insert(0, {tests!r})
from helpers import make_classifier
import tiny
cache, work = Path({cache!r}), Path({work!r})
texts, labels = tiny.corpus()

def point_main_to(commit):
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / "main").write_text(commit)

if sys.argv[1] == "fit":
    point_main_to("a" * 40)
    clf = make_classifier("me/tiny", num_train_epochs=1).fit(texts, labels)
    assert clf.adapter_.revision == "a" * 40
    clf.save(work / "clf")
    np.save(work / "p.npy", clf.predict_proba(texts))
    assert '"revision": "' + "a" * 40 in (work / "clf" / "adapter_config.json").read_text()
else:
    point_main_to("b" * 40)
    clf = QLoRAClassifier.load(work / "clf")
    np.testing.assert_array_equal(clf.predict_proba(texts), np.load(work / "p.npy"))
    clf.set_params(warm_start=True).fit(texts, labels)
    assert clf.adapter_.revision == "a" * 40
    fresh = make_classifier("me/tiny", num_train_epochs=1).fit(texts, labels)
    assert fresh.adapter_.revision == "b" * 40
    assert fresh.adapter_.fingerprint != clf.adapter_.fingerprint
"""


def test_the_commit_of_the_hub_is_pinned(tmp_path):
    cache = tmp_path / "hub" / "models--me--tiny"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        tiny.save_model(cache / "snapshots" / commit, "bert", num_hidden_layers=1 + number)
    code = HUB.format(tests=str(Path(tiny.__file__).parent), cache=str(cache), work=str(tmp_path))
    for step in ("fit", "load"):
        subprocess.run(
            [sys.executable, "-c", code, step],
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")},
            check=True,
        )


def test_the_hub_gets_what_save_writes_and_load_reads_it(fitted, texts, tmp_path, monkeypatch):
    class Hub:
        """What `push_to_hub` needs of the Hub, in a folder."""

        def create_repo(self, repo_id, *, private, exist_ok):
            assert private
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            assert set(delete_patterns) == set(ALL_FILES)
            shutil.copytree(folder_path, tmp_path / repo_id)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, revision, allow_patterns):
        assert set(os.listdir(tmp_path / repo_id)) <= set(allow_patterns)
        return str(tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.warns(UserWarning, match="a folder of this machine, and its path .* is published"):
        assert fitted.push_to_hub("clf", private=True) == "https://hub/me/clf/commit/1"
    assert_equal_adapters(QLoRAClassifier.load("me/clf"), fitted)
    card = ModelCard.load(tmp_path / "me" / "clf" / FILES.model_card)
    assert card.data.library_name == "skqlora"
    assert 'QLoRAClassifier.load("me/clf")' in card.text
    assert "validation score" in card.text


def test_into_the_current_folder(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted.save(".")
    fitted.save(".", overwrite=True)
    assert_equal_adapters(QLoRAClassifier.load("."), fitted)
    assert f'load("{tmp_path.name}")' in (tmp_path / FILES.model_card).read_text()
    assert set(os.listdir(tmp_path)) <= set(ALL_FILES)


def test_load_while_another_process_saves(fitted, tmp_path):
    path = tmp_path / "clf"
    fitted.save(path)
    script = (
        "import sys; from skqlora import QLoRAClassifier\n"
        "for name in sys.argv[2:] * 50:\n"
        "    QLoRAClassifier.load(name).save(sys.argv[1], overwrite=True)\n"
    )
    other = QLoRAClassifier.load(path).set_params(verbose=0)
    other.n_samples_seen_ = 12345
    other.optimizer_state_ = None
    fitted.save(tmp_path / "a")
    other.save(tmp_path / "b")
    command = [sys.executable, "-c", script, *map(str, (path, tmp_path / "a", tmp_path / "b"))]
    seen = set()
    with subprocess.Popen(command) as writer:
        while writer.poll() is None:
            seen.add(QLoRAClassifier.load(path).n_samples_seen_)
    assert writer.returncode == 0
    assert seen == {fitted.n_samples_seen_, 12345}


def test_relative_path_of_a_base_is_found_from_another_folder(
    encoder, corpus, tmp_path, monkeypatch
):
    shutil.copytree(encoder, tmp_path / "here" / "models" / "base")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    clf = make_classifier("./models/base", num_train_epochs=1).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    clf.save("saved")
    joblib.dump(clf, "clf.joblib")
    monkeypatch.chdir(tmp_path / "there")
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)
    clf.save("again")
    for again in (
        QLoRAClassifier.load("../here/saved"),
        QLoRAClassifier.load("again"),
        joblib.load("../here/clf.joblib"),
    ):
        assert again.get_params()["model"] == "./models/base"
        np.testing.assert_array_equal(again.predict_proba(corpus[0]), expected)
        again.set_params(warm_start=True).fit(*corpus)
    with pytest.raises(ValueError, match="is a folder that does not exist"):
        clf.set_params(model="./models/other").predict(corpus[0])


def test_adapters_of_version_1_parse_special_tokens(fitted, tmp_path):
    fitted.save(tmp_path / "clf")
    assert not QLoRAClassifier.load(tmp_path / "clf").adapter_.text_settings.parse_special_tokens
    edit(tmp_path / "clf", lambda m: m["adapter"].pop("parse_special_tokens"))
    again = QLoRAClassifier.load(tmp_path / "clf")
    assert again.adapter_.text_settings.parse_special_tokens
    text = ["a </s> b"]
    assert (again.predict_proba(text) != fitted.predict_proba(text)).any()
