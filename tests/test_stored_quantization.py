"""Checkpoints that are quantized already: read as they are, read anew, or refused."""

import json
import shutil

import pytest
import tiny
import torch
from helpers import make_backbone, make_classifier
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config

from skqlora import estimate_memory
from skqlora.model.backbone import _count_bytes

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


FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def save_bitsandbytes(folder, family="llama", **changes):
    """Write a checkpoint as the many of the Hub whose names end with "-bnb-4bit"."""
    save_causal(folder / "dense", family)
    config = BitsAndBytesConfig(**FOUR_BITS | changes)
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


@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl"])
def test_layers_that_bitsandbytes_left_in_16_bits_stay_so(tmp_path, corpus, model_type):
    skipped = ["layers.0.mlp", "layers.1.self_attn.q_proj"]
    if model_type == "llama":
        names = ["lm_head", *(f"model.{name}" for name in skipped)]
        folder = save_bitsandbytes(tmp_path, llm_int8_skip_modules=names)
    else:
        model = tiny.save_whole(tmp_path / "dense", model_type)
        names = ["lm_head", "visual", *(f"model.language_model.{name}" for name in skipped)]
        config = BitsAndBytesConfig(**FOUR_BITS, llm_int8_skip_modules=names)
        folder = tmp_path / "packed"
        type(model).from_pretrained(
            tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16
        ).save_pretrained(folder)
        tiny.make_tokenizer("decoder").save_pretrained(folder)
    base = make_backbone(str(folder))
    dense = {name for name, m in base.module.named_modules() if type(m) is torch.nn.Linear}
    gated = {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert dense == gated | {"layers.1.self_attn.q_proj"}
    assert {p.dtype for p in base.module.parameters()} == {torch.float32, torch.uint8}
    make_classifier(str(folder), num_train_epochs=1).fit(*corpus)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_bitsandbytes_left_in_16_bits_are_packed(tmp_path, corpus, family):
    folder = save_bitsandbytes(tmp_path, family)
    base = make_backbone(str(folder))
    clf = make_classifier(str(folder), num_train_epochs=1).fit(*corpus)
    embeddings = base.module.get_input_embeddings().weight.numel()
    quantized = clf.footprint_.quantized_parameters
    assert quantized / (quantized + clf.footprint_.other_parameters - embeddings) >= 0.98
    estimated = estimate_memory(str(folder), device="cpu", compute_dtype="float32")
    assert estimated.base == _count_bytes(base.module)


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
        (
            lambda tensors: {
                n: t for n, t in tensors.items() if "q_proj.weight.nested_absmax" not in n
            },
            r"lacks '.*q_proj\.weight\.nested_absmax', without which a quantized weight cannot",
        ),
        (lambda tensors: change_states(tensors, quant_type=None), "is already quantized, with"),
        (
            lambda tensors: {
                n: torch.zeros(3, dtype=torch.uint8) if "quant_state" in n else t
                for n, t in tensors.items()
            },
            "'.*quant_state.*' is damaged",
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
    tensors = {name: t for name, t in tensors.items() if "0.self_attn.o_proj.weight_s" not in name}
    save_tensors(packed, tensors)
    with pytest.raises(ValueError, match=r"lacks '.*o_proj\.weight_scale_inv', without which"):
        make_backbone(str(packed))


def test_class_names_in_8_bits_are_refused(tmp_path, corpus):
    save_causal(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_tensors(tmp_path, tensors)
    clf = make_classifier(str(tmp_path), init_head_weights="class_names", prompt="{text} is")
    with pytest.raises(ValueError, match=r"output embeddings 'lm_head\.weight' in fewer than 16"):
        clf.fit(*corpus)


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
