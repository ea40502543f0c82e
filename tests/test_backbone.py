"""Loading a base once, cloning it for nothing, and refusing what would not be one."""

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from shutil import copytree, rmtree

import pytest
import torch
from helpers import LORA, digest_of_base, make_backbone, make_classifier
from safetensors.torch import load_file, save_file

from skqlora.architecture import check_architecture
from skqlora.backbone import lora_layers, refuse_missing_targets
from skqlora.device import resolve_compute_dtype, resolve_device
from skqlora.fingerprint import fingerprint_source


def test_base_is_loaded_once_for_equal_specifications(model):
    assert make_backbone(model) is make_backbone(model)
    assert make_backbone(model) is not make_backbone(model, double_quant=False)


def test_base_is_frozen_and_in_evaluation_mode(backbone):
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert not any(m.training for m in backbone.module.modules())
    assert backbone.module.config.use_cache is False


def test_what_was_found_out_of_it(encoder, decoder):
    assert make_backbone(decoder).causal
    assert not make_backbone(encoder).causal
    assert make_backbone(encoder).hidden_size == 64


def test_clone_shares_every_tensor_and_leaves_the_base_alone(backbone):
    before = digest_of_base(backbone.module)
    names = [name for name, _ in backbone.module.named_modules()]
    module = backbone.lease(LORA, seed=0)
    shared = {p.data_ptr() for p in backbone.module.parameters()}
    own = [p for p in module.parameters() if p.data_ptr() not in shared]
    assert all(p.requires_grad for p in own)
    assert [name for name, _ in backbone.module.named_modules()] == names
    assert digest_of_base(backbone.module) == before


def test_clone_is_freed_without_the_garbage_collector(backbone):
    gc.collect()
    gc.disable()
    try:
        module = backbone.lease(LORA, seed=0)
        reference = weakref.ref(module)
        del module
        assert reference() is None
    finally:
        gc.enable()


def test_first_values_of_an_adapter_follow_the_seed(backbone):
    def values(seed):
        module = backbone.lease(LORA, seed=seed)
        return torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])

    assert torch.equal(values(0), values(0))
    assert not torch.equal(values(0), values(1))


def scaling(backbone, **changes):
    module = backbone.lease(replace(LORA, r=4, **changes), seed=0)
    (value,) = {layer.scaling["default"] for layer in lora_layers(module)}
    return value


def test_scaling(backbone):
    assert scaling(backbone, lora_alpha=12) == 3
    assert scaling(backbone, lora_alpha=12, use_rslora=True) == 6


def test_gaussian_start_is_gaussian(backbone):
    def kurtosis(init):
        module = backbone.lease(replace(LORA, r=8, init_lora_weights=init), seed=0)
        a = torch.cat([layer.lora_A["default"].weight.flatten() for layer in lora_layers(module)])
        return ((a / a.std()) ** 4).mean().item()

    assert kurtosis(True) < 2.2  # uniform, at two widths
    assert kurtosis("gaussian") == pytest.approx(3, abs=0.2)


def test_dora_has_magnitudes(backbone):
    module = backbone.lease(replace(LORA, use_dora=True), seed=0)
    assert any("lora_magnitude_vector" in name for name, _ in module.named_parameters())


