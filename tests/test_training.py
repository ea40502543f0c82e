"""The loop: accumulation, checkpointing, precision and schedule change what they should."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from helpers import (
    LORA,
    lora_parameters,
    make_backbone,
    make_model,
    make_settings,
    random_tokens,
    train,
)
from transformers import get_scheduler

from skqlora.model.backbone import Backbone
from skqlora.model.blocks import transformer_blocks
from skqlora.model.replicas import ReplicaPool
from skqlora.model.text_model import TextModel
from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.recipe import scaled_learning_rate
from skqlora.text.batches import TokenizedTexts
from skqlora.training.trainer import Trainer, _count_warmup_steps

TARGETS = np.arange(32) % 3


def adapter_after(backbone, *, lora=LORA, lora_dropout=0.1, tokens=None, seed=0, **changes):
    """Weights after a short training, as one vector."""
    model = make_model(backbone, lora, 3, "auto", seed=seed, lora_dropout=lora_dropout)
    train(model, tokens or random_tokens(32), TARGETS, make_settings(**changes), seed=seed)
    state = model.adapter_state(TextSettings(32))
    values = [*state.lora_tensors.values(), *state.head_tensors.values()]
    return np.concatenate([value.ravel() for value in values])


def test_cut_into_micro_batches_changes_nothing(backbone):
    whole = adapter_after(backbone, batch_size=16, num_train_epochs=2)
    parts = adapter_after(backbone, batch_size=4, gradient_accumulation_steps=4, num_train_epochs=2)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert np.abs(whole).max() > 0.01


def test_cut_changes_nothing_where_a_row_is_as_long_as_the_shared_positions(tiny_model):
    deberta = make_backbone(tiny_model("deberta-v2"))  # 2 * position_buckets = 32
    tokens = TokenizedTexts([np.arange(5, 37)] * 32, pad_id=0)
    whole = adapter_after(deberta, tokens=tokens, batch_size=8)
    single = adapter_after(deberta, tokens=tokens, batch_size=1, gradient_accumulation_steps=8)
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_changes_the_result(backbone, use_dora):
    lora = replace(LORA, use_dora=use_dora)
    without = adapter_after(backbone, lora=lora, lora_dropout=0.0)
    assert np.abs(adapter_after(backbone, lora=lora) - without).max() > 1e-3


def test_checkpointing_changes_nothing(backbone):
    plain = adapter_after(backbone, num_train_epochs=2)
    saving = adapter_after(backbone, num_train_epochs=2, gradient_checkpointing=True)
    np.testing.assert_allclose(saving, plain, rtol=0, atol=1e-6)


def test_checkpointing_keeps_fewer_activations(backbone):
    def bytes_kept(checkpointing):
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adapter_after(
                backbone, tokens=random_tokens(32, 64), gradient_checkpointing=checkpointing
            )
        return sum(kept.values())

    assert bytes_kept(True) < 0.6 * bytes_kept(False)


def test_checkpointing_leaves_the_replica_as_it_was(backbone):
    model = make_model(backbone)
    train(model, random_tokens(32), TARGETS, make_settings(gradient_checkpointing=True))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_checkpointing_is_refused_where_blocks_share_their_weights(tiny_model):
    with pytest.raises(ValueError, match="AlbertModel has no single stack"):
        adapter_after(make_backbone(tiny_model("albert")), gradient_checkpointing=True)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw"])
def test_other_optimizers_go_the_same_way(backbone, optim):
    paged = adapter_after(backbone, num_train_epochs=2)
    other = adapter_after(backbone, num_train_epochs=2, optim=optim)
    start = adapter_after(
        backbone, num_train_epochs=2, learning_rate=1e-12, head_learning_rate=1e-12
    )
    cosine = np.dot(paged - start, other - start)
    cosine /= np.linalg.norm(paged - start) * np.linalg.norm(other - start)
    assert cosine > 0.97


def test_adamw_of_torch_gives_what_bitsandbytes_gives(backbone):
    paged = adapter_after(backbone, num_train_epochs=2)
    other = adapter_after(backbone, num_train_epochs=2, optim="adamw")
    np.testing.assert_allclose(other, paged, rtol=0, atol=1e-4)


def test_seed_decides(backbone):
    first = adapter_after(backbone)
    np.testing.assert_array_equal(adapter_after(backbone), first)
    assert not np.array_equal(adapter_after(backbone, seed=1), first)


def test_divergence_is_an_error_with_a_remedy(backbone):
    with pytest.raises(
        FloatingPointError, match=r"in update \d+ \(epoch \d\).*Lower learning_rate"
    ):
        adapter_after(backbone, learning_rate=1e30, head_learning_rate=1e30, num_train_epochs=3)


def test_divergence_in_the_last_update_is_an_error_too(backbone):
    with pytest.raises(FloatingPointError, match="epoch 1"):
        adapter_after(backbone, learning_rate=1e38, head_learning_rate=1e38, batch_size=32)


def test_a_single_update_is_an_update(backbone):
    model = make_model(backbone)
    train(model, random_tokens(32), TARGETS, make_settings(batch_size=32, warmup_steps=0.1))
    b = [p for name, p in lora_parameters(model).items() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in b)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_rates_follow_the_schedule_of_transformers(backbone, name):
    settings = make_settings(lr_scheduler_type=name, warmup_steps=0.25, num_train_epochs=4)
    trainer = Trainer(make_model(backbone), random_tokens(32), TARGETS, settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=8)
    with trainer:
        for _ in range(8):
            lora, head = (group["lr"] for group in trainer.optimizer.param_groups)
            assert lora == pytest.approx(optimizer.param_groups[0]["lr"])
            assert head == pytest.approx(5 * lora)
            trainer.step(np.arange(16))
            optimizer.step()
            schedule.step()


def test_gradient_is_clipped_over_both_segments(backbone):
    def norm(max_grad_norm):
        model = make_model(backbone)
        settings = make_settings(max_grad_norm=max_grad_norm)
        with Trainer(model, random_tokens(32), TARGETS, settings) as trainer:
            trainer.step(np.arange(16))
            return torch.cat([segment.leaf.grad for segment in trainer.segments]).norm().item()

    assert norm(None) > 0.1
    assert norm(1e-3) == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_shrinks_the_weights(backbone):
    decayed = adapter_after(backbone, weight_decay=10.0)
    assert np.linalg.norm(decayed) < 0.99 * np.linalg.norm(adapter_after(backbone))


def test_warmup_is_a_number_or_a_share_of_the_steps():
    for warmup_steps, n_steps, expected in [(0, 50, 0), (0.1, 55, 6), (7, 50, 7), (0.1, 1, 0)]:
        settings = make_settings(warmup_steps=warmup_steps)
        assert _count_warmup_steps(settings, n_steps) == expected


def test_learning_rate_by_width():
    # 5e-5 * 10 * (2000 / hidden)^P, P = 0.781 for Llama and 0.0775 for Qwen.
    assert scaled_learning_rate("llama", 2000) == pytest.approx(5e-4)
    assert scaled_learning_rate("bert", 384) == pytest.approx(1.8e-3, rel=0.02)
    assert scaled_learning_rate("qwen3", 1024) == pytest.approx(5.27e-4, rel=0.01)


@pytest.fixture
def split(backbone):
    """A base whose blocks are on devices of their own, as far as accelerate's hooks know."""
    module = Backbone.load(backbone.spec).module
    blocks = dict(module.named_modules())
    blocks = {
        name: "cpu"
        for name in blocks
        if re.fullmatch(r"(encoder\.layer|layers)\.\d|.*embed[^.]*", name)
    }
    others = {
        name: "cpu" for name, _ in module.named_children() if name not in ("encoder", "layers")
    }
    dispatch_model(module, others | blocks, force_hooks=True)
    assert all(hasattr(block, "_hf_hook") for block in transformer_blocks(module))
    return replace(backbone, module=module, replicas=ReplicaPool(module, backbone.nbytes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_base_that_is_spread_over_devices_trains_as_another(backbone, split, checkpointing):
    def blocks_without_forward():
        return [b for b in transformer_blocks(split.module) if "forward" not in b.__dict__]

    one = adapter_after(backbone, gradient_checkpointing=checkpointing)
    for _ in range(2):
        spread = adapter_after(split, gradient_checkpointing=checkpointing)
        np.testing.assert_array_equal(spread, one)
    assert not blocks_without_forward()


def test_hooks_of_a_replica_act_on_the_replica(split):
    replica = make_model(split).encoder
    base = set(split.module.modules())
    for block in transformer_blocks(replica):
        assert block._old_forward.__self__ is block
        assert block.forward.args == (block,)
        assert block not in base


@pytest.mark.parametrize(
    ("fits", "error"),
    [
        (5, torch.OutOfMemoryError("injected")),
        (1, RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory")),
        (1, RuntimeError("CUDA error: out of memory\nCompile with ...")),
        (1, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    ],
)
def test_running_out_of_memory_computes_the_update_again_in_smaller_parts(
    backbone, monkeypatch, fits, error
):
    settings = {"batch_size": 16, "lora_dropout": 0.3, "num_train_epochs": 2}
    expected = adapter_after(backbone, **settings)
    forward = TextModel.forward
    sizes = []

    def out_of_memory_above(self, input_ids, attention_mask, *, update=0):
        sizes.append(len(input_ids))
        if self.training and len(input_ids) > fits:
            raise error
        return forward(self, input_ids, attention_mask, update=update)

    monkeypatch.setattr(TextModel, "forward", out_of_memory_above)
    with pytest.warns(RuntimeWarning, match=r"Out of memory with \d+ texts.*Pass batch_size="):
        recovered = adapter_after(backbone, **settings)
    np.testing.assert_allclose(recovered, expected, rtol=1e-4, atol=1e-5)
    assert sizes[:3] == [16, 8, 4]  # and the first update begins again each time


def test_short_texts_share_a_pass_and_long_ones_fill_it(backbone, monkeypatch):
    tokens = TokenizedTexts([np.full(n, 7) for n in [30] * 4 + [10] * 10 + [2] * 2], pad_id=0)
    shapes = []
    forward = TextModel.forward

    def noting(self, input_ids, attention_mask, *, update=0):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, attention_mask, update=update)

    monkeypatch.setattr(TextModel, "forward", noting)
    model = make_model(backbone, LORA, 3, "auto")
    settings = make_settings(batch_size=2, gradient_accumulation_steps=8)
    train(model, tokens, TARGETS[:16], settings)
    # No pass is larger than two of the longest texts.
    assert shapes[:-1] == [(2, 30), (2, 30), (6, 10), (6, 10)]  # and a look at the last weights


def test_another_error_is_no_lack_of_memory(backbone, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(ValueError("injected"))  # whose argument is no str

    monkeypatch.setattr(TextModel, "forward", fail)
    with pytest.raises(RuntimeError, match="injected"):
        adapter_after(backbone)


def test_one_text_too_many_is_out_of_memory(backbone, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(TextModel, "forward", out_of_memory)
    with (
        pytest.warns(RuntimeWarning, match="Out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="injected"),
    ):
        adapter_after(backbone)
