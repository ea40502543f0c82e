"""The loop: accumulation, checkpointing, precision and schedule change what they should."""

import numpy as np
import pytest
import torch
from helpers import LORA, make_settings, random_tokens

from skqlora.model import TextClassifierModel
from skqlora.training import _count_warmup_steps, scaled_learning_rate, train

TARGETS = np.arange(32) % 3


def adapter_after(backbone, *, lora_dropout=0.1, tokens=None, seed=0, **changes):
    """Weights after a short training, as one vector."""
    model = TextClassifierModel(backbone, LORA, 3, "auto", seed=seed, lora_dropout=lora_dropout)
    train(model, tokens or random_tokens(32), TARGETS, make_settings(**changes, seed=seed))
    state = model.capture(max_length=32)
    values = [*state.lora_tensors.values(), *state.head_tensors.values()]
    return np.concatenate([value.ravel() for value in values])


def test_cut_into_micro_batches_changes_nothing(backbone):
    whole = adapter_after(backbone, batch_size=16, num_train_epochs=2)
    parts = adapter_after(backbone, batch_size=4, gradient_accumulation_steps=4, num_train_epochs=2)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    assert np.abs(whole).max() > 0.01


def test_dropout_changes_the_result(backbone):
    without = adapter_after(backbone, lora_dropout=0.0)
    assert np.abs(adapter_after(backbone) - without).max() > 1e-3


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


def test_checkpointing_leaves_the_clone_as_it_was(backbone):
    model = TextClassifierModel(backbone, LORA, 3, "auto")
    train(model, random_tokens(32), TARGETS, make_settings(gradient_checkpointing=True))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_checkpointing_is_refused_where_blocks_share_their_weights(tiny_model):
    from helpers import make_backbone

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
    with pytest.raises(FloatingPointError, match=r"became nan in epoch \d.*Lower learning_rate"):
        adapter_after(backbone, learning_rate=1e30, head_learning_rate=1e30, num_train_epochs=3)


def test_warmup_is_a_number_or_a_share_of_the_steps():
    assert _count_warmup_steps(0, 50) == 0
    assert _count_warmup_steps(0.1, 55) == 6
    assert _count_warmup_steps(7, 50) == 7


def test_learning_rate_by_width():
    # 5e-5 * 10 * (2000 / hidden)^P, P = 0.781 for Llama and 0.0775 for Qwen.
    assert scaled_learning_rate("llama", 2000) == pytest.approx(5e-4)
    assert scaled_learning_rate("bert", 384) == pytest.approx(1.8e-3, rel=0.02)
    assert scaled_learning_rate("qwen3", 1024) == pytest.approx(5.27e-4, rel=0.01)
