"""The example of a service."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from helpers import make_classifier

from skqlora import backbone_cache_info, clear_backbone_cache


@pytest.fixture(scope="module")
def serving():
    path = Path(__file__).parent.parent / "examples" / "serving" / "app.py"
    spec = importlib.util.spec_from_file_location("serving_app", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_app"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(encoder, corpus, tmp_path_factory):
    """Two classifiers of one base: of topics, and of several labels."""
    texts, labels = corpus
    folder = tmp_path_factory.mktemp("classifiers")
    make_classifier(encoder).fit(texts, labels).save(folder / "topics")
    several = np.array(
        [[label == "sea", len(text) > 30] for text, label in zip(texts, labels, strict=True)]
    )
    make_classifier(encoder).fit(texts, several.astype(int)).save(folder / "several")
    (folder / "notes").mkdir()  # no classifier
    return folder


@pytest.fixture
def client(serving, folder):
    with TestClient(serving.create_app(folder)) as client:
        yield client


def test_answers_are_those_of_the_classifier(client, folder, corpus):
    from skqlora import QLoRAClassifier

    texts = corpus[0][:5]
    clf = QLoRAClassifier.load(folder / "topics")
    answer = client.post("/classifiers/topics", json={"texts": texts}).json()
    assert answer["classes"] == clf.classes_.tolist()
    assert answer["labels"] == clf.predict(texts).tolist()
    np.testing.assert_allclose(answer["probabilities"], clf.predict_proba(texts), rtol=1e-5)


def test_several_labels_of_a_text(client, corpus):
    answer = client.post("/classifiers/several", json={"texts": corpus[0][:5]}).json()
    expected = [
        [name for name, p in zip(answer["classes"], row, strict=True) if p > 0.5]
        for row in answer["probabilities"]
    ]
    assert answer["labels"] == expected


def test_classifiers_share_one_base(serving, folder):
    clear_backbone_cache()
    before = backbone_cache_info().misses
    with TestClient(serving.create_app(folder)) as client:
        assert client.get("/health").json() == {"classifiers": 2, "bases": 1}
        assert set(client.get("/classifiers").json()) == {"topics", "several"}
    assert backbone_cache_info().misses == before + 1


def test_waiting_requests_go_into_one_call(client, corpus):
    texts = corpus[0][:8]
    alone = [client.post("/classifiers/topics", json={"texts": [text]}).json() for text in texts]
    batcher = client.app.state.batcher
    before = batcher.n_calls
    with ThreadPoolExecutor(8) as threads:
        together = list(
            threads.map(
                lambda text: client.post("/classifiers/topics", json={"texts": [text]}).json(),
                texts * 4,
            )
        )
    assert batcher.n_calls - before < len(texts) * 4
    for one, other in zip(alone * 4, together, strict=True):
        assert one["labels"] == other["labels"]
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("other", {"texts": ["text"]}, 404, "There is no classifier 'other'"),
        ("..%2Fnotes", {"texts": ["text"]}, 404, "Not Found"),
        ("topics", {"texts": []}, 422, "at least 1 item"),
        ("topics", {"texts": ["text"] * 65}, 422, "at most 64 items"),
        ("topics", {"texts": ["x" * 20_001]}, 422, "at most 20000 characters"),
        ("topics", {"texts": "text"}, 422, "valid list"),
        ("topics", {"texts": [1]}, 422, "valid string"),
        ("topics", {"texts": ["x" * 20_000] * 60}, 413, "more than 1,000,000 bytes"),
    ],
)
def test_bad_requests_are_refused(client, path, body, status, why):
    response = client.post(f"/classifiers/{path}", json=body)
    assert response.status_code == status
    assert why in response.text


def test_too_many_waiting_texts_are_turned_away(client, serving, monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 1)
    response = client.post("/classifiers/topics", json={"texts": ["one", "two"]})
    assert (response.status_code, "Too many texts" in response.text) == (503, True)


def test_a_request_that_fails_leaves_the_next_one_alone(client, monkeypatch):
    clf = client.app.state.batcher.classifiers["topics"]

    def fail(texts):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(clf, "predict_proba", fail, raising=False)
        with pytest.raises(RuntimeError, match="broken"):
            client.post("/classifiers/topics", json={"texts": ["text"]})
    assert client.post("/classifiers/topics", json={"texts": ["text"]}).status_code == 200
