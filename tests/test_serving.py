"""The example of a service."""

import importlib.util
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from helpers import make_classifier

from skqlora import QLoRAClassifier, backbone_cache_info, clear_backbone_cache


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
    texts = corpus[0][:5]
    clf = QLoRAClassifier.load(folder / "topics")
    answer = client.post("/classifiers/topics", json={"texts": texts}).json()
    assert answer["classes"] == clf.classes_.tolist()
    assert answer["labels"] == clf.predict(texts).tolist()
    np.testing.assert_allclose(answer["probabilities"], clf.predict_proba(texts), rtol=1e-5)


def test_rows_of_a_table(serving, encoder, corpus, tmp_path):
    texts, labels = corpus
    frame = pd.DataFrame({"title": texts, "price": np.arange(len(texts)) / 4})
    clf = make_classifier(encoder, num_train_epochs=1, prompt="{price:.2f} {title}")
    clf.fit(frame, labels).save(tmp_path / "products")
    rows = frame[["price", "title"]][:5].to_dict("records")
    with TestClient(serving.create_app(tmp_path)) as client:
        answer = client.post("/classifiers/products", json={"texts": rows}).json()
        for wrong in (texts[:2], [{"title": "a"}], [{"title": "a", "price": None}]):
            refused = client.post("/classifiers/products", json={"texts": wrong})
            assert refused.status_code == 422
    np.testing.assert_allclose(answer["probabilities"], clf.predict_proba(frame[:5]), rtol=1e-5)


def test_rows_of_a_table_without_names(serving, encoder, corpus, tmp_path):
    texts, labels = corpus
    rows = [(text, number) for number, text in enumerate(texts)]
    clf = make_classifier(encoder, num_train_epochs=1, prompt="{1:.1f} {0}").fit(rows, labels)
    clf.save(tmp_path / "rows")
    with TestClient(serving.create_app(tmp_path)) as client:

        def post(*texts):
            return client.post("/classifiers/rows", json={"texts": texts})

        answer = post({"0": texts[0], "1": 0}, {"0": texts[1], "1": 1.0}).json()
        assert post({"0": "a", "1": "no number"}).status_code == 422
    np.testing.assert_allclose(answer["probabilities"], clf.predict_proba(rows[:2]), rtol=1e-5)


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
        assert client.get("/health").json() == {"classifiers": 2, "bases": 1, "texts": 0}
        assert set(client.get("/classifiers").json()) == {"topics", "several"}
    assert backbone_cache_info().misses == before + 1


class Held:
    """A classifier whose first call lasts until it is let go."""

    def __init__(self, clf):
        self.clf = clf
        self.began, self.go_on = threading.Event(), threading.Event()
        self.calls = []

    def predict_proba(self, texts):
        self.calls.append(list(texts))
        if len(self.calls) == 1:
            self.began.set()
            assert self.go_on.wait(60)
        if "bad" in texts:
            raise ValueError("bad")
        return self.clf.predict_proba(texts)

    def __getattr__(self, name):
        return getattr(self.clf, name)


@pytest.fixture
def held(client):
    batcher = client.app.state.batcher
    held = batcher.classifiers["topics"] = Held(batcher.classifiers["topics"])
    yield held
    held.go_on.set()


def post_while_held(client, held, requests, then):
    """Answers of requests that come in while another one is computed."""

    def post(texts):
        return client.post("/classifiers/topics", json={"texts": texts})

    with ThreadPoolExecutor(1 + len(requests)) as threads:
        first = threads.submit(post, ["first"])
        assert held.began.wait(60)
        answers = [threads.submit(post, texts) for texts in requests]
        while client.app.state.batcher.n_texts < 1 + sum(map(len, requests)):
            time.sleep(0.01)
        then()
        return first.result(), [answer.result() for answer in answers]


def test_requests_that_wait_go_into_one_call(client, held, corpus):
    texts = corpus[0][:8]
    _, answers = post_while_held(client, held, [[text] for text in texts], held.go_on.set)
    assert [sorted(call) for call in held.calls] == [["first"], sorted(texts)]
    expected = held.clf.predict_proba(texts)
    got = np.concatenate([answer.json()["probabilities"] for answer in answers])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_call_is_not_arbitrarily_long(client, held, serving):
    requests = [[f"{i} {j}" for j in range(50)] for i in range(4)]
    post_while_held(client, held, requests, held.go_on.set)
    assert [len(call) for call in held.calls] == [1, 100, 100]
    assert serving.MAX_TEXTS_OF_A_CALL < 150


