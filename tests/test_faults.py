"""What goes wrong in the middle of a fit leaves something whole behind."""

import copy
import importlib.metadata
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import (
    assert_equal_adapters,
    digest_of_base,
    draw_damage,
    fit_interrupted,
    make_backbone,
    make_classifier,
    trained_values,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV

from skqlora.model.text_model import TextModel
from skqlora.persistence.saved_format import checksum
from skqlora.training.trainer import Trainer


def spoil_update(monkeypatch, number):
    """Let the n-th update of a training make a weight infinite."""
    apply = Trainer._apply

    def spoiling(self):
        apply(self)
        if self.n_updates + 1 == number:
            self.segments[-1].leaf.data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "_apply", spoiling)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_divergence_keeps_the_last_epoch_before(encoder, corpus, monkeypatch, early_stopping):
    held_out = {"X_val": corpus[0][:9], "y_val": corpus[1][:9]} if early_stopping else {}
    params = {
        "early_stopping": early_stopping,
        "scoring": "loss",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    expected = make_classifier(encoder, num_train_epochs=2, **params).fit(*corpus, **held_out)
    clf = make_classifier(encoder, num_train_epochs=6, **params)
    spoil_update(monkeypatch, 7)  # three updates an epoch: the first of the third
    with pytest.raises(FloatingPointError, match=r"in update 8 \(epoch 3\)") as raised:
        clf.fit(*corpus, **held_out)
    sent = pickle.loads(pickle.dumps(raised.value))  # as a worker process sends it
    assert (type(sent), str(sent)) == (FloatingPointError, str(raised.value))
    assert clf.n_iter_ == 2
    assert clf.loss_curve_ == expected.loss_curve_
    assert clf.validation_scores_ == expected.validation_scores_
    assert_equal_adapters(clf, expected)


def test_divergence_in_the_first_epoch_leaves_an_older_fit(encoder, corpus, monkeypatch):
    clf = make_classifier(encoder, batch_size=1).fit(*corpus)
    before = clf.adapter_
    spoil_update(monkeypatch, 3)
    trained = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows: trained.append(1) or step(self, rows))
    texts, labels = corpus[0] * 10, corpus[1] * 10
    with pytest.raises(FloatingPointError, match=r"in update 4 \(epoch 1\)"):
        clf.fit(texts, labels)
    assert clf.adapter_ is before
    assert len(trained) == 50  # of 480: it is not noticed at once, but soon


def test_an_interrupted_fit_leaves_the_base_and_an_older_fit_alone(model, corpus, monkeypatch):
    clf = make_classifier(model).fit(*corpus)
    expected, base = clf.predict_proba(corpus[0]), make_backbone(model).module
    before = digest_of_base(base)
    step = Trainer.step

    def interrupt(self, rows):
        if self.n_updates == 4:
            raise KeyboardInterrupt
        return step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            clf.fit(*corpus)
    assert digest_of_base(base) == before
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)
    assert_equal_adapters(make_classifier(model).fit(*corpus), clf)


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from helpers import make_classifier
from skqlora.training.trainer import Trainer
import tiny

torch.set_num_threads({n_threads})
step = Trainer.step

def step_or_die(self, rows):
    if self.n_updates == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, rows)

