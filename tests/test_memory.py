"""What a fit takes is told before it, and what cannot fit is refused."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tiny
import torch
from helpers import LORA, make_backbone, make_classifier, make_model
from torch.autograd.graph import saved_tensors_hooks

import skqlora.memory.planning
from skqlora import estimate_memory
from skqlora.checkpoint.architecture import check_architecture
from skqlora.memory.estimate import estimate_training
from skqlora.memory.free import free_memory
from skqlora.memory.planning import AUTO_SHARE, REFUSED_SHARE
from skqlora.model.backbone import _count_bytes
from skqlora.model.cache import backbone_cache_info, clear_backbone_cache
from skqlora.training.recompute import checkpointed_blocks
from skqlora.training.trainer import Trainer


def estimate(backbone, n_texts, n_tokens, lora=LORA, **changes):
    spec = backbone.spec
    skeleton = check_architecture(
        spec.model, None, quantized=False, attn_implementation=spec.attn_implementation
    ).skeleton
    settings = {"optim": "adamw", "n_outputs": 3} | changes
    return estimate_training(
        skeleton, backbone.spec, lora, n_texts=n_texts, n_tokens=n_tokens, **settings
    )


def kept_bytes(backbone, n_texts, n_tokens, lora=LORA, *, lora_dropout=0.0):
    """Bytes of the storages that autograd keeps of a pass, except for those there anyway."""
    model = make_model(backbone, lora, lora_dropout=lora_dropout).train()
    leaves = [segment.leaf for segment in model.replica.segments]
    there = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*model.parameters(), *model.buffers(), *leaves]
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(5, 300, (n_texts, n_tokens))
    mask = torch.ones_like(ids)
    if n_texts > 1:
        mask[0, n_tokens // 2 :] = 0
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.encoder(input_ids=ids, attention_mask=mask)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", [*tiny.DECODERS, *tiny.ENCODERS])
def test_estimate_of_each_family_is_what_autograd_keeps(tiny_model, family):
    backbone = make_backbone(tiny_model(family))
    for shape in [(4, 16), (2, 60), (1, 120)]:
        measured = kept_bytes(backbone, *shape, lora_dropout=0.1)
        assert 0.99 < estimate(backbone, *shape, dropout=True).activations / measured < 1.25
        measured = kept_bytes(backbone, *shape)
        assert 0.99 < estimate(backbone, *shape).activations / measured < 1.25
    assert estimate(backbone, 4, 16).base == _count_bytes(backbone.module)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"double_quant": False},
        {"compute_dtype": torch.bfloat16},
        {"quantization": None, "double_quant": False},
        {"quantization": None, "double_quant": False, "compute_dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
    ],
)
def test_estimate_in_other_precisions(model, changes, use_dora, lora_dropout):
    backbone, lora = make_backbone(model, **changes), replace(LORA, use_dora=use_dora)
    estimated = estimate(backbone, 4, 50, lora, dropout=lora_dropout > 0)
    assert estimated.base == _count_bytes(backbone.module)
    measured = kept_bytes(backbone, 4, 50, lora, lora_dropout=lora_dropout)
    assert 0.95 < estimated.activations / measured < 1.25


def test_estimate_with_adapters_on_the_last_layer_alone(tmp_path):
    deep = make_backbone(tiny.save_model(tmp_path, "llama", num_hidden_layers=6))
    lora = replace(LORA, target_modules=("layers.5.self_attn.q_proj", "layers.5.mlp.down_proj"))
    measured = kept_bytes(deep, 4, 50, lora)
    assert 0.99 < estimate(deep, 4, 50, lora).activations / measured < 1.25
    assert measured < kept_bytes(deep, 4, 50) / 4


def test_a_model_that_needs_values_is_trained_without_an_estimate(tmp_path, corpus):
    longformer = tiny.save_model(tmp_path, "longformer")
    with pytest.raises(RuntimeError, match="cannot be run without values"):
        estimate_memory(longformer)
    clf = make_classifier(longformer, layers=1, num_train_epochs=2)  # nor can it be cut
    assert np.isfinite(clf.fit(*corpus).loss_curve_).all()


def peak_bytes(work):
    """Most memory that torch's CPU allocator gave out at a time, over what it had before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    sizes = [
        event.nbytes()
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return int(np.cumsum(sizes).max())


def peak_of_step(backbone, n_texts, n_tokens, *, checkpointing):
    """Peak of a training step of some texts, once its gradients are there."""
    model = make_model(backbone, lora_dropout=0.1).train()
    ids = torch.randint(5, 300, (n_texts, n_tokens))

    def step():
        model(ids, torch.ones_like(ids)).sum().backward()

    step()
    with checkpointed_blocks(model.encoder) if checkpointing else nullcontext():
        return peak_bytes(step)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_of_the_peak_of_a_training_step(tmp_path, checkpointing):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    backbone = make_backbone(tiny.save_model(tmp_path, "bert", **sizes))
    measured = peak_of_step(backbone, 16, 100, checkpointing=checkpointing)
    estimated = estimate(backbone, 16, 100, dropout=True, checkpointing=checkpointing)
    assert 0.95 < (estimated.activations + estimated.workspace) / measured < 1.25


