"""Replicas of a base: what they share, what they start with, and how they are lent."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from shutil import copytree
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from helpers import (
    LORA,
    digest_of_base,
    make_backbone,
    make_model,
    make_settings,
    random_tokens,
    train,
)
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file

from skqlora.checkpoint.architecture import check_architecture
from skqlora.model import replicas as replicas_module
from skqlora.model.flat import FlatParameters
from skqlora.model.lora import peft_config, targeted_modules
from skqlora.model.prediction import predict_outputs
from skqlora.model.replicas import AdaptedReplica, ReplicaPool
from skqlora.model.text_model import TextModel
from skqlora.settings.adapter_settings import TextSettings


@pytest.fixture
def injections():
    """Count PEFT's injections."""
    with patch.object(replicas_module, "inject_lora", wraps=replicas_module.inject_lora) as spy:
        yield spy


@pytest.fixture
def pool(backbone):
    """A pool of its own, so that what other tests gave back does not count."""
    return ReplicaPool(backbone.module, backbone.nbytes)


def lease(pool, lora=LORA, holding=None):
    return pool.lease(lora, keep_pooler=False, holding=holding)


def start(replica, lora=LORA, seed=0):
    replica.reset_parameters(lora, seed)
    return torch.cat([s.leaf.detach() for s in replica.segments])


def test_replica_shares_every_tensor_and_leaves_the_base_alone(backbone):
    before = digest_of_base(backbone.module)
    names = [name for name, _ in backbone.module.named_modules()]
    replica = AdaptedReplica(backbone.module, LORA, keep_pooler=False)
    shared = {p.data_ptr() for p in backbone.module.parameters()}
    own = [p for p in replica.module.parameters() if p.data_ptr() not in shared]
    assert all(p.requires_grad for p in own)
    assert sum(p.numel() for p in own) <= replica.nbytes / 4
    assert [name for name, _ in backbone.module.named_modules()] == names
    assert digest_of_base(backbone.module) == before


def test_replica_is_freed_without_the_garbage_collector(backbone):
    gc.collect()
    gc.disable()
    try:
        replica = AdaptedReplica(backbone.module, LORA, keep_pooler=False)
        reference = weakref.ref(replica.module)
        del replica
        assert reference() is None
    finally:
        gc.enable()


