"""Of a checkpoint of more than text the text model is read; of an encoder-decoder, the encoder."""

import json
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import make_backbone, make_classifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from skqlora import QLoRAClassifier, estimate_memory
from skqlora.model.backbone import _count_bytes

UNQUANTIZED = {"quantization": None, "double_quant": False}
WHOLES = [*tiny.TOWERS, *tiny.ENCODER_DECODERS]
IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a tiny model of more than text, and the model, written once."""
    made = {}

    def folder_and_model(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = str(folder), tiny.save_whole(folder, model_type)
        return made[model_type]

    return folder_and_model


def text_model_of(model):
    """The part of a whole model that computes hidden states of texts."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder)  # Llama 4's decoder has a head


def change_tensors(folder, change):
    """Let a function change the tensors of a checkpoint of one file."""
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", WHOLES)
def test_hidden_states_are_those_of_the_whole_model(whole, model_type):
    folder, model = whole(model_type)
    base = make_backbone(folder, **UNQUANTIZED)
    with torch.no_grad():
        expected = text_model_of(model)(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]
        found = base.module(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert base.causal == (not model.config.is_encoder_decoder)


@pytest.mark.parametrize("model_type", WHOLES)
def test_family_takes_a_step(whole, corpus, model_type):
    folder, model = whole(model_type)
    clf = make_classifier(folder, num_train_epochs=1, lora_dropout=0.1).fit(*corpus)
    assert clf.adapter_.pooling == ("mean" if model.config.is_encoder_decoder else "last")
    assert 4.126 <= clf.footprint_.bits_per_quantized_parameter <= 4.14
    b = [value for name, value in clf.adapter_.lora_tensors.items() if "lora_B" in name]
    assert all(np.abs(value).max() > 0 for value in b)
    first = clf.predict_proba(corpus[0])
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), first)
    estimated = estimate_memory(folder, device="cpu", compute_dtype="float32")
    assert estimated.base == _count_bytes(make_backbone(folder).module)


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen3_5_moe", "t5"])
def test_nothing_but_the_text_model_is_read(whole, model_type):
    folder, _ = whole(model_type)
    loading, fingerprint = transformers.core_model_loading, "skqlora.checkpoint.fingerprint"
    read = []

    def materialize(tensor, *args):
        values = original(tensor, *args)
        read.append(values.nbytes)
        return values

    hashed = []
    original = loading._materialize_copy
    with (
        patch.object(loading, "_materialize_copy", materialize),
        patch(f"{fingerprint}._digest_of_values", lambda _, name: hashed.append(name) or b""),
    ):
        module = make_backbone(folder, **UNQUANTIZED, attn_implementation="eager").module
    tensors = {id(t): t for t in module.parameters()}.values()
    assert sum(read) == sum(t.nbytes for t in tensors)
    assert not any("vision" in name or "visual" in name or "decoder" in name for name in hashed)
    assert len(hashed) >= len(list(tensors))


def test_only_the_text_model_counts_for_the_fingerprint(tmp_path):
    tiny.save_whole(tmp_path, "llava")
    expected = make_backbone(tmp_path).fingerprint

    def blind(tensors):
        for name in tensors:
            if "vision" in name:
                tensors[name].zero_()

    change_tensors(tmp_path, blind)
    assert make_backbone(str(tmp_path)).fingerprint == expected
    change_tensors(tmp_path, lambda tensors: tensors[text_name(tensors)].add_(1))
    assert make_backbone(str(tmp_path)).fingerprint != expected


def text_name(tensors):
    """The name of a weight of the text model."""
    return next(name for name in tensors if "language_model" in name and "q_proj" in name)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "llava", "llama4"])
