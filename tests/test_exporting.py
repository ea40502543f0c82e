"""Classifiers in the formats of PEFT and Transformers, and from PEFT's: the same predictions."""

import contextlib
import json
import shutil

import bitsandbytes as bnb
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from helpers import (
    assert_equal_adapters,
    digest_of_base,
    draw_damage,
    make_backbone,
    make_classifier,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModelForSequenceClassification,
    get_peft_model,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

from skqlora import QLoRAClassifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"  # PEFT's own, with transformers 5.23
)
POOLING = {"bert": "pooler", "albert": "pooler"}
STOCK = ["bert", "albert", "llama", "gpt2", "gemma2", "opt"]


def fit(tiny_model, model_type, texts, labels, **params):
    pooling = POOLING.get(model_type, "auto")
    return make_classifier(tiny_model(model_type), pooling=pooling, **params).fit(texts, labels)


def padded(tokenizer, texts):
    encoding = tokenizer(list(texts), padding=True, return_tensors="pt")
    return {name: encoding[name] for name in ("input_ids", "attention_mask")}


# Transformers


@pytest.mark.parametrize("model_type", STOCK)
@pytest.mark.parametrize("params", [{}, {"use_dora": True}, {"quantization": None}], ids=str)
def test_transformers_predicts_the_same(tiny_model, texts, labels, model_type, params):
    clf = fit(tiny_model, model_type, texts, labels, **params)
    quantization = params.get("quantization", "nf4")
    double_quant = quantization is not None
    base = make_backbone(clf.model, quantization=quantization, double_quant=double_quant)
    before = digest_of_base(base.module)
    model, tokenizer = clf.to_transformers()
    assert digest_of_base(base.module) == before
    with torch.no_grad():
        logits = model(**padded(tokenizer, texts)).logits
    expected = clf.predict_proba(texts)
    np.testing.assert_allclose(torch.softmax(logits, 1), expected, rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "animal", 1: "colour", 2: "number"}


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_pipeline_runs_it_in_batches_with_the_names_of_the_labels(
    tiny_model, texts, labels, model_type
):
    clf = fit(tiny_model, model_type, texts, labels)
    model, tokenizer = clf.to_transformers()
    run = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    answers = run(texts.tolist(), top_k=None, batch_size=8)
    scores = [{answer["label"]: answer["score"] for answer in row} for row in answers]
    ours = clf.predict_proba(texts)
    for row, expected in zip(scores, ours, strict=True):
        np.testing.assert_allclose([row[label] for label in clf.classes_], expected, atol=1e-5)


def test_multilabel_classifiers_keep_their_sigmoids(tiny_model, texts, indicator):
    clf = fit(tiny_model, "llama", texts, indicator)
    model, tokenizer = clf.to_transformers()
    run = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    rows = run(texts[:4].tolist(), top_k=None)
    scores = [[{a["label"]: a["score"] for a in row}[label] for label in "01"] for row in rows]
    np.testing.assert_allclose(scores, clf.predict_proba(texts[:4]), atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_weights_are_the_rounded_sums(tiny_model, texts, labels, model_type, tmp_path):
    clf = fit(tiny_model, model_type, texts, labels, use_rslora=True)
    base = make_backbone(clf.model).module
    for dtype in ("float32", "bfloat16"):
        clf.merge(tmp_path / dtype, dtype=dtype)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / dtype, dtype=dtype)
        merged = merged.base_model.state_dict()
        for name, module in base.named_modules():
            if not isinstance(module, bnb.nn.Linear4bit):
                continue
            lora = clf.adapter_.lora_tensors
            a, b = (torch.tensor(lora[f"{name}.lora_{x}.default.weight"]) for x in ("A", "B"))
            dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            total = dense.float() + b @ a * clf.adapter_.lora.scaling
            weight = merged[f"{name}.weight"]
            weight = weight.T if model_type == "gpt2" else weight
            assert torch.equal(weight, total.to(getattr(torch, dtype)))