def test_only_the_request_at_fault_fails(folder, serving):
    with TestClient(serving.create_app(folder), raise_server_exceptions=False) as client:
        batcher = client.app.state.batcher
        held = batcher.classifiers["topics"] = Held(batcher.classifiers["topics"])
        _, answers = post_while_held(client, held, [["good"], ["bad"], ["fine"]], held.go_on.set)
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert client.get("/health").json()["texts"] == 0


def test_requests_do_not_wait_for_ever(client, held, serving, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(serving, "MAX_SECONDS", 5)
        first, [second] = post_while_held(client, held, [["second"]], lambda: None)
    assert (first.status_code, second.status_code) == (504, 504)
    held.go_on.set()
    assert client.post("/classifiers/topics", json={"texts": ["third"]}).status_code == 200
    assert held.calls == [["first"], ["third"]]  # nobody waits for the second


def test_waiting_requests_hear_of_a_shutdown(client, held):
    def shut_down():
        client.portal.call(client.app.state.batcher.close)

    first, [second] = post_while_held(client, held, [["second"]], shut_down)
    assert (first.status_code, second.status_code) == (503, 503)
    assert client.get("/health").status_code == 503


def test_app_that_uvicorn_asks_for(serving, folder, monkeypatch):
    monkeypatch.setenv("SKQLORA_CLASSIFIERS", str(folder))
    with TestClient(serving.app) as client:
        assert set(client.get("/classifiers").json()) == {"topics", "several"}


def test_app_says_what_it_wants(serving, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("SKQLORA_CLASSIFIERS", raising=False)
    with pytest.raises(RuntimeError, match="Got SKQLORA_CLASSIFIERS=''"):
        _ = serving.app
    for wrong, message in (
        (tmp_path, "holds no folders that `QLoRAClassifier.save` wrote"),
        (
            folder / "topics",
            "topics' is itself a saved classifier. Pass the folder that contains it",
        ),
    ):
        with (
            pytest.raises(RuntimeError, match=re.escape(message)),
            TestClient(serving.create_app(wrong)),
        ):
            pass


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("other", {"texts": ["text"]}, 404, "There is no classifier 'other'"),
        ("notes", {"texts": ["text"]}, 404, "There is no classifier 'notes'"),
        ("topics", {"texts": []}, 422, "at least 1 item"),
        ("topics", {"texts": ["text"] * 65}, 422, "at most 64 items"),
        ("topics", {"texts": ["x" * 5_001]}, 422, "at most 5000 characters"),
        ("topics", {"texts": "text"}, 422, "valid list"),
        ("topics", {"texts": [1]}, 422, "valid string"),
        ("topics", {"texts": ["x" * 5_000] * 401}, 413, "more than 2,000,000 bytes"),
    ],
)
def test_bad_requests_are_refused(client, path, body, status, why):
    response = client.post(f"/classifiers/{path}", json=body)
    assert response.status_code == status
    assert why in response.text


@pytest.mark.parametrize(
    "body", ['{"texts": ["\\ud800"]}', '{"texts": [NaN]}', '{"texts": [1e999]}']
)
def test_what_is_no_text_is_refused(client, body):
    response = client.post(
        "/classifiers/topics", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][:2] == ["body", "texts"]


def test_a_refusal_does_not_repeat_what_came(client):
    response = client.post("/classifiers/topics", json={"texts": [1] * 100_000})
    assert response.status_code == 422
    assert len(response.content) < 2_000


def test_body_that_comes_in_parts_is_counted(client):
    parts = (b"x" * 100_000 for _ in range(30))
    response = client.post("/classifiers/topics", content=parts)
    assert response.status_code == 413


def test_too_many_waiting_texts_are_turned_away(client, serving, monkeypatch):
    monkeypatch.setattr(serving, "MAX_TEXTS_IN_ALL", 1)
    response = client.post("/classifiers/topics", json={"texts": ["one", "two"]})
    assert (response.status_code, "Too many texts" in response.text) == (503, True)
