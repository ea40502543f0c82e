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
        ((errors.RemoteEntryNotFoundError, 404), r"has no config\.json, as one of adapters"),
        ((errors.HfHubHTTPError, 503), r"answered with an error\. Try again later"),
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
    ("config", "message"),
    [
        ({"model_type": "odd"}, r"family 'odd', which transformers \d.* does not know"),
        ({}, r"Its config\.json names no model_type"),
        (
            {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}},
            "code of its own, which is never run",
        ),
    ],
)
def test_family_that_is_not_known(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8}))
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


def test_tokenizer_that_the_hub_keeps_back_is_explained(monkeypatch):
    failing(monkeypatch, (errors.GatedRepoError, 403))
    with pytest.raises(ValueError, match=r"has no tokenizer .*\(.*accepted its terms"):
        load_tokenizer("me/x")
