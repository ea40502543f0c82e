r"""
A small service: classifiers of one base behind HTTP.

Serves every folder of a folder that `QLoRAClassifier.save` wrote. All classifiers share one frozen
base. Requests that come in while another one computes wait together, and go into one call for each
classifier. Nothing is ever unpickled, and nothing can be uploaded::

    pip install "skqlora[serving]"
    SKQLORA_CLASSIFIERS=folder uvicorn --app-dir examples/serving app:app
    curl localhost:8000/classifiers/tickets -H 'Content-Type: application/json' \
        -d '{"texts": ["Where is my card?"]}'
"""

import asyncio
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from skqlora import QLoRAClassifier, backbone_cache_info

MAX_TEXTS = 64  # of a request
MAX_CHARACTERS = 20_000  # of a text
MAX_BYTES = 1_000_000  # of a request's body
MAX_WAITING = 1_000  # texts, before requests are turned away

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class Request(BaseModel):
    """Texts to classify."""

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Answer(BaseModel):
    """A label and the probabilities of all classes for each text.

    For several labels of a text, `labels` are those above 0.5.
    """

    classes: list[str]
    labels: list[str] | list[list[str]]
    probabilities: list[list[float]]


class Batcher:
    """Puts the texts of waiting requests into one call for each classifier.

    Parameters
    ----------
    classifiers : dict of str to QLoRAClassifier
    """

    def __init__(self, classifiers):
        self.classifiers = classifiers
        self.n_calls = 0
        self._waiting = []  # (name, texts, future)
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)  # the base computes for one at a time anyway

    async def predict_proba(self, name, texts):
        """Return an array of shape (n_texts, n_classes), once its turn has come."""
        if sum(len(waiting) for _, waiting, _ in self._waiting) + len(texts) > MAX_WAITING:
            raise HTTPException(503, "Too many texts are waiting. Try again later.")
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((name, texts, future))
        self._arrival.set()
        return await future

    async def run(self):
        """Compute for ever."""
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            taken, self._waiting = self._waiting, []
            by_name = defaultdict(list)
            for name, texts, future in taken:
                by_name[name].append((texts, future))
            for name, requests in by_name.items():
                await self._compute(name, requests)

    async def _compute(self, name, requests):
        texts = [text for texts, _ in requests for text in texts]
        self.n_calls += 1
        loop = asyncio.get_running_loop()
        try:
            proba = await loop.run_in_executor(
                self._thread, self.classifiers[name].predict_proba, texts
            )
        except Exception as error:  # each request hears of it; the next ones are computed
            for _, future in requests:
                if not future.done():
                    future.set_exception(error)
            return
        start = 0
        for texts, future in requests:
            if not future.done():  # its client may be gone
                future.set_result(proba[start : start + len(texts)])
            start += len(texts)


class BodyLimit:
    """ASGI middleware that stops reading a request's body once it is too long."""

    def __init__(self, app, max_bytes):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope, receive, send):
        """Pass the request on, counting."""
        n_bytes = 0

        async def counted():
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                raise HTTPException(413, f"The body has more than {self.max_bytes:,} bytes.")
            return message

        await self.app(scope, counted, send)


def create_app(folder):
    """Make the service.

    Parameters
    ----------
    folder : path
        Of folders that `QLoRAClassifier.save` wrote; their names are those of the classifiers.
    """

    @asynccontextmanager
    async def lifespan(app):
        classifiers = {
            path.name: QLoRAClassifier.load(path)
            for path in sorted(Path(folder).iterdir())
            if (path / "skqlora.json").exists()
        }
        app.state.batcher = Batcher(classifiers)
        for clf in classifiers.values():  # reads the base before the first request
            await asyncio.to_thread(clf.predict_proba, ["warm up"])
        task = asyncio.create_task(app.state.batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="skqlora", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=MAX_BYTES)

    @app.get("/health")
    async def health():
        info = backbone_cache_info()
        return {"classifiers": len(app.state.batcher.classifiers), "bases": info.n_backbones}

    @app.get("/classifiers")
    async def list_classifiers():
        return {name: names_of(clf) for name, clf in app.state.batcher.classifiers.items()}

    @app.post("/classifiers/{name}")
    async def classify(name: str, request: Request) -> Answer:
        batcher = app.state.batcher
        if name not in batcher.classifiers:
            raise HTTPException(404, f"There is no classifier {name!r}.")
        classes = names_of(batcher.classifiers[name])
        proba = await batcher.predict_proba(name, request.texts)
        if batcher.classifiers[name].multilabel_:
            labels = [[classes[i] for i in row.nonzero()[0]] for row in proba > 0.5]
        else:
            labels = [classes[i] for i in proba.argmax(axis=1)]
        return Answer(classes=classes, labels=labels, probabilities=proba.tolist())

    return app


def names_of(clf):
    """Return the classes as text, in the order of the probabilities."""
    return [str(label) for label in clf.classes_.tolist()]


def __getattr__(name):
    """Make `app` when uvicorn asks for it, of the folder that the environment names."""
    if name != "app":
        raise AttributeError(name)
    return create_app(os.environ["SKQLORA_CLASSIFIERS"])
