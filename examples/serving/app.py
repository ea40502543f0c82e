r"""
A small service: classifiers of one base behind HTTP.

Serves all classifiers that `QLoRAClassifier.save` wrote into one folder, each of them into a folder
of its own. `SKQLORA_CLASSIFIERS` is the folder that contains theirs. Classifiers of the same base
share it. Requests that come in while others are computed wait together, and those of a classifier
go into one call. Nothing is ever unpickled, and nothing can be uploaded::

    pip install ".[serving]"
    python -c "...; clf.save('classifiers/tickets')"
    SKQLORA_CLASSIFIERS=classifiers uvicorn --app-dir examples/serving app:app
    curl localhost:8000/classifiers/tickets -H 'Content-Type: application/json' \
        -d '{"texts": ["Where is my card?"]}'

For a classifier of several columns a text is an object with their names, such as
``{"title": "Card", "body": "Where is it?"}``.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from skqlora import QLoRAClassifier, backbone_cache_info

MAX_TEXTS = 64  # of a request
MAX_CHARACTERS = 5_000  # of a text, of which a model reads some hundred tokens
MAX_BYTES = 2_000_000  # of a request's body: as many characters as that are, escaped as JSON may
MAX_TEXTS_OF_A_CALL = 128
MAX_TEXTS_IN_ALL = 1_000  # that wait or are computed, before requests are turned away
MAX_SECONDS = 30  # that a request waits for its answer

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Row = Annotated[dict[str, Text | bool | int | float], Field(max_length=100)]


class Request(BaseModel):
    """Texts to classify, or rows of a table."""

    texts: Annotated[list[Text] | list[Row], Field(min_length=1, max_length=MAX_TEXTS)]


class Answer(BaseModel):
    """A label and the probabilities of all classes for each text.

    For several labels of a text, `labels` are those above 0.5, and classes are the numbers of the
    columns that were fitted.
    """

    classes: list[str]
    labels: list[str] | list[list[str]]
    probabilities: list[list[float]]


@dataclass(eq=False)
class Waiting:
    """A request that waits for its answer."""

    name: str
    texts: list
    answer: asyncio.Future


class Batcher:
    """Puts the texts of waiting requests into one call of their classifier.

    Parameters
    ----------
    classifiers : dict of str to QLoRAClassifier

    Attributes
    ----------
    n_calls : int
        Calls of classifiers so far.
    """

    def __init__(self, classifiers):
        self.classifiers = classifiers
        self.n_calls = 0
        self._unanswered = set()
        self._queue = []  # those of them that no call has taken yet
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)  # a call uses all cores, or the GPU, already
        self._task = asyncio.create_task(self._run())

    @property
    def n_texts(self):
        """Texts that wait or are computed."""
        return sum(len(waiting.texts) for waiting in self._unanswered)

    @property
    def alive(self):
        """Whether requests are answered."""
        return not self._task.done()

    async def predict_proba(self, name, texts):
        """Return an array of shape (n_texts, n_classes), once its turn has come."""
        if self.n_texts + len(texts) > MAX_TEXTS_IN_ALL:
            raise HTTPException(503, "Too many texts are waiting. Try again later.")
        waiting = Waiting(name, texts, asyncio.get_running_loop().create_future())
        self._unanswered.add(waiting)
        self._queue.append(waiting)
        self._arrival.set()
        try:
            async with asyncio.timeout(MAX_SECONDS):
                return await waiting.answer
        except TimeoutError:
            raise HTTPException(504, f"No answer in {MAX_SECONDS} s. Try again later.") from None
        finally:
            self._unanswered.remove(waiting)

    async def close(self):
        """Stop, and let no request wait for ever."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for waiting in self._unanswered:
            if not waiting.answer.done():
                waiting.answer.set_exception(HTTPException(503, "The service is shutting down."))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self):
        while True:
            await self._arrival.wait()
            while batch := self._take():
                await self._compute(batch)
            self._arrival.clear()

    def _take(self):
        """Take the first request, and others of its classifier that fit into the same call."""
        queue = [waiting for waiting in self._queue if not waiting.answer.done()]
        batch, n_texts = [], 0
        for waiting in queue:
            n_more = len(waiting.texts)
            if waiting.name == queue[0].name and n_texts + n_more <= MAX_TEXTS_OF_A_CALL:
                batch.append(waiting)
                n_texts += n_more
        self._queue = [waiting for waiting in queue if waiting not in batch]
        return batch

    async def _compute(self, batch):
        texts = [text for waiting in batch for text in waiting.texts]
        clf = self.classifiers[batch[0].name]
        self.n_calls += 1
        try:
            proba = await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: clf.predict_proba(as_input(clf, texts))
            )
        except Exception as error:
            if len(batch) > 1:  # only the request that is at fault shall fail
                for waiting in batch:
                    await self._compute([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        start = 0
        for waiting in batch:
            if not waiting.answer.done():  # it may have waited too long
                waiting.answer.set_result(proba[start : start + len(waiting.texts)])
            start += len(waiting.texts)


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
        classifiers = load_all(Path(folder))
        for clf in classifiers.values():  # reads the base before the first request
            await asyncio.to_thread(warm_up, clf)
        app.state.batcher = Batcher(classifiers)
        try:
            yield
        finally:
            await app.state.batcher.close()

    app = FastAPI(title="skqlora", lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=MAX_BYTES)

    @app.exception_handler(RequestValidationError)
    async def refuse(request, error):
        """Say what is wrong without repeating what came, which may be long or no text at all."""
        details = [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": details[:10]}, status_code=422)

    @app.get("/health")
    async def health():
        batcher = app.state.batcher
        if not batcher.alive:
            raise HTTPException(503, "Requests are not answered any more.")
        return {
            "classifiers": len(batcher.classifiers),
            "bases": backbone_cache_info().n_backbones,
            "texts": batcher.n_texts,
        }

    @app.get("/classifiers")
    async def list_classifiers():
        return {name: names_of(clf) for name, clf in app.state.batcher.classifiers.items()}

    @app.post("/classifiers/{name}")
    async def classify(name: str, request: Request) -> Answer:
        batcher = app.state.batcher
        if name not in batcher.classifiers:
            raise HTTPException(404, f"There is no classifier {name!r}.")
        classes = names_of(batcher.classifiers[name])
        check_columns(batcher.classifiers[name], request.texts)
        try:
            proba = await batcher.predict_proba(name, request.texts)
        except (TypeError, ValueError) as error:
            if columns_of(batcher.classifiers[name]) is None:  # a text cannot be at fault
                raise
            raise HTTPException(422, str(error)) from None
        if batcher.classifiers[name].multilabel_:
            labels = [[classes[i] for i in row.nonzero()[0]] for row in proba > 0.5]
        else:
            labels = [classes[i] for i in proba.argmax(axis=1)]
        return Answer(classes=classes, labels=labels, probabilities=proba.tolist())

    return app


def load_all(folder):
    """Return the classifiers of a folder by the names of their folders."""
    if (folder / "skqlora.json").exists():
        raise RuntimeError(
            f"{str(folder)!r} is itself a saved classifier. Pass the folder that contains it."
        )
    classifiers = {
        path.name: QLoRAClassifier.load(path)
        for path in sorted(folder.iterdir())
        if (path / "skqlora.json").exists()
    }
    if not classifiers:
        raise RuntimeError(f"{folder} holds no folders that `QLoRAClassifier.save` wrote.")
    return classifiers


def columns_of(clf):
    """Return the names of a classifier's columns or, if it has none, their numbers.

    None if each of its rows is a text.
    """
    n_columns = getattr(clf, "n_features_in_", 1)
    if n_columns == 1:
        return None
    return list(getattr(clf, "feature_names_in_", map(str, range(n_columns))))


def check_columns(clf, texts):
    """Refuse rows that do not have the columns of the fit."""
    columns = columns_of(clf)
    for text in texts:
        found = sorted(text) if isinstance(text, dict) else None
        if found != (None if columns is None else sorted(columns)):
            wanted = "a text" if columns is None else f"an object with {', '.join(columns)}"
            raise HTTPException(422, f"Wanted: {wanted} in each place of texts.")


def as_input(clf, texts):
    """Return texts, or a table with its columns in the order of the fit."""
    columns = columns_of(clf)
    if columns is None:
        return texts
    if not hasattr(clf, "feature_names_in_"):
        return [tuple(text[column] for column in columns) for text in texts]
    return pd.DataFrame(texts, columns=columns, dtype=object)  # each number as it came


def warm_up(clf):
    """Read the base, unless the columns have formats that take no text."""
    columns = columns_of(clf)
    if columns is None:
        clf.predict_proba(["warm up"])
    else:
        with suppress(ValueError):
            clf.predict_proba(as_input(clf, [dict.fromkeys(columns, "warm up")]))


def names_of(clf):
    """Return the classes as text, in the order of the probabilities."""
    return [str(label) for label in clf.classes_.tolist()]


def __getattr__(name):
    """Make `app` when uvicorn asks for it, of the folder that the environment names."""
    if name != "app":
        raise AttributeError(name)
    folder = os.environ.get("SKQLORA_CLASSIFIERS", "")
    if not Path(folder).is_dir() or not folder:
        raise RuntimeError(
            f"Got SKQLORA_CLASSIFIERS={folder!r} in the environment. Wanted: the folder that holds "
            "the classifiers' folders."
        )
    return create_app(folder)