def test_target_modules_choose_the_layers(encoder):
    module = make_backbone(encoder).lease(replace(LORA, target_modules=("query",)), seed=0)
    adapted = {name for name, m in module.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {f"encoder.layer.{i}.attention.self.query" for i in (0, 1)}


@pytest.mark.parametrize("targets", [("nothing",), (), "(", ("query", 3), ("LayerNorm",)])
def test_target_modules_that_fit_nothing_are_refused_on_the_skeleton(encoder, targets):
    skeleton = check_architecture(encoder, None, quantized=True).skeleton
    with pytest.raises(ValueError, match=r"target_modules=.* cannot be adapted"):
        refuse_missing_targets(replace(LORA, target_modules=targets), skeleton)


def test_fp4_is_fp4(model):
    modules = make_backbone(model, quantization="fp4").module.modules()
    types = {m.weight.quant_state.quant_type for m in modules if hasattr(m, "quant_state")}
    assert types == {"fp4"}


def test_changed_folder_is_loaded_again(encoder, tiny_model, tmp_path, monkeypatch, corpus):
    folder = tmp_path / "model"
    copytree(encoder, folder)
    monkeypatch.chdir(tmp_path)
    first = make_classifier("model", num_train_epochs=1).fit(*corpus)
    rmtree(folder)
    copytree(tiny_model("electra"), folder)
    second = make_classifier("model", num_train_epochs=1).fit(*corpus)
    assert first.adapter_.fingerprint == fingerprint_source(encoder, None)
    assert second.adapter_.fingerprint == fingerprint_source(tiny_model("electra"), None)
    with pytest.raises(ValueError, match="is not the base that was fitted"):
        first.predict(["text"])


def test_threads_that_load_and_start_adapters_do_not_disturb_each_other(tiny_model, tmp_path):
    source = tiny_model("roberta")
    folders = [copytree(source, tmp_path / str(i)) for i in range(6)]
    for folder in folders:  # without a pooler, which transformers then draws at random
        weights = load_file(folder / "model.safetensors")
        weights = {name: value for name, value in weights.items() if "pooler" not in name}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = make_backbone(source)

    def start(_):
        module = base.lease(LORA, seed=0)
        return torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])

    state = torch.get_rng_state()
    expected = start(0)
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(make_backbone, str(folder)) for folder in folders]
        starts = list(pool.map(start, range(60)))
        assert all(load.result().module.pooler is None for load in loads)
    assert all(torch.equal(values, expected) for values in starts)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_a_checkpoint_is_refused(model, tmp_path):
    folder = copytree(model, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    removed = sorted(name for name in weights if "pooler" not in name)[-1]
    del weights[removed]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint lacks 1 weights of .*e\.g\. "):
        make_backbone(str(folder))


def test_pooler_that_the_checkpoint_lacks_is_dropped(encoder, tmp_path):
    folder = copytree(encoder, tmp_path / "bare")
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert make_backbone(str(folder)).module.pooler is None


def test_weights_in_pickle_format_are_not_read(encoder, tmp_path):
    folder = copytree(encoder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in safetensors format"):
        make_backbone(str(folder))


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "xpu")
    with pytest.raises(ValueError, match="bitsandbytes cannot train a 4-bit model on 'mps'"):
        resolve_device("mps")
    with pytest.raises(ValueError, match="which is no torch device"):
        resolve_device("gpu!")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no such device here"):
            resolve_device("cuda")


def test_compute_dtypes():
    cpu = torch.device("cpu")
    assert resolve_compute_dtype("float32", cpu) == torch.float32
    assert resolve_compute_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="compute_dtype='float16' on a CPU"):
        resolve_compute_dtype("float16", cpu)


def test_fingerprint_is_of_the_weights_not_of_the_files(encoder, tmp_path):
    expected = fingerprint_source(encoder, None)
    resharded = tmp_path / "resharded"
    copytree(encoder, resharded)
    weights = load_file(resharded / "model.safetensors")
    (resharded / "model.safetensors").unlink()
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(weights)}
    for shard in set(places.values()):
        part = {name: value for name, value in weights.items() if places[name] == shard}
        save_file(part, resharded / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (resharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_source(str(resharded), None) == expected
    assert fingerprint_source(encoder, None) == expected


@pytest.mark.parametrize("change", ["weight", "one row of an embedding", "config"])
def test_fingerprint_tells_another_base(encoder, tmp_path, change):
    folder = copytree(encoder, tmp_path / "changed")
    if change == "weight":
        weights = load_file(folder / "model.safetensors")
        weights["embeddings.LayerNorm.weight"][3] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "one row of an embedding":
        weights = load_file(folder / "model.safetensors")
        weights["embeddings.word_embeddings.weight"][77] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        path = folder / "config.json"
        path.write_text(
            path.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-5')
        )
    assert fingerprint_source(str(folder), None) != fingerprint_source(encoder, None)
