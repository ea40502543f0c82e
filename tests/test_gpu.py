"""What only a CUDA device shows: paging, float16 and memory. Run with ``pytest -m gpu``."""

import pickle

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny
import torch
from helpers import (
    digest_of_base,
    fit_interrupted,
    lora_parameters,
    make_backbone,
    make_classifier,
    make_model,
    make_settings,
    random_tokens,
    restore_model,
    train,
    trained_values,
)
from joblib import parallel_config
from sklearn.model_selection import cross_val_score
from transformers import AutoModelForSequenceClassification

from skqlora import clear_backbone_cache, estimate_memory
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.model.prediction import predict_outputs
from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.parameters import read_parameters
from skqlora.training.optimizer import PagedPool
from skqlora.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Another process has loaded a base"),  # with pytest -n
]

TARGETS = np.arange(16) % 3
# Llama-shaped, 103 M parameters in linear layers: weights outweigh activations.
MEDIUM = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "dtype": torch.bfloat16,
}


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """Folder of a random Llama that is large enough for memory to be its weights'."""
    return tiny.save_model(tmp_path_factory.mktemp("medium"), "llama", **MEDIUM)


def cuda_backbone(model, **changes):
    settings = {"device": torch.device("cuda", 0), "compute_dtype": torch.bfloat16}
    return make_backbone(model, **settings | changes)


def test_optimizer_state_is_paged_and_its_memory_is_used_again(medium):
    backbone = cuda_backbone(medium)
    places = []
    for _ in range(3):
        model = make_model(backbone)
        with Trainer(model, random_tokens(), TARGETS, make_settings()) as trainer:
            trainer.train_epoch()
            lora, head = (trainer.optimizer.state[s.leaf] for s in trainer.segments)
            assert lora["state1"].is_paged
            assert lora["state2"].is_paged
            assert lora["state1"].abs().max() > 0
            assert not getattr(head["state1"], "is_paged", False)  # smaller than a page is worth
            places.append({lora["state1"].data_ptr(), lora["state2"].data_ptr()})
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_optimizer_goes_on_in_memory_of_its_own(medium, optim):
    model = make_model(cuda_backbone(medium))
    settings = make_settings(optim=optim)
    with Trainer(model, random_tokens(), TARGETS, settings) as trainer:
        trainer.train_epoch()
        state = trainer.optimizer_state()
    with Trainer(model, random_tokens(), TARGETS, settings, resumed=state) as again:
        torch.cuda.synchronize()
        for ours, theirs in zip(again.optimizer_state().states, state.states, strict=True):
            for name, value in theirs.items():
                np.testing.assert_array_equal(ours[name], value)
        moments = again.optimizer.state[again.segments[0].leaf]
        if optim != "adamw":
            assert moments["state1"].is_paged
        again.train_epoch()
        assert again.n_updates == 2


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_cuda_learns_in_bfloat16(model, corpus, optim):
    texts, labels = corpus
    clf = make_classifier(
        model, device="cuda", compute_dtype="auto", optim=optim, num_train_epochs=8, batch_size=4
    )
    clf.fit(texts, labels)
    assert clf.loss_curve_[-1] < 0.7 * clf.loss_curve_[0]
    assert BackboneSpec.of(read_parameters(clf)).compute_dtype == torch.bfloat16


def test_float16_learns_with_a_scaled_loss(model, corpus):
    clf = make_classifier(
        model, device="cuda", compute_dtype="float16", num_train_epochs=8, batch_size=4
    )
    clf.fit(*corpus)
    assert clf.loss_curve_[-1] < 0.7 * clf.loss_curve_[0]


def test_hidden_states_are_bfloat16_and_gradients_float32(model):
    trained = make_model(cuda_backbone(model))
    seen = set()
    for layer in trained.replica.lora_layers:
        layer.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    with Trainer(trained, random_tokens(), TARGETS, make_settings()) as trainer:
        trainer.train_epoch()
        assert seen == {torch.bfloat16}
        assert {p.grad.dtype for p in lora_parameters(trained).values()} == {torch.float32}


def test_cuda_and_cpu_give_the_same_classifier(model, corpus):
    texts, _ = corpus
    cuda = make_classifier(model, device="cuda").fit(*corpus)
    cpu = make_classifier(model).fit(*corpus)
    assert cuda.loss_curve_[0] == pytest.approx(cpu.loss_curve_[0], rel=0.05)
    expected = cuda.predict_proba(texts)
    moved = pickle.loads(pickle.dumps(cuda)).set_params(device="cpu")
    np.testing.assert_allclose(moved.predict_proba(texts), expected, atol=1e-3)