def test_parts_of_an_estimate_of_a_fit(encoder):
    here = {"device": "cpu", "compute_dtype": "float32"}  # as `make_backbone` has it
    estimated = estimate_memory(encoder, n_classes=3, lora_r=4, batch_size=2, **here)
    backbone = make_backbone(encoder)
    model = make_model(backbone)
    assert estimated.base == _count_bytes(backbone.module)
    n_bytes = model.replica.nbytes + 3 * 65 * 4
    assert (estimated.adapter, estimated.gradients) == (n_bytes, n_bytes)
    assert estimated.optimizer == 2 * n_bytes
    assert (estimated.n_texts, estimated.n_tokens) == (2, 128)
    assert str(estimated).splitlines()[-2].split()[0] == "total"
    with_8_bits = estimate_memory(encoder, n_classes=3, lora_r=4, optim="paged_adamw_8bit")
    assert with_8_bits.optimizer < estimated.optimizer / 3
    again = estimate_memory(encoder, batch_size=2, gradient_checkpointing=True, **here)
    assert again.activations < 0.6 * estimated.activations


def test_estimate_for_a_gpu_that_is_not_here(tmp_path):
    medium = tiny.save_model(tmp_path, "llama", hidden_size=256, intermediate_size=1024)
    on_gpu = estimate_memory(medium, lora_r=64, device="cuda")
    on_cpu = estimate_memory(medium, lora_r=64, device="cpu", compute_dtype="float32")
    assert on_gpu.optimizer_paged
    assert on_gpu.resident == on_gpu.total - on_gpu.optimizer
    assert on_gpu.activations < 0.8 * on_cpu.activations  # half the bytes, except for norms
    assert on_gpu.base < on_cpu.base  # embeddings are bfloat16
    assert on_gpu.n_texts == 16


def test_estimate_refuses_what_a_fit_would():
    with pytest.raises(ValueError, match="'batch_size' parameter"):
        estimate_memory("somewhere", batch_size=0)
    with pytest.raises(ValueError, match="could not be read"):
        estimate_memory("nobody/nothing")
    with pytest.raises(ValueError, match="n_classes == 1, must be >= 2"):
        estimate_memory("somewhere", n_classes=1)
    with pytest.raises(TypeError, match="ranks"):
        estimate_memory("somewhere", ranks=4)


@pytest.fixture
def memory(monkeypatch):
    """Set the number of bytes that this machine has left."""

    def set_free(n_bytes):
        memory = SimpleNamespace(available=n_bytes, total=10**10)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return set_free


def test_a_fit_that_cannot_fit_is_refused_before_a_model_is_loaded(encoder, corpus, memory):
    clear_backbone_cache()
    estimated = estimate_memory(encoder, n_classes=3, lora_r=4, max_length=16, device="cpu")
    memory(estimated.base / 2)
    with pytest.raises(
        MemoryError, match=r"(?s)at least\nbase .*total .*MB for it.*batch_size below"
    ):
        make_classifier(encoder).fit(*corpus)
    assert backbone_cache_info().misses == 0


@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")
def test_a_base_that_is_there_needs_no_more_memory(encoder, corpus, memory):
    backbone = make_backbone(encoder)
    clf = make_classifier(encoder, num_train_epochs=1, max_length=8)  # as some texts are
    needed = estimate_memory(**clf.get_params(), n_classes=3)
    memory(needed.total / AUTO_SHARE - backbone.nbytes + 1)
    clf.set_params(gradient_checkpointing=False).fit(*corpus)
    clear_backbone_cache()
    memory((needed.total - backbone.nbytes) / REFUSED_SHARE)
    with pytest.raises(MemoryError):
        clf.fit(*corpus)


def test_auto_checkpoints_only_where_memory_is_short(model, corpus, memory, monkeypatch):
    chosen = []
    start = Trainer.__enter__

    def note(self):
        chosen.append(self.settings.gradient_checkpointing)
        return start(self)

    monkeypatch.setattr(Trainer, "__enter__", note)
    clf = make_classifier(model, num_train_epochs=1)
    clf.fit(*corpus)
    needed = []
    inner = skqlora.memory.planning.estimate_training

    def spy(*args, **kwargs):
        needed.append(inner(*args, **kwargs))
        return needed[-1]

    monkeypatch.setattr(skqlora.memory.planning, "estimate_training", spy)
    backbone = make_backbone(model)
    memory(0)
    with pytest.raises(MemoryError):
        clf.fit(*corpus)
    whole, least = (estimate.total - backbone.nbytes for estimate in needed[-2:])
    memory((whole + least) // 2)
    clf.fit(*corpus)
    memory(2 * whole + backbone.nbytes)
    clf.fit(*corpus)
    clf.set_params(gradient_checkpointing=np.True_).fit(*corpus)
    memory(whole // 4)
    with pytest.raises(MemoryError, match="gradient_checkpointing=True"):
        clf.set_params(gradient_checkpointing=False).fit(*corpus)
    assert chosen == [False, True, False, True]


def test_what_is_idle_is_freed_before_a_fit_is_refused(encoder, decoder, corpus, memory):
    clear_backbone_cache()
    make_backbone(decoder)
    clf = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    assert backbone_cache_info().n_backbones == 2
    memory(0)
    with pytest.raises(MemoryError):
        clf.fit(*corpus)
    assert backbone_cache_info().n_backbones == 1


def test_free_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr("skqlora.memory.free.CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_memory(cpu) > 1e6  # no container
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert free_memory(cpu) > 1e6  # without a limit
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(cpu) == 350


def test_free_memory_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ([100, 200][i], 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: 10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert free_memory(torch.device("cuda", 1)) == 220
    assert free_memory(torch.device("cuda", 0), spread=True) == 340


def test_estimate_has_the_total_with_activations_computed_again(tiny_model):
    params = {"device": "cpu", "max_length": 32, "lora_r": 4}
    estimate = estimate_memory(tiny_model("llama"), **params)
    again = estimate_memory(tiny_model("llama"), gradient_checkpointing=True, **params)
    assert estimate.total_checkpointed == again.total < estimate.total
    assert "total, if activations are computed again" in str(estimate)
    assert again.total_checkpointed is None
    assert "if activations" not in str(again)