Trainer.step = step_or_die
make_classifier({model!r}, **{params!r}).fit(*tiny.corpus())
"""


@pytest.fixture
def checkpoints(tmp_path):
    """A folder for checkpoints, and twelve updates of which each fourth writes one."""
    folder = tmp_path / "checkpoints"
    return {"checkpoint_dir": str(folder), "checkpoint_every": 4, "batch_size": 12}


@pytest.fixture(scope="module")
def interrupted(tiny_model, corpus, tmp_path_factory):
    """A folder with the checkpoint of a fit, not to be changed."""
    folder = tmp_path_factory.mktemp("interrupted")
    params = {"checkpoint_dir": folder, "checkpoint_every": 4, "batch_size": 12}
    fit_interrupted(make_classifier(tiny_model("bert"), **params), corpus, 5)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": "paged_adamw_8bit", "compute_dtype": "bfloat16", "lora_dropout": 0.3},
        {"optim": "adamw", "early_stopping": True, "scoring": "loss", "random_state": 3},
    ],
    ids=["plain", "8-bit", "early stopping"],
)
@pytest.mark.parametrize("at", [5, 10])
def test_an_interrupted_fit_goes_on_to_the_same_bits(model, corpus, checkpoints, changes, at):
    folder = Path(checkpoints["checkpoint_dir"])
    whole = make_classifier(model, **checkpoints | changes).fit(*corpus)
    assert list(folder.iterdir()) == []
    resumed = make_classifier(model, **checkpoints | changes)
    fit_interrupted(resumed, corpus, at)
    assert len(list(folder.iterdir())) == 1
    made = fit_interrupted(resumed, corpus, None)
    assert made[0] == at // 4 * 4
    assert list(folder.iterdir()) == []
    assert_equal_adapters(resumed, whole)
    assert resumed.loss_curve_ == whole.loss_curve_
    assert resumed.validation_scores_ == whole.validation_scores_


@pytest.mark.parametrize(
    "model", ["bert", pytest.param("llama", marks=pytest.mark.slow)], indirect=True
)
def test_a_killed_process_goes_on_to_the_same_bits(model, corpus, checkpoints):
    params = checkpoints | {"early_stopping": True}
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        model=model,
        params=params,
        n_threads=torch.get_num_threads(),  # the same bits need the same number
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = make_classifier(model, **params)
    assert fit_interrupted(resumed, corpus, None)[0] == 8
    assert_equal_adapters(resumed, make_classifier(model, **params).fit(*corpus))


def test_a_warm_start_that_was_interrupted_goes_on_too(encoder, corpus, checkpoints):
    first = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    params = checkpoints | {"warm_start": True, "num_train_epochs": 3}
    whole = copy.copy(first).set_params(**params).fit(*corpus)
    resumed = copy.copy(first).set_params(**params)
    fit_interrupted(resumed, corpus, 6)
    assert fit_interrupted(resumed, corpus, None)[0] == 4
    assert_equal_adapters(resumed, whole)
    assert resumed.loss_curve_ == whole.loss_curve_


def test_another_fit_does_not_go_on_from_it(encoder, corpus, checkpoints):
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    for params, data in [
        ({"random_state": 1}, corpus),
        ({"learning_rate": 1e-3}, corpus),
        ({}, (corpus[0][::-1], corpus[1][::-1])),
    ]:
        other = make_classifier(encoder, **checkpoints | params)
        assert fit_interrupted(other, data, None)[0] == 0
    assert fit_interrupted(clf.set_params(verbose=0), corpus, None)[0] == 4


def test_checkpoints_in_a_search(encoder, texts, labels, checkpoints):
    search = GridSearchCV(make_classifier(encoder, **checkpoints), {"lora_r": [2, 4]}, cv=2)
    plain = GridSearchCV(make_classifier(encoder, batch_size=12), {"lora_r": [2, 4]}, cv=2)
    assert_equal_adapters(
        search.fit(texts, labels).best_estimator_, plain.fit(texts, labels).best_estimator_
    )


def test_a_damaged_checkpoint_is_named(encoder, corpus, checkpoints):
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    [folder] = Path(checkpoints["checkpoint_dir"]).iterdir()
    (folder / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors.*SHA-256"):
        clf.fit(*corpus)


def test_checkpoints_of_a_package_that_is_not_installed(encoder, corpus, checkpoints, monkeypatch):
    installed = importlib.metadata.version

    def version(package):
        if package == "skqlora":
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    assert fit_interrupted(clf, corpus, None)[0] == 4


def test_checkpoints_need_a_seed_and_tell_another_number_of_threads(encoder, corpus, checkpoints):
    with pytest.raises(ValueError, match=r"checkpoint_dir with random_state=None.*an int"):
        make_classifier(encoder, **checkpoints, random_state=None).fit(*corpus)
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    [folder] = Path(checkpoints["checkpoint_dir"]).iterdir()
    manifest = folder / "checkpoint.json"
    content = json.loads(manifest.read_text()) | {"n_threads": 99}
    del content["checksum"]
    manifest.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.warns(RuntimeWarning, match="computed on 99 threads"):
        clf.fit(*corpus)


def test_divergence_after_a_resume_keeps_the_epochs_before(encoder, corpus, checkpoints):
    recipe = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    clf = make_classifier(encoder, **checkpoints | recipe | {"checkpoint_every": 3})
    fit_interrupted(clf, corpus, 10)  # the last checkpoint is of the third epoch's first update
    with pytest.MonkeyPatch.context() as patch:
        spoil_update(patch, 10)
        with pytest.raises(FloatingPointError, match=r"in update 11 \(epoch 3\)"):
            clf.fit(*corpus)
    recipe |= {"batch_size": 12, "num_train_epochs": 2}
    expected = make_classifier(encoder, **recipe).fit(*corpus)
    assert clf.loss_curve_ == expected.loss_curve_
    assert_equal_adapters(clf, expected)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_fit(encoder, corpus, checkpoints):
    expected = make_classifier(encoder, batch_size=12).fit(*corpus)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/full")

    clf = make_classifier(encoder, **checkpoints)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skqlora.training.checkpoints.written_folder", full)
        with pytest.warns(RuntimeWarning, match="could not be written: .*No space left"):
            clf.fit(*corpus)
    assert_equal_adapters(clf, expected)
    file = Path(checkpoints["checkpoint_dir"]) / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        clf.set_params(checkpoint_dir=file / "below").fit(*corpus)
    with pytest.raises(ValueError, match="the name of a scorer"):
        clf.set_params(scoring=lambda est, X, y: 1.0).fit(*corpus)


def test_what_a_kill_while_writing_left_is_taken_away(encoder, corpus, checkpoints):
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    [folder] = Path(checkpoints["checkpoint_dir"]).iterdir()
    (folder.parent / f".{folder.name}.123.tmp").mkdir()
    clf.fit(*corpus)
    assert list(folder.parent.iterdir()) == []


def test_two_equal_fits_do_not_share_their_checkpoints(encoder, corpus, checkpoints):
    clf = make_classifier(encoder, **checkpoints)
    fit_interrupted(clf, corpus, 5)
    [folder] = Path(checkpoints["checkpoint_dir"]).iterdir()
    before = (folder / "checkpoint.json").read_bytes()
    other = make_classifier(encoder, **checkpoints)
    with (
        FileLock(Path(tempfile.gettempdir()) / f"skqlora-{folder.name}.lock"),  # as a fit has
        pytest.warns(RuntimeWarning, match="Another fit.*continues without"),
    ):
        assert fit_interrupted(other, corpus, None)[0] == 0
    assert (folder / "checkpoint.json").read_bytes() == before
    assert fit_interrupted(clf, corpus, None)[0] == 4
    assert_equal_adapters(clf, other)
    assert list(folder.parent.iterdir()) == []


def test_a_lock_that_cannot_be_had_or_removed_ends_no_fit(encoder, corpus, checkpoints):
    expected = make_classifier(encoder, batch_size=12).fit(*corpus)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("filelock.FileLock.acquire", "skqlora.training.checkpoints.os.unlink"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, refuse)
            clf = make_classifier(encoder, **checkpoints).fit(*corpus)
        assert_equal_adapters(clf, expected)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_happened_to_a_checkpoint_it_is_refused(
    tiny_model, corpus, interrupted, tmp_path_factory, data
):
    copied = shutil.copytree(interrupted, tmp_path_factory.mktemp("fuzzed"), dirs_exist_ok=True)
    [folder] = copied.iterdir()
    file = folder / data.draw(st.sampled_from(["checkpoint.json", "checkpoint.safetensors"]))
    content = file.read_bytes()
    file.write_bytes(draw_damage(data, content))
    hypothesis.assume(file.read_bytes() != content)
    clf = make_classifier(tiny_model("bert"), checkpoint_dir=copied, batch_size=12)
    with pytest.raises(ValueError, match=rf"{file.name}.*delete .* to begin anew"):
        clf.fit(*corpus)


def out_of_memory_above(monkeypatch, n_tokens):
    """Let a forward pass of more tokens, padding included, run out of memory in training."""
    forward = TextModel.forward

    def limited(self, input_ids, attention_mask, *, update=0):
        if self.training and input_ids.numel() > n_tokens:
            raise torch.OutOfMemoryError("injected")
        return forward(self, input_ids, attention_mask, update=update)

    monkeypatch.setattr(TextModel, "forward", limited)


def test_a_fit_out_of_memory_comes_to_the_same(model, corpus, monkeypatch):
    params = {"batch_size": 8, "gradient_accumulation_steps": 2, "lora_dropout": 0.2}
    expected = make_classifier(model, **params).fit(*corpus)
    out_of_memory_above(monkeypatch, 25)
    with pytest.warns(RuntimeWarning, match="Out of memory") as warned:
        recovered = make_classifier(model, **params).fit(*corpus)
    difference = np.abs(trained_values(recovered) - trained_values(expected)).max()
    assert difference < 1e-4 * np.abs(trained_values(expected)).max()
    advice = r"Pass batch_size=(\d+) and gradient_accumulation_steps=(\d+)"
    batch_size, n_passes = map(int, re.search(advice, str(warned[-1].message)).groups())
    assert batch_size * n_passes == 16
    params |= {"batch_size": batch_size, "gradient_accumulation_steps": n_passes}
    assert_equal_adapters(make_classifier(model, **params).fit(*corpus), recovered)  # no warning


def test_after_a_resume_the_batches_that_fit_stay(encoder, corpus, checkpoints):
    params = checkpoints | {"checkpoint_every": 2}
    clf = make_classifier(encoder, **params)
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory_above(patch, 25)
        with pytest.warns(RuntimeWarning, match="Out of memory"):
            fit_interrupted(clf, corpus, 5)
        assert fit_interrupted(clf, corpus, None)[0] == 4  # and no warning
        with pytest.warns(RuntimeWarning, match="Out of memory"):
            whole = make_classifier(encoder, **params).fit(*corpus)
    assert_equal_adapters(clf, whole)
