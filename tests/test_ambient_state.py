"""Results do not depend on what a caller has set around a call, and the caller's settings stay."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import assert_equal_adapters, make_classifier

from skqlora import clear_backbone_cache, estimate_memory


@contextmanager
def set_and_reset(setter, value, before):
    """Set something of the process, and set it back."""
    setter(value)
    try:
        yield
    finally:
        setter(before)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: set_and_reset(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: set_and_reset(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: set_and_reset(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": lambda: set_and_reset(torch.use_deterministic_algorithms, True, False),
    "low precision": lambda: set_and_reset(torch.set_float32_matmul_precision, "medium", "highest"),
    "numpy's errors": lambda: np.errstate(all="raise"),
}


def settings_of_torch():
    """What the contexts above change, as torch tells it."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.fixture(scope="module", params=["bert", "gemma3_text"])
def plain(request, tiny_model, corpus):
    """A classifier that was fitted with nothing around it, and what it predicts."""
    folder = tiny_model(request.param)
    clear_backbone_cache()
    clf = make_classifier(folder, num_train_epochs=1, lora_dropout=0.1).fit(*corpus)
    return clf, clf.predict_proba(corpus[0])


@pytest.mark.parametrize("at", ["load", "fit", "predict"])
@pytest.mark.parametrize("ambient", AMBIENT)
def test_the_same_bits(plain, corpus, ambient, at):
    clf, expected = plain
    again = make_classifier(clf.model, num_train_epochs=1, lora_dropout=0.1)
    if at == "load":
        clear_backbone_cache()
    elif at == "predict":
        again.fit(*corpus)
    with AMBIENT[ambient]():
        before = settings_of_torch()
        if at != "predict":
            again.fit(*corpus)
        predicted = again.predict_proba(corpus[0])
        assert settings_of_torch() == before
    assert_equal_adapters(again, clf)
    np.testing.assert_array_equal(predicted, expected)
    np.testing.assert_array_equal(again.predict_proba(corpus[0]), expected)


@pytest.mark.parametrize("ambient", AMBIENT)
def test_estimate_and_export(plain, corpus, tmp_path, ambient):
    clf, _ = plain
    estimate = estimate_memory(clf.model, max_length=32, device="cpu")
    clear_backbone_cache()  # the remembered traces too
    with AMBIENT[ambient]():
        assert estimate_memory(clf.model, max_length=32, device="cpu") == estimate
    if clf.adapter_.pooling == "last":
        model, _ = clf.to_transformers()
        with AMBIENT[ambient]():
            again, _ = clf.to_transformers()
            clf.to_peft(tmp_path / "peft")
            read = type(clf).from_peft(tmp_path / "peft", **clf.get_params())
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
        assert_equal_adapters(read, clf)


def test_threads_that_compute_restore_the_dtype_together(plain, corpus):
    from concurrent.futures import ThreadPoolExecutor

    clf, expected = plain
    with AMBIENT["float64"](), ThreadPoolExecutor(4) as pool:
        for probabilities in pool.map(clf.predict_proba, [corpus[0]] * 20):
            np.testing.assert_array_equal(probabilities, expected)
        assert torch.get_default_dtype() == torch.float64
