"""Checkpoints that are quantized already: read as they are, read anew, or refused."""

import json
import shutil

import pytest
import tiny
import torch
from helpers import make_backbone, make_classifier
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config

IDS = torch.arange(5, 17)[None]
BLOCK = 16  # of the FP8 weights below


def save_causal(folder, family):
    """Write a tiny causal language model in bfloat16 and a tokenizer; return the model."""
    settings = (tiny.DECODERS | tiny.MIXTURES)[family]
    config = AutoConfig.for_model(family, **settings | tiny.TOKENS | {"vocab_size": 408})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    tiny.make_tokenizer("decoder").save_pretrained(folder)
    return model


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_bitsandbytes(folder, **changes):
    """Write a checkpoint as the many of the Hub whose names end with "-bnb-4bit"."""
    save_causal(folder / "dense", "llama")
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    config = BitsAndBytesConfig(**settings | changes)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "packed")
    tiny.make_tokenizer("decoder").save_pretrained(folder / "packed")
    return folder / "packed"


def test_bitsandbytes_checkpoint_is_read_as_it_is(tmp_path, corpus):
    folder = save_bitsandbytes(tmp_path)
    stored = load_file(folder / "model.safetensors")
    base = make_backbone(str(folder))
    for name, parameter in base.module.named_parameters():
        if parameter.dtype == torch.uint8:
            assert torch.equal(parameter, stored[f"model.{name}"])
            layer = base.module.get_submodule(name.rpartition(".")[0])
            assert layer.compute_dtype == torch.float32  # not what the checkpoint says
    clf = make_classifier(str(folder), num_train_epochs=2).fit(*corpus)
    assert 4.126 <= clf.footprint_.bits_per_quantized_parameter <= 4.14
    clf.save(tmp_path / "saved")
    loaded = type(clf).load(tmp_path / "saved")
    assert (loaded.predict(corpus[0]) == clf.predict(corpus[0])).all()


@pytest.mark.parametrize(
    ("has", "asks", "message"),
    [
        ({}, {"quantization": "fp4"}, "quantization='nf4' and double_quant=True"),
        ({}, {"double_quant": False}, "quantization='nf4' and double_quant=True"),
        ({"bnb_4bit_quant_type": "fp4"}, {}, "quantization='fp4' and double_quant=True"),
        ({"bnb_4bit_use_double_quant": False}, {}, "quantization='nf4' and double_quant=False"),
        ({}, {"quantization": None}, "Got quantization=None, but .* already quantized"),
    ],
)
def test_bitsandbytes_checkpoint_of_another_kind_is_refused(tmp_path, corpus, has, asks, message):
    folder = save_bitsandbytes(tmp_path, **has)
    with pytest.raises(ValueError, match=message):
        make_classifier(str(folder), **asks).fit(*corpus)
    if has:  # and what the message says to pass works
        kind = {
            "quantization": has.get("bnb_4bit_quant_type", "nf4"),
            "double_quant": has.get("bnb_4bit_use_double_quant", True),
        }
        make_classifier(str(folder), num_train_epochs=1, **kind).fit(*corpus)


def change_states(tensors, **changes):
    for name, tensor in tensors.items():
        if "quant_state" in name:
            state = json.loads(bytes(tensor.tolist())) | changes
            tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: change_states(tensors, blocksize=128), "each block of 128 weights"),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "quant_state" not in n},
            "says that it is in 4 bits, but holds no packed weight",
        ),
    ],
)
def test_damaged_bitsandbytes_checkpoint_is_refused(tmp_path, change, message):
    folder = save_bitsandbytes(tmp_path)
    save_tensors(folder, change(load_file(folder / "model.safetensors")))
    with pytest.raises(ValueError, match=message):
        make_backbone(str(folder))


def assert_same_base(found, expected):
    """Check that two bases were packed to the same bits, and compute the same."""
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        assert torch.equal(found(IDS)[0], expected(IDS)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fp8_checkpoint_is_quantized_anew(tmp_path, corpus, family):
    packed, dense = tmp_path / "fp8", tmp_path / "dense"
    save_causal(packed, family)
    tensors, dequantized = {}, {}
    for name, tensor in load_file(packed / "model.safetensors").items():
        tensors[name] = dequantized[name] = tensor
        if tensor.ndim == 2 and "_proj" in name and not any(n % BLOCK for n in tensor.shape):
            rows, columns = (n // BLOCK for n in tensor.shape)
            blocks = tensor.float().reshape(rows, BLOCK, columns, BLOCK)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            tensors[name] = (blocks / scales).reshape(tensor.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
            values = tensors[name].float().reshape(blocks.shape) * scales
            dequantized[name] = values.reshape(tensor.shape)
    shutil.copytree(packed, dense)
    save_tensors(packed, tensors)
    save_tensors(dense, dequantized)
    fp8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    change_config(packed, quantization_config=fp8)
    assert_same_base(make_backbone(str(packed)).module, make_backbone(str(dense)).module)
    make_classifier(str(packed), num_train_epochs=1).fit(*corpus)


def test_mxfp4_checkpoint_is_quantized_anew(tmp_path, corpus):
    packed, dense = tmp_path / "mxfp4", tmp_path / "dense"
    save_causal(packed, "gpt_oss")
    tensors, generator = {}, torch.Generator().manual_seed(0)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    for name, tensor in load_file(packed / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            n_experts, n_in, n_out = tensor.shape
            tensors[f"{name}_blocks"] = draw(0, 256, n_experts, n_out, n_in // 32, 16)
            tensors[f"{name}_scales"] = draw(118, 122, n_experts, n_out, n_in // 32)
        else:
            tensors[name] = tensor
    save_tensors(packed, tensors)
    change_config(packed, quantization_config={"quant_method": "mxfp4"})
    model = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    shutil.copytree(packed, dense)
    save_tensors(dense, {n: t.clone().contiguous() for n, t in model.state_dict().items()})
    change_config(dense, quantization_config=None)
    assert_same_base(make_backbone(str(packed)).module, make_backbone(str(dense)).module)
    make_classifier(str(packed), num_train_epochs=1).fit(*corpus)


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "of next year"}, "of next year"),
        ({"bits": 4}, "another way"),
    ],
)
def test_other_quantized_checkpoints_are_refused(tmp_path, corpus, stored, method):
    save_causal(tmp_path, "llama")
    change_config(tmp_path, quantization_config=stored)
    with pytest.raises(ValueError, match=rf"already quantized \({method}\).* Take its 16-bit"):
        make_classifier(str(tmp_path)).fit(*corpus)


@pytest.mark.parametrize("stored", [{}, None])
def test_an_empty_quantization_is_none(tmp_path, corpus, stored):
    save_causal(tmp_path, "llama")
    change_config(tmp_path, quantization_config=stored)
    make_classifier(str(tmp_path), num_train_epochs=1).fit(*corpus)
