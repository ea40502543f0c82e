"""Loading a base once, cloning it for nothing, and refusing what would not be one."""

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import make_backbone, make_classifier
from safetensors.torch import load_file, save_file

from skqlora import QLoRAClassifier
from skqlora.checkpoint.device import resolve_compute_dtype, resolve_device
from skqlora.checkpoint.fingerprint import fingerprint_of_version_1


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
    expected = make_backbone(encoder).fingerprint
    assert make_backbone(str(resharded)).fingerprint == expected
    assert make_backbone(encoder, quantization=None).fingerprint == expected


AS_PARTS = {
    "bert": transformers.AutoModelForMaskedLM,
    "roberta": transformers.AutoModelForTokenClassification,
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForSequenceClassification,
    "mixtral": transformers.AutoModelForCausalLM,
    "gemma3": transformers.AutoModelForImageTextToText,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("model_type", AS_PARTS)
def test_base_that_is_saved_again_is_the_same(tmp_path, corpus, model_type):
    whole = model_type in tiny.TOWERS or model_type in tiny.ENCODER_DECODERS
    (tiny.save_whole if whole else tiny.save_model)(tmp_path / "base", model_type)
    copytree(tmp_path / "base", tmp_path / "first")
    part = AS_PARTS[model_type].from_pretrained(tmp_path / "base")
    part.save_pretrained(tmp_path / "first")
    clf = make_classifier(str(tmp_path / "first"), num_train_epochs=1).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    copytree(tmp_path / "base", tmp_path / "again")
    model = transformers.AutoModel.from_pretrained(tmp_path / "first")
    model.config.id2label = {0: "one", 1: "two", 2: "three"}
    model.save_pretrained(tmp_path / "again")
    clf.set_params(model=str(tmp_path / "again"))
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)
    clf.set_params(warm_start=True).fit(*corpus)


def test_adapter_on_the_pooler_wants_the_same_pooler(encoder, tmp_path, corpus):
    folder = copytree(encoder, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights["pooler.dense.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with_pooler = make_classifier(encoder, num_train_epochs=1, pooling="pooler").fit(*corpus)
    without = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    without.set_params(model=str(folder)).predict(corpus[0])
    with pytest.raises(ValueError, match="is not the base that was fitted"):
        with_pooler.set_params(model=str(folder)).predict(corpus[0])


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_fingerprint_of_version_1_is_known(encoder, corpus, pooling, tmp_path):
    clf = make_classifier(encoder, num_train_epochs=1, pooling=pooling).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    old = fingerprint_of_version_1(encoder, None)
    assert old != clf.adapter_.fingerprint
    clf.adapter_ = replace(clf.adapter_, fingerprint=old)
    clf.save(tmp_path / "saved")
    again = QLoRAClassifier.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(corpus[0]), expected)
    again.set_params(warm_start=True).fit(*corpus)
    assert again.adapter_.fingerprint != old


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
    assert make_backbone(str(folder)).fingerprint != make_backbone(encoder).fingerprint
