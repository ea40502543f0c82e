"""What several test modules need: tiny bases, models and classifiers, and digests of tensors."""

import hashlib

import numpy as np
import pytest
import tiny
import torch
from hypothesis import strategies as st

from skqlora import QLoRAClassifier
from skqlora.checkpoint.spec import BackboneSpec, describe_files
from skqlora.model.cache import get_backbone
from skqlora.model.text_model import TextModel
from skqlora.settings.adapter_settings import LoraSettings, TextSettings
from skqlora.settings.parameters import read_parameters
from skqlora.settings.settings import resolve_settings
from skqlora.text.batches import TokenizedTexts
from skqlora.text.tokenization import CachingTokenizer
from skqlora.training.trainer import Trainer

LORA = LoraSettings(
    r=4,
    lora_alpha=4,
    target_modules="all-linear",
    use_rslora=False,
    use_dora=False,
    init_lora_weights=True,
)


def make_classifier(model, /, **params):
    """A classifier that learns a tiny model's topics in a second or two."""
    return QLoRAClassifier(
        **{
            "model": model,
            "lora_r": 4,
            "num_train_epochs": 3,
            "learning_rate": 5e-3,
            "head_learning_rate": 2.5e-2,
            "random_state": 0,
            "compute_dtype": "float32",
            "device": "cpu",
        }
        | params,
    )


def make_backbone(model, **changes):
    """Load a base on the CPU in float32 arithmetic."""
    settings = {
        "model": model,
        "revision": None,
        "quantization": "nf4",
        "double_quant": True,
        "compute_dtype": torch.float32,
        "device": torch.device("cpu"),
        "files": describe_files(model),
    }
    return get_backbone(BackboneSpec(**settings | changes))


def make_model(backbone, lora=LORA, n_classes=3, pooling="auto", **changes):
    """A model with a fresh adapter, on a replica that is never given back."""
    return TextModel.for_training(backbone, lora, n_classes, pooling, **changes).__enter__()


def restore_model(backbone, state):
    """A model with a captured adapter, on a replica that is never given back."""
    return TextModel.for_prediction(backbone, state).__enter__()


def lora_parameters(model):
    """LoRA's parameters by their names in the base."""
    return {name: p for name, p in model.encoder.named_parameters() if p.requires_grad}


def trained_values(clf):
    """All trained weights of a fitted classifier in one vector."""
    tensors = [*clf.adapter_.lora_tensors.values(), *clf.adapter_.head_tensors.values()]
    return np.concatenate([tensor.ravel() for tensor in tensors])


def fit_interrupted(clf, corpus, at, **held_out):
    """Fit until an update is about to begin; return the updates that were made."""
    made = []
    step = Trainer.step

    def interrupt(self, rows):
        if self.n_updates == at:
            raise KeyboardInterrupt
        made.append(self.n_updates)
        return step(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        if at is None:
            clf.fit(*corpus, **held_out)
        else:
            with pytest.raises(KeyboardInterrupt):
                clf.fit(*corpus, **held_out)
    return made


def assert_equal_adapters(first, second):
    """Check that two fitted classifiers have the same weights, bit for bit."""
    for kind in ("lora_tensors", "head_tensors"):
        ours, theirs = getattr(first.adapter_, kind), getattr(second.adapter_, kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def make_settings(*, model_type="bert", hidden_size=64, **changes):
    """Settings of a short training, with the estimator's defaults where nothing else is said."""
    rates = {"learning_rate": 1e-3, "head_learning_rate": 5e-3}
    params = {"num_train_epochs": 1, "warmup_steps": 0} | rates | changes
    parameters = read_parameters(QLoRAClassifier(**params))
    return resolve_settings(
        parameters,
        device="cpu",
        compute_dtype="float32",
        max_length=128,
        prompt=None,
        pooling="mean",
        num_train_epochs=parameters.num_train_epochs,
        gradient_checkpointing=parameters.gradient_checkpointing is True,
        model_type=model_type,
        hidden_size=hidden_size,
    )


def train(model, tokens, targets, settings, **changes):
    """Train a model for all its epochs; return the loss of each."""
    with Trainer(model, tokens, targets, settings, **changes) as trainer:
        losses = [trainer.train_epoch() for _ in range(settings.num_train_epochs)]
        trainer.check_finite()
    return losses


def ids_of(tokens):
    """Return the tokens of each row as lists."""
    return [ids.tolist() for ids in tokens.sequences]


def tokenized(style, rows, *, max_length=64, **settings):
    """Tokenize rows as a fit does; return their tokens and the number of windows of each."""
    tokenizer = tiny.make_tokenizer(style)
    settings = TextSettings(max_length, **settings)
    return CachingTokenizer(tokenizer).tokenize(rows, settings, 1000)


def random_tokens(n_rows=16, longest=12, vocab_size=300):
    """Rows of random token ids, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest + 1, (n_rows,), generator=generator).tolist()
    rows = [torch.randint(5, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return TokenizedTexts(rows, pad_id=0)


def digest_of_base(module):
    """SHA-256 over every parameter, buffer and quantization constant of a base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def draw_damage(data, content):
    """Draw what a file may hold after an accident: other bytes, fewer, or flipped bits."""
    kind = data.draw(st.sampled_from(["random", "truncated", "flipped"]))
    if kind == "random":
        return data.draw(st.binary(max_size=300))
    if kind == "truncated":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)
