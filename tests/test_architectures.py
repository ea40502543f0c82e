"""Every family takes a step, or is refused by its name before a weight is read."""

import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import make_backbone, make_classifier
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from shrunken import save_family

from skqlora.checkpoint.architecture import check_architecture


@pytest.mark.parametrize("model_type", [*tiny.DECODERS, *tiny.ENCODERS])
def test_family_takes_a_step(tiny_model, corpus, model_type):
    texts, labels = corpus
    clf = make_classifier(tiny_model(model_type), num_train_epochs=1, lora_dropout=0.1)
    clf.fit(texts, labels)
    assert clf.adapter_.pooling == ("mean" if model_type in tiny.ENCODERS else "last")
    assert 4.126 <= clf.footprint_.bits_per_quantized_parameter <= 4.135
    b = {name: value for name, value in clf.adapter_.lora_tensors.items() if "lora_B" in name}
    assert b
    assert all(np.abs(value).max() > 0 for value in b.values())
    np.testing.assert_allclose(clf.predict_proba(texts).sum(axis=1), 1)


def test_at_least_27_families_are_tested():
    assert len(tiny.DECODERS) + len(tiny.ENCODERS) >= 27


@pytest.mark.parametrize("model_type", [*tiny.DECODERS, *tiny.ENCODERS])
def test_every_linear_layer_of_a_family_gets_an_adapter(tiny_model, model_type):
    from helpers import LORA

    base = make_backbone(tiny_model(model_type))
    with base.lease(LORA) as replica:
        adapted = {id(layer.base_layer.weight) for layer in replica.lora_layers}
    linear = {
        id(m.weight)
        for name, m in base.module.named_modules()
        if isinstance(m, torch.nn.Linear) and not name.startswith("pooler")
    }
    assert adapted == linear


def save_config(folder, model_type, **settings):
    transformers.AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    return str(folder)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "bart": ({"d_model": 64, "encoder_layers": 2}, "is an encoder-decoder, of whose encoder"),
    "whisper": ({"d_model": 64, "encoder_layers": 2}, "is an encoder-decoder, of whose encoder"),
    "vit": (SMALL, "does not read text"),
    "wav2vec2": (SMALL, "does not read text"),
    "falcon": (SMALL, "of its weights in FalconLinear"),
    "xlnet": (
        {"d_model": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        "in XLNetModel, XLNetRelativeAttention",
    ),
    "dbrx": (
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "vocab_size": 100,
            "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
        },
        "of its weights in DbrxExpertGLU",
    ),
    "canine": (SMALL, "does not read text"),
    "musicgen": (
        {
            "text_encoder": {"model_type": "t5"},
            "audio_encoder": {"model_type": "encodec"},
            "decoder": {},
        },
        "cannot be built by transformers: Multiple valid text configs",
    ),
    "lfm2_moe": ({}, "cannot be built by transformers: "),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_family_that_cannot_be_adapted_is_refused_by_name(tmp_path, model_type):
    settings, message = REFUSED[model_type]
    folder = save_config(tmp_path, model_type, **settings)
    with pytest.raises(ValueError, match=rf"\({model_type}\) .*{message}.* Wanted: a text encoder"):
        check_architecture(folder, None, quantized=True)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("fnet", "gives a text another result beside a longer one, to whose length it is padded"),
        ("layoutlm", "cannot be run on token ids and a mask alone"),
    ],
)
def test_model_that_runs_wrongly_is_refused_by_name(tmp_path, model_type, message):
    folder = tiny.save_model(tmp_path, model_type)
    with pytest.raises(ValueError, match=rf"\({model_type}\) {message}"):
        make_backbone(folder)


@pytest.mark.parametrize("family", ["convbert", "mobilebert", "nystromformer", "yoso"])
def test_model_that_heeds_padding_a_little_is_refused_in_any_precision(tmp_path, family):
    folder = save_family(tmp_path, family)
    for compute_dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="gives a text another result beside a longer one"):
            make_backbone(folder, compute_dtype=compute_dtype)


