"""Fixtures: tiny models on disk, one of each kind for the whole run, and texts that fit them."""

import gc
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: nothing is ever fetched in a test
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch too: there is a worker for each core. Processes that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import pytest
import tiny
import transformers
from helpers import make_backbone, make_classifier

transformers.utils.logging.disable_progress_bar()  # of `save_pretrained`

collect_ignore = ["clients"]  # they need libraries that .ci/clients installs


def pytest_collection_finish():
    """Let the garbage collector pass over what is there already, all of it modules and tests.

    Each load of a base collects garbage, which takes half a second with all of that.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return the folder of a tiny model of a family, written once for a run."""
    folders = {}

    def folder_of(model_type):
        if model_type not in folders:
            folders[model_type] = tiny.save_model(tmp_path_factory.mktemp(model_type), model_type)
        return folders[model_type]

    return folder_of


@pytest.fixture(scope="session")
def decoder(tiny_model):
    """Folder of a tiny Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def encoder(tiny_model):
    """Folder of a tiny BERT."""
    return tiny_model("bert")


@pytest.fixture(params=["bert", "llama"])
def model(request, tiny_model):
    """Folder of an encoder, then of a decoder."""
    return tiny_model(request.param)


@pytest.fixture
def backbone(model):
    """A tiny frozen base in float32 arithmetic: an encoder, then a decoder."""
    return make_backbone(model)


@pytest.fixture(scope="session")
def corpus():
    """Texts of three topics, and their topics."""
    return tiny.corpus()


@pytest.fixture
def texts(corpus):
    """The texts of the corpus, in an array."""
    return np.array(corpus[0], dtype=object)


@pytest.fixture
def labels(corpus):
    """Three classes."""
    return np.array(corpus[1], dtype=object)


@pytest.fixture
def animal(labels):
    """Two classes."""
    return (labels == "animal").astype(int)


@pytest.fixture
def indicator(labels):
    """Two labels, of which a text has none, one or both."""
    return np.column_stack([labels == "animal", labels != "number"]).astype(int)


@pytest.fixture
def clf(encoder):
    """A classifier to be fitted on texts of the corpus, for two epochs."""
    return make_classifier(encoder, num_train_epochs=2)


@pytest.fixture(scope="session")
def pairs():
    """Pairs of words, and whether both are of one topic."""
    rng = np.random.RandomState(0)
    topics = list(tiny.TOPICS.values())
    kinds = rng.randint(3, size=(48, 2))
    words = [[topics[kind][rng.randint(8)] for kind in row] for row in kinds]
    frame = pd.DataFrame(words, columns=["first", "second"])
    return frame, np.where(kinds[:, 0] == kinds[:, 1], "same", "other")


@pytest.fixture(scope="session")
def typed_encoder(tmp_path_factory):
    """Folder of a tiny BERT with a tokenizer that says of which text a token is."""
    folder = tmp_path_factory.mktemp("bert")
    tiny.save_model(folder, "bert")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(config))
    return str(folder)