def test_base_is_the_same_bytes_after_a_fit(model, corpus):
    base = cuda_backbone(model).module
    before = digest_of_base(base)
    make_classifier(model, device="cuda", compute_dtype="bfloat16").fit(*corpus)
    assert cuda_backbone(model).module is base
    assert digest_of_base(base) == before


def test_micro_batches_change_nothing(model):
    def adapter(**changes):
        trained = make_model(cuda_backbone(model, compute_dtype=torch.float32), lora_dropout=0.1)
        train(trained, random_tokens(), TARGETS, make_settings(**changes))
        state = trained.adapter_state(TextSettings(32))
        return np.concatenate([v.ravel() for v in state.lora_tensors.values()])

    whole = adapter(batch_size=16)
    parts = adapter(batch_size=4, gradient_accumulation_steps=4)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)


def peak_of(work):
    """Peak CUDA memory in MB of a piece of work that starts with nothing loaded."""
    clear_backbone_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def train_lora(model, quantization, checkpointing=False, longest=32):
    trained = make_model(cuda_backbone(model, quantization=quantization))
    settings = make_settings(gradient_checkpointing=checkpointing)
    train(trained, random_tokens(16, longest), TARGETS, settings)


def train_everything(model):
    full = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=3, dtype=torch.bfloat16, device_map={"": 0}
    )
    optimizer = torch.optim.AdamW(full.parameters())
    inputs = {name: x.cuda() for name, x in random_tokens(16, 32).batch(np.arange(16)).items()}
    labels = torch.as_tensor(TARGETS, device="cuda")
    for _ in range(2):
        full(**inputs, labels=labels).loss.backward()
        optimizer.step()


def test_memory_of_nf4_is_below_16_bit_lora_and_that_below_full_fine_tuning(medium, capsys):
    nf4 = peak_of(lambda: train_lora(medium, "nf4"))
    lora = peak_of(lambda: train_lora(medium, None))
    full = peak_of(lambda: train_everything(medium))
    with capsys.disabled():
        print(f"\npeak: NF4 {nf4:.0f} MB, 16-bit LoRA {lora:.0f} MB, full {full:.0f} MB")
    assert nf4 < 0.8 * lora
    assert lora < 0.5 * full


def test_checkpointing_saves_memory(medium, capsys):
    plain = peak_of(lambda: train_lora(medium, "nf4", longest=256))
    saving = peak_of(lambda: train_lora(medium, "nf4", checkpointing=True, longest=256))
    with capsys.disabled():
        print(f"\npeak: plain {plain:.0f} MB, checkpointed {saving:.0f} MB")
    assert saving < 0.5 * plain


def test_predictions_depend_on_the_batch_by_rounding_alone(medium):
    tokens = random_tokens(32)

    def together_and_alone(model):
        alone = [predict_outputs(model, type(tokens)([ids], 0))[0] for ids in tokens.sequences]
        return predict_outputs(model, tokens), np.array(alone)

    rounding = make_model(cuda_backbone(medium))
    state = rounding.adapter_state(TextSettings(32))
    exact, alone = together_and_alone(
        restore_model(cuda_backbone(medium, compute_dtype=torch.float32), state)
    )
    np.testing.assert_allclose(alone, exact, rtol=0, atol=1e-4)
    together, alone = together_and_alone(rounding)
    assert np.abs(alone - together).max() < 2 * np.abs(together - exact).max()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_base_that_does_not_fit_on_one_gpu_is_spread_over_two(medium, monkeypatch):
    alone = make_model(cuda_backbone(medium), lora_dropout=0.1)
    free = torch.cuda.mem_get_info(0)[0]
    monkeypatch.setattr(
        "skqlora.model.backbone.SHARE_OF_WEIGHTS", 0.6 * alone.backbone.nbytes / free
    )
    both = make_model(cuda_backbone(medium, spread=True), lora_dropout=0.1)
    assert {p.device.index for p in both.encoder.parameters()} == {0, 1}
    assert len(both.replica.segments) == 2
    curves = [train(m, random_tokens(), TARGETS, make_settings()) for m in (alone, both)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-2)
    expected = predict_outputs(alone, random_tokens())
    np.testing.assert_allclose(predict_outputs(both, random_tokens()), expected, atol=5e-2)


