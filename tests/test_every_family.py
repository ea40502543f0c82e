"""Each family that is accepted takes a step twice with equal results, or is refused by name."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import assert_equal_adapters, digest_of_base, make_backbone, make_classifier
from shrunken import save_family
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from families import FAMILIES, try_family

pytestmark = pytest.mark.slow
# Of these no small configuration is made here, from the defaults and by names of settings alone.
NOT_SHRUNKEN = {
    *(
        "blt",
        "cosmos3_edge",
        "esmc",
        "flaubert",
        "gemma3n_text",
        "git",
        "idefics",
        "luke",
        "mamba2",
    ),
    *("mistral_large4", "phi4_multimodal", "reformer", "roc_bert", "squeezebert", "xlm"),
}
# The text models of these are read only out of the whole model; see test_towers.py.
ONLY_IN_A_WHOLE = {
    *("blip", "ernie4_5_vl_moe", "kosmos-2", "kosmos-2.5", "mllama", "paddleocr_vl"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "step3p7", "t5gemma", "unlimited_ocr"),
}
TRIED = sorted(set(FAMILIES) & set(CONFIG_MAPPING) - NOT_SHRUNKEN - ONLY_IN_A_WHOLE)


@pytest.mark.filterwarnings("ignore")  # of transformers, about settings that nobody has
@pytest.mark.parametrize("family", TRIED)
def test_family_computes_the_same_twice(tmp_path, family):
    try:
        _, text_family, _ = try_family(family)
    except ValueError:
        pytest.skip("is refused by its configuration")
    if text_family != family and text_family in FAMILIES:
        pytest.skip(f"its text model is {text_family}")
    folder = save_family(tmp_path, family)
    texts, labels = tiny.corpus(12)
    options = {"num_train_epochs": 1, "lora_dropout": 0.1, "batch_size": 4}
    try:
        clf = make_classifier(folder, **options).fit(texts, labels)
    except ValueError as error:
        named = (
            f"model={folder!r} ({text_family}) ",
            "Got target_modules='all-linear', which cannot",
        )
        if not str(error).startswith(named):
            raise
        pytest.skip("is refused by name when it is run")
    before = digest_of_base(make_backbone(folder).module)
    expected = clf.predict_proba(texts)
    np.testing.assert_array_equal(clf.predict_proba(texts), expected)
    again = make_classifier(folder, **options).fit(texts, labels)
    assert_equal_adapters(again, clf)
    np.testing.assert_array_equal(again.predict_proba(texts), expected)
    assert digest_of_base(make_backbone(folder).module) == before