def test_saved_loaded_and_merged(whole, corpus, tmp_path, model_type):
    folder, _ = whole(model_type)
    texts, labels = corpus
    clf = make_classifier(folder, num_train_epochs=1).fit(texts, labels)
    expected = clf.predict_proba(texts)
    clf.save(tmp_path / "saved")
    loaded = QLoRAClassifier.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.predict_proba(texts), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"holds more than the text model.*`merge` writes one"):
        clf.to_peft(tmp_path / "peft")
    text = make_backbone(folder).module.config
    if type(text) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.raises(ValueError, match="Transformers has no class of its own"):
            clf.merge(tmp_path / "merged")
        return
    clf.merge(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert "vision_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    np.testing.assert_allclose(logits.numpy(), clf.decision_function(texts), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "llava"])
def test_class_names_are_the_whole_models_guess(tmp_path, corpus, model_type, tied):
    model = tiny.save_whole(tmp_path, model_type, tie_word_embeddings=tied)
    labels = np.array(["cat", "red"])
    hardly = {"num_train_epochs": 1, "learning_rate": 1e-12, "head_learning_rate": 1e-12}
    start = {"init_head_weights": "class_names", "prompt": "{text} is"}
    clf = make_classifier(tmp_path, quantization=None, **start, **hardly)
    texts = corpus[0][:6]
    clf.set_params(model=str(tmp_path)).fit(texts, labels[np.arange(6) % 2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = tokenizer(f"{text} is", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        guess = [
            logits[tokenizer(f" {label}", add_special_tokens=False)["input_ids"]].mean().item()
            for label in ("cat", "red")
        ]
        expected = guess[1] - guess[0]
        np.testing.assert_allclose(clf.decision_function([text])[0], expected, atol=1e-4)


def test_several_text_models_are_told_apart(tmp_path):
    model = tiny.save_whole(tmp_path, "llava")
    expected = make_backbone(str(tmp_path), **UNQUANTIZED)

    def speak(tensors):
        name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors["talker.model.embed_tokens.weight"] = tensors[name] + 1

    change_tensors(tmp_path, speak)
    found = make_backbone(str(tmp_path), **UNQUANTIZED)
    assert torch.equal(found.module.embed_tokens.weight, expected.module.embed_tokens.weight)
    assert torch.equal(found.module.embed_tokens.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(text_name(tensors)),
            r"lacks 1 weights of LlamaModel, e\.g\. 'layers\.0\.self_attn\.q_proj\.weight'",
        ),
        (
            lambda tensors: tensors.update(
                {text_name(tensors).replace("q_proj", "z_proj"): torch.zeros(2)}
            ),
            r"no place for 1 tensors of its part .*z_proj.* Wanted: a checkpoint of the",
        ),
        (
            lambda tensors: [
                tensors.update({name.replace("embed_tokens", "words"): tensors.pop(name)})
                for name in list(tensors)
            ],
            r"none of its \d+ tensors is named like embed_tokens\.weight",
        ),
        (
            lambda tensors: tensors.update({text_name(tensors): torch.zeros(32, 64)}),
            r"q_proj\.weight' is of shape \(32, 64\) in the checkpoint\. Wanted: \(64, 64\)",
        ),
    ],
)
def test_checkpoint_whose_text_model_does_not_fit_is_refused(tmp_path, change, message):
    tiny.save_whole(tmp_path, "llava")
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        make_backbone(str(tmp_path))


def test_encoder_whose_family_has_none_is_refused(tmp_path):
    transformers.BartConfig(d_model=64, encoder_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(bart\) is an encoder-decoder, of whose encoder "):
        make_classifier(str(tmp_path)).fit(["a", "b"], [0, 1])


def test_encoder_that_was_saved_alone(tmp_path, corpus):
    model = tiny.save_whole(tmp_path / "whole", "t5")
    expected = make_backbone(str(tmp_path / "whole"))
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "whole")
    encoder.save_pretrained(tmp_path / "alone")
    tiny.make_tokenizer("encoder").save_pretrained(tmp_path / "alone")
    found = make_backbone(str(tmp_path / "alone"))
    assert model.config.is_encoder_decoder
    with torch.no_grad():
        assert torch.equal(found.module(IDS)[0], expected.module(IDS)[0])
    make_classifier(str(tmp_path / "alone"), num_train_epochs=1).fit(*corpus)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        ("model.safetensors.index.json", b"{}", "it has no valid weight_map"),
        ("model.safetensors.index.json", b"{", "it has no valid weight_map"),
    ],
)
@pytest.mark.parametrize("model_type", ["llava", "llama"])
def test_damaged_files_are_named(tmp_path, model_type, name, content, message):
    save = tiny.save_whole if model_type == "llava" else tiny.save_model
    save(tmp_path, model_type)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is .*{message}"):
        make_backbone(str(tmp_path))


@pytest.mark.parametrize("model_type", ["llava", "llama", "bert"])
def test_tensor_of_another_shape_is_named(tmp_path, model_type):
    save = tiny.save_whole if model_type == "llava" else tiny.save_model
    save(tmp_path, model_type)
    tables = "embed_tokens.weight", "word_embeddings.weight"

    def cut(tensors):
        name = next(name for name in tensors if name.endswith(tables))
        tensors[name] = tensors[name][:100].clone()

    change_tensors(tmp_path, cut)
    message = r"embed\w*\.weight' in '.*model\.safetensors' is of shape \(100, 64\), and config"
    with pytest.raises(ValueError, match=message):
        make_backbone(str(tmp_path))


def test_folder_without_weights(tmp_path):
    tiny.save_whole(tmp_path, "llava")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"but no weights\. Wanted: all files of a model"):
        make_backbone(str(tmp_path))


def test_t5_keeps_all_of_its_linear_layers_in_4_bits(whole, corpus):
    folder, _ = whole("t5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf = make_classifier(folder, num_train_epochs=1).fit(*corpus)
    module = make_backbone(folder).module
    n_linear = sum(
        m.in_features * m.out_features for m in module.modules() if isinstance(m, torch.nn.Linear)
    )
    assert clf.footprint_.quantized_parameters == n_linear