def test_second_predict_takes_no_more_memory(model, corpus):
    clf = make_classifier(model, device="cuda").fit(*corpus)
    clf.predict(corpus[0])
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        clf.predict(corpus[0])
    assert torch.cuda.memory_allocated() == before


def test_estimators_that_are_kept_take_no_gpu_memory_paged_or_not(medium, corpus, monkeypatch):
    allocate, paged = bnb.functional.get_paged, []
    monkeypatch.setattr(
        bnb.functional, "get_paged", lambda *a, **k: paged.append(a) or allocate(*a, **k)
    )
    monkeypatch.setattr("skqlora.training.optimizer.paged_pool", PagedPool())

    def fit(seed):
        clf = make_classifier(medium, device="cuda", random_state=seed, num_train_epochs=1)
        return clf.fit(*corpus)

    kept = [fit(seed) for seed in range(2)]
    before, n_paged = torch.cuda.memory_allocated(), len(paged)
    assert n_paged > 0
    kept += [fit(seed) for seed in range(8)]
    assert torch.cuda.memory_allocated() - before < 65536
    assert len(paged) == n_paged


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_estimate_of_memory_is_what_a_fit_takes(medium, quantization, checkpointing):
    clear_backbone_cache()
    torch.cuda.empty_cache()
    words = " ".join(word for topic in tiny.TOPICS.values() for word in topic)
    texts, labels = [words * 20] * 32, [0, 1] * 16  # longer than max_length
    params = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "quantization": quantization,
        "max_length": 128,
        "gradient_checkpointing": checkpointing,
        "num_train_epochs": 1,
    }
    estimated = estimate_memory(**make_classifier(medium, **params).get_params())
    assert (estimated.n_texts, estimated.n_tokens) == (16, 128)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.warns(UserWarning, match="are cut"):
        make_classifier(medium, **params).fit(texts, labels)
    measured = torch.cuda.max_memory_allocated() - before  # managed memory is not in it
    assert 0.95 < estimated.resident / measured < 1.25


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_dtype": "float16"},  # the scale of the loss continues too
        {"compute_dtype": "bfloat16", "optim": "paged_adamw_8bit", "lora_dropout": 0.3},
    ],
    ids=["float16", "8-bit"],
)
def test_an_interrupted_fit_goes_on_to_the_same(model, corpus, tmp_path, changes):
    params = {"device": "cuda", "checkpoint_dir": str(tmp_path), "checkpoint_every": 4}
    params |= changes | {"batch_size": 12}
    whole = make_classifier(model, **params).fit(*corpus)
    resumed = make_classifier(model, **params)
    fit_interrupted(resumed, corpus, 10)
    assert fit_interrupted(resumed, corpus, None)[0] == 8
    expected = trained_values(whole)
    difference = np.abs(trained_values(resumed) - expected).max()
    assert difference < 1e-2 * np.abs(expected).max()  # kernels that add in another order
    np.testing.assert_allclose(resumed.loss_curve_, whole.loss_curve_, rtol=1e-2)


def test_a_fit_that_runs_out_of_memory_goes_on_with_less_at_once(medium):
    words = " ".join(word for topic in tiny.TOPICS.values() for word in topic)
    texts, labels = [f"{words} {words} {words} {word}" for word in words.split()] * 4, [0, 1] * 48
    params = {"device": "cuda", "compute_dtype": "bfloat16", "gradient_checkpointing": False}
    params |= {"batch_size": 48, "num_train_epochs": 1}

    def fit():
        return make_classifier(medium, **params).fit(texts, labels)

    taken = peak_of(fit) * 1e6
    expected = fit()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 0.7 * taken
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.warns(RuntimeWarning, match="Out of memory"):
            recovered = fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(recovered.loss_curve_, expected.loss_curve_, rtol=1e-2)


def test_threads_on_one_gpu_give_what_one_thread_gives(model, corpus):
    clf = make_classifier(model, device="cuda", num_train_epochs=2)
    scores = cross_val_score(clf, *corpus, cv=4, scoring="neg_log_loss")
    with parallel_config(backend="threading", n_jobs=4):
        together = cross_val_score(clf, *corpus, cv=4, scoring="neg_log_loss")
    np.testing.assert_allclose(together, scores, rtol=1e-3)
