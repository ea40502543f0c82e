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
# Of these no small configuration is made here, from the defaults and by names of settings alone,
NOT_SHRUNKEN = {
    *("blt", "cosmos3_edge", "deepseek_v2", "esmc", "flaubert", "gemma3n_text", "git", "idefics"),
    *("layoutlmv3", "lilt", "luke", "mamba2", "mistral_large4", "phi4_multimodal", "reformer"),
    *("roc_bert", "squeezebert", "xlm"),
}
# and a small model of these keeps too much unquantized.
UNQUANTIZED_IF_SMALL = {
    *("deepseek_v4", "falcon_mamba", "glm5_next", "hy_v4", "inkling2_text", "mamba"),
    "recurrent_gemma",
}
# The text models of these are read only out of the whole model; see test_towers.py.
ONLY_IN_A_WHOLE = {
    *("blip", "ernie4_5_vl_moe", "kosmos-2", "kosmos-2.5", "mllama", "paddleocr_vl"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "step3p7", "t5gemma", "unlimited_ocr"),
}
UNTRIED = NOT_SHRUNKEN | UNQUANTIZED_IF_SMALL | ONLY_IN_A_WHOLE
TRIED = sorted(set(FAMILIES) & set(CONFIG_MAPPING) - UNTRIED)
NAMED = r"model='.*' \({family}\) "
REFUSED_WHEN_RUN = {
    **dict.fromkeys(["layoutlm", "xmod"], NAMED + "cannot be run on token ids"),
    **dict.fromkeys(
        ["convbert", "cpmant", "fnet", "mobilebert", "nystromformer", "yoso"],
        NAMED + "gives a text another result beside a longer one",
    ),
    "falcon_h1": "Got target_modules='all-linear', which cannot be adapted in FalconH1Model",
}


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
    if family in REFUSED_WHEN_RUN:
        with pytest.raises(ValueError, match=REFUSED_WHEN_RUN[family].format(family=family)):
            make_classifier(folder, **options).fit(texts, labels)
        return
    clf = make_classifier(folder, **options).fit(texts, labels)
    before = digest_of_base(make_backbone(folder).module)
    expected = clf.predict_proba(texts)
    np.testing.assert_array_equal(clf.predict_proba(texts), expected)
    again = make_classifier(folder, **options).fit(texts, labels)
    assert_equal_adapters(again, clf)
    np.testing.assert_array_equal(again.predict_proba(texts), expected)
    assert digest_of_base(make_backbone(folder).module) == before
