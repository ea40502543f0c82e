"""Loading a base once, cloning it for nothing, and refusing what would not be one."""

import json
from shutil import copytree

import pytest
import torch
from helpers import make_backbone
from safetensors.torch import load_file, save_file

from skqlora.checkpoint.device import resolve_compute_dtype, resolve_device
from skqlora.checkpoint.fingerprint import fingerprint_source


def test_base_is_frozen_and_in_evaluation_mode(backbone):
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert not any(m.training for m in backbone.module.modules())
    assert backbone.module.config.use_cache is False


def test_what_was_found_out_of_it(encoder, decoder):
    assert make_backbone(decoder).causal
    assert not make_backbone(encoder).causal
    assert make_backbone(encoder).hidden_size == 64


def test_fp4_is_fp4(model):
    modules = make_backbone(model, quantization="fp4").module.modules()
    types = {m.weight.quant_state.quant_type for m in modules if hasattr(m, "quant_state")}
    assert types == {"fp4"}


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
