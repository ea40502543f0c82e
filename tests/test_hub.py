"""What is said if the Hub does not give a model."""

import json
import shutil

import pytest
import tiny
from helpers import make_classifier
from httpx2 import Request, Response
from huggingface_hub import errors

from skqlora.checkpoint.architecture import check_architecture
from skqlora.text.tokenization import load_tokenizer


def answer(status):
    return {"response": Response(status, request=Request("GET", "https://huggingface.co/me/x"))}


def failing(monkeypatch, error):
    """Let the Hub's library raise an error at each download."""

    def download(*_, **__):
        kind, status = error
        raise kind("raw text", **({} if status is None else answer(status)))

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"transformers.utils.hub.{name}", download)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((errors.RepositoryNotFoundError, 404), r"no such model on the Hub.*hf auth login"),
        ((errors.GatedRepoError, 403), r"accepted its terms.*huggingface\.co/me/x.*auth login"),
        ((errors.RevisionNotFoundError, 404), r"no revision='v2' on the Hub\. Pass a branch"),
        ((errors.LocalEntryNotFoundError, None), "Its revision='v2' is not in the Hub's cache"),
        ((errors.OfflineModeIsEnabled, None), "Its revision='v2' is not in the Hub's cache"),
        ((errors.HFValidationError, None), "neither a folder nor of the form of an id"),
        ((errors.RemoteEntryNotFoundError, 404), r"has no config\.json\. Repositories of adapters"),
        ((errors.HfHubHTTPError, 503), r"The Hub answered with 503\. Try again later"),
    ],
)
def test_each_kind_of_failure_has_a_plain_message(monkeypatch, error, message, offline):
    monkeypatch.setattr("skqlora._utils.hub.is_offline_mode", lambda: offline)
    failing(monkeypatch, error)
    with pytest.raises(ValueError, match=message) as found:
        check_architecture("me/x", "v2", quantized=True)
    said = str(found.value)
    assert "model id of the Hugging Face Hub ('organisation/name')" in said
    assert not {"raw text", "token=", "HTTPError"} & set(said.split())
    if "cache" in message:
        assert ("HF_HUB_OFFLINE" if offline else "cannot be reached. Check the network") in said


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"does not accept the token .*`hf auth login`"),
        (403, r"The Hub gives no permission to read it\."),
        (429, r"The Hub answered with 429\. Try again later\."),
        (500, r"The Hub answered with 500\. Try again later\."),
    ],
)
def test_answer_of_the_hub_is_told_though_its_library_wraps_it(monkeypatch, status, message):
    def answering(*_, **__):
        raise errors.HfHubHTTPError("raw text", **answer(status))

    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", answering)
    with pytest.raises(ValueError, match=message) as found:
        check_architecture("me/x", None, quantized=True)
    assert "raw text" not in str(found.value)
    assert "network" not in str(found.value)


ODD_CODE = {"AutoConfig": "odd.OddConfig"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "odd"}, r"family 'odd', which transformers \d.* does not know"),
        ({"model_type": "odd", "auto_map": None}, "family 'odd', which transformers"),
        ({"model_type": "odd", "auto_map": 5}, "family 'odd', which transformers"),
        ({"model_type": "odd", "auto_map": ODD_CODE}, "code of its own, which is never run"),
        ({"auto_map": ODD_CODE}, "code of its own, which is never run"),
        ({"model_type": "llama", "auto_map": ODD_CODE, "hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 8}, r"Its config\.json names no model_type"),
        ({}, r"Its config\.json names no model_type"),
        ({"model_type": ["a"]}, r"Its config\.json has the model_type \['a'\], which is no text"),
        ([], r"Its config\.json is no JSON object"),
        (["model_type"], r"Its config\.json is no JSON object"),
    ],
)
def test_configuration_that_is_of_no_known_family(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        check_architecture(str(tmp_path), None, quantized=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_folder_without_a_tokenizer_has_no_raw_text(tiny_model, tmp_path, family):
    folder = tmp_path / "mute"
    shutil.copytree(tiny_model(family), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(
        ValueError, match=r"has no tokenizer .*`tokenizer\.save_pretrained"
    ) as found:
        make_classifier(str(folder)).fit(["a", "b"], [0, 1])
    assert str(found.value).endswith("writes them.")


def test_damaged_tokenizer_says_what_is_wrong(tmp_path):
    folder = tiny.save_model(tmp_path, "bert")
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"has no tokenizer .*\(Expecting property name"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["spm.model", "sentencepiece.model"])
def test_library_that_a_tokenizer_needs_is_named(tmp_path, monkeypatch, file):
    def missing(*_, **__):
        raise ValueError("`tiktoken` is required. Install it with `pip install tiktoken`.")

    (tmp_path / file).write_bytes(b"\0")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(ValueError, match=r"has no tokenizer .*\(.*`pip install tiktoken`\.\)"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_that_the_hub_keeps_back_is_explained(monkeypatch):
    failing(monkeypatch, (errors.GatedRepoError, 403))
    with pytest.raises(ValueError, match=r"has no tokenizer .*\(.*accepted its terms"):
        load_tokenizer("me/x")