@pytest.mark.parametrize("quantization", ["nf4", None])
@pytest.mark.parametrize("model_type", tiny.CHANGING)
def test_family_that_would_change_itself_is_kept_from_it(
    tiny_model, corpus, model_type, quantization
):
    texts, labels = corpus
    options = {"quantization": quantization, "num_train_epochs": 1}
    clf = make_classifier(tiny_model(model_type), **options).fit(texts, labels)
    long = [" ".join(texts[:20])]
    expected = clf.predict_proba(long)
    clf.predict_proba(["a"])
    np.testing.assert_array_equal(clf.predict_proba(long), expected)
    make_classifier(tiny_model(model_type), lora_r=8, **options).fit(texts, labels).predict(texts)
    np.testing.assert_array_equal(clf.predict_proba(long), expected)
    again = make_classifier(tiny_model(model_type), **options).fit(texts, labels)
    np.testing.assert_array_equal(again.predict_proba(long), expected)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("big_bird", "draws random numbers when it is run"), ("rwkv", "changes its own 'blocks.0.")],
)
def test_base_that_a_run_changes_is_refused(tmp_path, monkeypatch, model_type, message):
    monkeypatch.setattr("skqlora.checkpoint.architecture.PINNED", {})
    folder = tiny.save_model(tmp_path, model_type)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"\({model_type}\) {message}"):
        make_backbone(folder, quantization=None, double_quant=False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (lambda n_tokens: True, "gives a text another result the second time"),
        (lambda n_tokens: n_tokens > 100, "gives a long text another result after a short"),
    ],
)
def test_base_that_remembers_what_it_ran_is_refused(tmp_path, monkeypatch, counted, message):
    forward = transformers.BertModel.forward

    def remembering(self, input_ids, **kwargs):
        self.n_runs = getattr(self, "n_runs", 0) + counted(input_ids.shape[1])
        output = forward(self, input_ids, **kwargs)
        output.last_hidden_state += self.n_runs
        return output

    monkeypatch.setattr(transformers.BertModel, "forward", remembering)
    with pytest.raises(ValueError, match=rf"\(bert\) {message}"):
        make_backbone(tiny.save_model(tmp_path, "bert"))


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder without a config\.json"):
        check_architecture(str(tmp_path), None, quantized=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", r"only an adapter of PEFT\. Call `QLoRAClassifier\.from_peft"),
        ("skqlora.json", r"that `save` wrote\. Call `QLoRAClassifier\.load"),
        (
            "model.Q4_K_M.gguf",
            r"only a GGUF file, which is not read\. Pass the model in safetensors",
        ),
    ],
)
def test_folder_of_something_else_says_what_it_is(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        make_classifier(str(tmp_path)).fit(["a", "b"], [0, 1])


def test_file_as_a_model_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_text("GGUF")
    with pytest.raises(ValueError, match=r"is a GGUF file, which is not read\. Wanted: the folder"):
        make_classifier(str(tmp_path / "model.gguf")).fit(["a", "b"], [0, 1])


def test_folder_with_a_broken_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match="could not be read"):
        check_architecture(str(tmp_path), None, quantized=True)


def test_offline_the_reason_is_that_of_what_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--me--odd"
    (cached / "snapshots" / "c0ffee").mkdir(parents=True)
    (cached / "snapshots" / "c0ffee" / "config.json").write_text('{"model_type": "odd"}')
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    with pytest.raises(
        ValueError, match=r"could not be read: .* of the family 'odd', which transformers"
    ):
        check_architecture("me/odd", None, quantized=True)
    with pytest.raises(ValueError, match=r"could not be read: It is not in the Hub's cache"):
        check_architecture("me/other", None, quantized=True)
    with pytest.raises(ValueError, match=r"Its revision='v2' is not in the Hub's cache"):
        check_architecture("me/odd", "v2", quantized=True)


def test_offline_a_model_without_its_weights_is_named(tmp_path, monkeypatch, encoder, corpus):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--bert" / "snapshots" / "c0ffee"
    shutil.copytree(encoder, snapshot)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "models--me--bert" / "refs").mkdir()
    (tmp_path / "models--me--bert" / "refs" / "main").write_text("c0ffee")
    with pytest.raises(ValueError, match=r"weights .* are not in the Hub's cache.*`hf download"):
        make_classifier("me/bert").fit(*corpus)


def test_an_empty_name_is_refused(corpus):
    with pytest.raises(ValueError, match=r"Got model=''\. Wanted: a folder"):
        make_classifier("").fit(*corpus)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_an_adapter_next_to_the_model_is_left_alone(tmp_path, decoder, corpus):
    expected = make_classifier(decoder, num_train_epochs=1).fit(*corpus).predict_proba(corpus[0])
    shutil.copytree(decoder, tmp_path / "both")
    base = transformers.AutoModel.from_pretrained(decoder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), "default")
    torch.nn.init.ones_(model.base_model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
    save_file(get_peft_model_state_dict(model), tmp_path / "both" / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path / "both")
    clf = make_classifier(str(tmp_path / "both"), num_train_epochs=1)
    with pytest.warns(UserWarning, match=r"holds an adapter of PEFT .* It is not read\."):
        clf.fit(*corpus)
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)


def test_address_of_the_hub_is_no_id():
    address = "https://huggingface.co/Qwen/Qwen3-0.6B-Base"
    with pytest.raises(ValueError, match=r"is a web address\. Pass 'Qwen/Qwen3-0\.6B-Base'"):
        check_architecture(address, None, quantized=True)


def test_folder_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"model='no/such/folder' is a folder that does not"):
        check_architecture("no/such/folder", None, quantized=True)


def test_code_from_the_repository_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}'
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="without running code from its repository"):
        check_architecture(str(tmp_path), None, quantized=True)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("bert", {"max_position_embeddings": 512}, 512),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ("gpt2", {"n_positions": 256}, 256),
        ("bloom", {}, None),
        ("llama", {"max_position_embeddings": 4096}, 4096),
        (
            "llama",
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            4096,
        ),
        (
            "phi3",
            {
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 1024,
                "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [4.0] * 8,
                    "original_max_position_embeddings": 1024,
                },
            },
            1024,
        ),
    ],
)
def test_positions_that_a_model_takes(tmp_path, model_type, settings, expected):
    folder = save_config(tmp_path, model_type, **SMALL | settings)
    assert check_architecture(folder, None, quantized=True).max_positions == expected