def test_a_merged_folder_is_a_plain_model(tiny_model, texts, labels, tmp_path, capsys, monkeypatch):
    clf = fit(tiny_model, "llama", texts, labels)
    clf.merge(tmp_path / "merged")
    assert "%" not in capsys.readouterr().err  # no progress bar
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        probabilities = torch.softmax(model(**padded(tokenizer, texts)).logits, 1)
    np.testing.assert_allclose(probabilities, clf.predict_proba(texts), rtol=0, atol=1e-5)
    with pytest.raises(FileExistsError, match="not empty"):
        clf.merge(tmp_path / "merged")
    with pytest.raises(ValueError, match="dtype='int8'"):
        clf.merge(tmp_path / "other", dtype="int8")

    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"could not be written.*No space"):
        clf.merge(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [
        ("bert", "mean"),
        ("bert", "cls"),
        ("roberta", "pooler"),
        ("granite", "last"),
        ("llama", "mean"),
    ],
)
def test_what_transformers_has_no_class_for_is_said(
    tiny_model, texts, labels, model_type, pooling, tmp_path
):
    clf = make_classifier(tiny_model(model_type), pooling=pooling, num_train_epochs=1)
    clf.fit(texts, labels)
    for export in (clf.to_transformers, lambda: clf.to_peft(tmp_path / "peft")):
        with pytest.raises(ValueError, match=rf"pooling='{pooling}'.*pooling='pooler'"):
            export()
    assert list(tmp_path.iterdir()) == []


# PEFT


@pytest.mark.parametrize("model_type", STOCK)
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_peft_loads_the_classifier(tiny_model, texts, labels, model_type, quantization, tmp_path):
    clf = fit(tiny_model, model_type, texts, labels, quantization=quantization)
    clf.to_peft(tmp_path / "peft")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score", "classifier"],
    )
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "peft",
        num_labels=3,
        pad_token_id=0,
        dtype=torch.float32,
        **{} if quantization is None else {"quantization_config": config},
    ).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would compute in bfloat16 nevertheless
    tokenizer = AutoTokenizer.from_pretrained(clf.model)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "right"
    with torch.no_grad():
        logits = model(**padded(tokenizer, texts)).logits
    np.testing.assert_allclose(logits, clf.decision_function(texts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_what_peft_trained_becomes_a_classifier(tiny_model, texts, model_type, targets, tmp_path):
    folder = tiny_model(model_type)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=0, dtype=torch.float32
    )
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=targets,
        init_lora_weights=False,
        lora_alpha=3,
        fan_in_fan_out=model_type == "gpt2",
    )
    theirs = get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    clf = QLoRAClassifier.from_peft(
        tmp_path / "peft", classes=["z", "x", "y"], quantization=None, compute_dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "right"
    with torch.no_grad():
        probabilities = torch.softmax(theirs(**padded(tokenizer, texts)).logits, 1).numpy()
    np.testing.assert_array_equal(clf.classes_, ["x", "y", "z"])
    np.testing.assert_allclose(
        clf.predict_proba(texts), probabilities[:, [1, 2, 0]], rtol=0, atol=1e-5
    )
    clf.to_peft(tmp_path / "again")
    clf.set_params(warm_start=True, num_train_epochs=1).fit(texts, ["x", "y", "z"] * 16)
    assert clf.n_iter_ == 1


def test_to_peft_and_back(tiny_model, texts, labels, tmp_path):
    clf = fit(tiny_model, "llama", texts, labels, use_dora=True)
    clf.to_peft(tmp_path / "peft")
    again = QLoRAClassifier.from_peft(
        tmp_path / "peft", classes=clf.classes_, compute_dtype="float32"
    )
    assert_equal_adapters(again, clf)
    np.testing.assert_array_equal(again.predict_proba(texts), clf.predict_proba(texts))
    again.save(tmp_path / "saved")
    assert_equal_adapters(QLoRAClassifier.load(tmp_path / "saved"), clf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, r"task_type='CAUSAL_LM'.*merge_and_unload"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"something_new": True}, "something_new=True"),
        ({"r": "4"}, "no 'r' of type int"),
        ({"modules_to_save": [["score"]]}, "modules_to_save holds what is no name"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save="),
    ],
)
def test_other_adapters_are_refused_by_name(tiny_model, texts, labels, tmp_path, change, message):
    clf = fit(tiny_model, "llama", texts, labels, num_train_epochs=1)
    clf.to_peft(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        QLoRAClassifier.from_peft(tmp_path / "peft")


def test_other_heads_are_refused_by_name(tiny_model, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("roberta"), num_labels=3)
    theirs = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4))
    assert isinstance(theirs, PeftModelForSequenceClassification)
    theirs.save_pretrained(tmp_path / "roberta")
    with pytest.raises(ValueError, match="no head named 'score' or 'classifier'"):
        QLoRAClassifier.from_peft(tmp_path / "roberta")
    decoder = AutoModelForCausalLM.from_config(
        AutoModelForSequenceClassification.from_pretrained(tiny_model("llama")).config
    )
    get_peft_model(decoder, LoraConfig(r=4)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="task_type=None"):
        QLoRAClassifier.from_peft(tmp_path / "lm")
    with pytest.raises(ValueError, match="has no adapter_config"):
        QLoRAClassifier.from_peft(tmp_path)