def test_first_values_of_an_adapter_follow_the_seed_alone(pool):
    with lease(pool) as replica:
        first = start(replica)
        replica.segments[0].leaf.data.normal_()
        assert torch.equal(start(replica), first)
        assert not torch.equal(start(replica, seed=1), first)
        with lease(pool) as other:
            assert torch.equal(start(other), first)


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "gaussian"}, {"use_dora": True}])
def test_first_values_are_distributed_as_those_of_peft(backbone, changes):
    lora = replace(LORA, r=64, **changes)
    replica = AdaptedReplica(backbone.module, lora, keep_pooler=False)
    start(replica, lora)
    module = replicas_module.replicate(backbone.module)
    replicas_module.drop_pooler(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft_config(lora, module)
        inject_adapter_in_model(config, module)
    ours = replica.state_dict()
    theirs = {name: p.detach().numpy() for name, p in module.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if "lora_A" in name:
            assert ours[name].std() == pytest.approx(expected.std(), rel=0.05)
            kurtosis = [((x / x.std()) ** 4).mean() for x in (ours[name], expected)]
            assert kurtosis[0] == pytest.approx(kurtosis[1], rel=0.12)  # uniform 1.8, Gaussian 3
        else:
            np.testing.assert_allclose(ours[name], expected, rtol=1e-6)


def scaling(pool, **changes):
    lora = replace(LORA, r=4, **changes)
    with lease(pool, lora) as replica:
        replica.reset_parameters(lora, seed=0)
        (value,) = {layer.scaling["default"] for layer in replica.lora_layers}
        return value


def test_scaling_is_that_of_the_last_settings(pool):
    assert scaling(pool, lora_alpha=12) == 3
    assert scaling(pool, lora_alpha=12, use_rslora=True) == 6
    assert scaling(pool, lora_alpha=4) == 1


def test_target_modules_choose_the_layers(encoder):
    lora = replace(LORA, target_modules=("query",))
    with make_backbone(encoder).lease(lora) as replica:
        adapted = {name for name, m in replica.module.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {f"encoder.layer.{i}.attention.self.query" for i in (0, 1)}


@pytest.mark.parametrize("targets", [("nothing",), (), "(", ("query", 3), ("LayerNorm",)])
def test_target_modules_that_fit_nothing_are_refused_on_the_skeleton(encoder, targets):
    skeleton = check_architecture(encoder, None, quantized=True).skeleton
    for _ in range(2):
        with pytest.raises(ValueError, match=r"target_modules=.* cannot be adapted"):
            targeted_modules(targets, skeleton)
    assert not any("lora" in name for name, _ in skeleton.named_modules())


def test_one_shape_is_injected_once_and_every_other_shape_too(pool, injections):
    for _ in range(3):
        for changes in ({"r": 2}, {"r": 4}, {"r": 4, "lora_alpha": 9}, {"r": 4, "use_dora": True}):
            with lease(pool, replace(LORA, **changes)):
                pass
    assert injections.call_count == 3


def test_replicas_in_use_at_once_are_different_ones(pool, injections):
    with lease(pool) as first, lease(pool) as second:
        assert first.segments[0].leaf.data_ptr() != second.segments[0].leaf.data_ptr()
    with lease(pool), lease(pool):
        pass
    assert injections.call_count == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replica_that_met_an_exception_is_not_lent_again(pool, error):
    with pytest.raises(error), lease(pool) as replica:
        raise error
    with lease(pool) as other:
        assert other is not replica


def test_free_replicas_are_bounded_in_number_and_bytes(backbone, monkeypatch):
    monkeypatch.setattr(replicas_module, "MAX_FREE_REPLICAS", 3)
    pool = ReplicaPool(backbone.module, backbone.nbytes)
    for r in range(1, 7):
        with lease(pool, replace(LORA, r=r)) as replica:
            pass
    assert [replica.shape.r for replica in pool._free] == [4, 5, 6]
    monkeypatch.setattr(replicas_module, "MIN_FREE_BYTES", replica.nbytes + 1)
    small = ReplicaPool(backbone.module, base_bytes=0)
    for r in (4, 5, 6):
        with lease(small, replace(LORA, r=r)):
            pass
    assert [replica.shape.r for replica in small._free] == [6]
    assert small.nbytes == replica.nbytes


@pytest.fixture
def writes(monkeypatch):
    """Count the copies of an adapter onto a replica."""
    load, calls = FlatParameters.load_state_dict, []

    def noting(flat, values):
        calls.append(flat)
        load(flat, values)

    monkeypatch.setattr(FlatParameters, "load_state_dict", noting)
    return calls


def test_adapters_of_one_shape_take_turns_at_one_copy_each(backbone, pool, injections, writes):
    states = [make_model(backbone, seed=seed).adapter_state(TextSettings(32)) for seed in (0, 1)]
    backbone = replace(backbone, replicas=pool)
    injections.reset_mock(), writes.clear()
    for state, n_writes in [(0, 1), (0, 1), (1, 2), (1, 2), (0, 3)]:
        with TextModel.for_prediction(backbone, states[state]) as model:
            for name, value in model.replica.state_dict().items():
                np.testing.assert_array_equal(value, states[state].lora_tensors[name])
        assert len(writes) == n_writes
    assert injections.call_count == 1


def test_adapter_that_was_just_trained_is_active_already(backbone, pool, writes):
    backbone = replace(backbone, replicas=pool)
    with TextModel.for_training(backbone, LORA, 3, "auto") as model:
        train(model, random_tokens(), np.arange(16) % 3, make_settings())
        state = model.adapter_state(TextSettings(32))
    writes.clear()
    with TextModel.for_prediction(backbone, state) as again:
        predict_outputs(again, random_tokens())
    assert again.replica is model.replica
    assert not writes


def test_adapter_is_copied_again_after_its_replica_was_trained(backbone, pool):
    backbone = replace(backbone, replicas=pool)
    state = make_model(backbone, seed=3).adapter_state(TextSettings(32))
    with TextModel.for_prediction(backbone, state) as model:
        expected = predict_outputs(model, random_tokens())
    with TextModel.for_training(backbone, LORA, 3, "auto", lora_dropout=0.3) as other:
        train(other, random_tokens(), np.arange(16) % 3, make_settings())
    with TextModel.for_prediction(backbone, state) as model:
        assert model.replica is other.replica
        np.testing.assert_array_equal(predict_outputs(model, random_tokens()), expected)


def test_adapter_that_was_copied_by_half_is_not_taken_for_the_one_before(backbone, pool):
    state = make_model(backbone).adapter_state(TextSettings(32))
    other = replace(state, lora=replace(LORA, lora_alpha=99))
    with lease(pool) as replica:
        replica.load_adapter(state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replica, "_load_state_dict", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                replica.load_adapter(other)
        replica.load_adapter(state)
        assert {layer.scaling["default"] for layer in replica.lora_layers} == {1}


def test_threads_that_load_and_start_adapters_do_not_disturb_each_other(tiny_model, tmp_path):
    source = tiny_model("roberta")
    folders = [copytree(source, tmp_path / str(i)) for i in range(6)]
    for folder in folders:  # without a pooler, which transformers then draws at random
        weights = load_file(folder / "model.safetensors")
        weights = {name: value for name, value in weights.items() if "pooler" not in name}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = make_backbone(source).module

    def first_values(_):
        return start(AdaptedReplica(base, LORA, keep_pooler=False))

    state = torch.get_rng_state()
    expected = first_values(0)
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(make_backbone, str(folder)) for folder in folders]
        starts = list(pool.map(first_values, range(60)))
        assert all(load.result().module.pooler is None for load in loads)
    assert all(torch.equal(values, expected) for values in starts)
    assert torch.equal(torch.get_rng_state(), state)