def test_a_reward_model_and_wrong_classes_are_refused(tiny_model, texts, labels, tmp_path):
    clf = fit(tiny_model, "llama", texts, labels, num_train_epochs=1)
    clf.to_peft(tmp_path / "peft")
    for classes in (["a", "b"], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="has 3 outputs"):
            QLoRAClassifier.from_peft(tmp_path / "peft", classes=classes)
    other = tiny.save_model(tmp_path / "narrow", "llama", hidden_size=32)
    with pytest.raises(ValueError, match="the base wants"):
        QLoRAClassifier.from_peft(tmp_path / "peft", model=other)
    fit(tiny_model, "bert", texts, labels, num_train_epochs=1).to_peft(tmp_path / "bert")
    with pytest.raises(ValueError, match="does not exist"):
        QLoRAClassifier.from_peft(tmp_path / "bert", model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"head named 'classifier', which model=.* has not"):
        QLoRAClassifier.from_peft(tmp_path / "bert", model=tiny_model("llama"))


def test_a_head_in_bfloat16_is_read_and_damaged_weights_are_named(
    tiny_model, texts, labels, tmp_path
):
    clf = fit(tiny_model, "llama", texts, labels, num_train_epochs=1)
    clf.to_peft(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())  # not mapped, since it is written anew
    head = "base_model.model.score.weight"
    safetensors.torch.save_file(tensors | {head: tensors[head].bfloat16()}, file)
    again = QLoRAClassifier.from_peft(tmp_path / "peft", compute_dtype="float32")
    np.testing.assert_allclose(again.predict_proba(texts), clf.predict_proba(texts), atol=1e-2)
    for damaged in (tensors | {head: tensors[head] * torch.nan}, None):
        if damaged is None:
            file.write_bytes(file.read_bytes()[:100])
        else:
            safetensors.torch.save_file(damaged, file)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*PeftModel"):
            QLoRAClassifier.from_peft(tmp_path / "peft")


def test_padding_is_never_what_a_text_ends_in(tiny_model, texts, labels, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", None, pieces)
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token is None
    clf = make_classifier(str(folder)).fit(texts, labels)
    model, tokenizer = clf.to_transformers()
    assert tokenizer.pad_token == "<unk>"
    with torch.no_grad():
        probabilities = torch.softmax(model(**padded(tokenizer, texts)).logits, 1)
    np.testing.assert_allclose(probabilities, clf.predict_proba(texts), rtol=0, atol=1e-5)


def test_exports_refuse_another_base_or_tokenizer(tiny_model, texts, labels, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    clf = make_classifier(str(folder), num_train_epochs=1).fit(texts, labels)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for export in (clf.to_transformers, lambda: clf.to_peft(tmp_path / "peft")):
        with pytest.raises(ValueError, match="tokenizer of model="):
            export()
    clf.set_params(model=tiny_model("mistral"))
    with pytest.raises(ValueError, match="is not the base that was fitted"):
        clf.to_peft(tmp_path / "peft")


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_peft_loads_variants_and_other_targets(tiny_model, texts, indicator, model_type, tmp_path):
    """DoRA and rsLoRA, two labels that a text may both have."""
    variant = {"use_dora": True, "use_rslora": True, "quantization": None}
    clf = fit(tiny_model, model_type, texts, indicator, **variant)
    clf.to_peft(tmp_path / "peft")
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "peft", num_labels=2, pad_token_id=0, dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(clf.model)
    tokenizer.pad_token, tokenizer.padding_side = "<pad>", "right"
    with torch.no_grad():
        logits = model(**padded(tokenizer, texts)).logits
    np.testing.assert_allclose(logits, clf.decision_function(texts), rtol=0, atol=1e-4)
    again = QLoRAClassifier.from_peft(
        tmp_path / "peft", multilabel=True, quantization=None, compute_dtype="float32"
    )
    np.testing.assert_array_equal(again.predict(texts), clf.predict(texts))


@pytest.fixture(scope="module")
def exported(tiny_model, corpus, tmp_path_factory):
    """The folder of a classifier in PEFT's format, not to be changed."""
    path = tmp_path_factory.mktemp("exported") / "peft"
    fit(tiny_model, "llama", *corpus, num_train_epochs=1).to_peft(path)
    return path


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_files_hold_only_our_errors_come_out(exported, tmp_path, data):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    (folder / name).write_bytes(draw_damage(data, (exported / name).read_bytes()))
    with contextlib.suppress(ValueError, OSError):
        QLoRAClassifier.from_peft(folder, compute_dtype="float32")
