"""The code in README, guide and docstrings runs; what troubleshooting quotes is what we say.

The blocks of docs/scaling.md need a cluster: examples 02 to 04 do the same, and test_examples.py
runs them. Those of docs/guide/clients.md need other libraries, and tests/clients runs them.
"""

import ast
import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
import tiny
from helpers import make_classifier
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from skqlora import LossCurveDisplay, QLoRAClassifier, estimate_memory

ROOT = Path(__file__).parent.parent
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDE)
    if "```python" in path.read_text() and path.name not in ("scaling.md", "clients.md")
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny Llama that predicts tokens, as those of the Hub do."""
    folder = tmp_path_factory.mktemp("causal")
    config = AutoConfig.for_model("llama", **tiny.LLAMA | tiny.TOKENS | {"vocab_size": 408})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer("decoder").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore:The least populated class in y")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in transformers
def test_code_blocks_run(page, decoder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts, labels = corpus
    clf = make_classifier(decoder).fit(texts, labels)
    clf.save("tickets")
    columns = ("text", "premise", "hypothesis", "title", "category", "body")
    table = dict.fromkeys(columns, texts) | {"label": labels, "price": range(len(texts))}
    pd.DataFrame(table).to_csv("train.csv", index=False)
    namespace = {
        "QLoRAClassifier": QLoRAClassifier,
        "clf": clf,
        "model": decoder,
        "texts": texts,
        "labels": labels,
        "held_out_texts": texts,
        "held_out_labels": labels,
        "cleaner": FunctionTransformer(feature_names_out="one-to-one"),
    }
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        # The Hub's model and a GPU are not at hand; the tiny model takes fewer tokens.
        code = block.replace("Qwen/Qwen3-0.6B-Base", decoder).replace('"cuda"', '"cpu"')
        code = code.replace("max_length=512", "max_length=64")
        exec(compile(code, str(page), "exec"), namespace)


@pytest.fixture(scope="module")
def default_config(decoder, tmp_path_factory):
    """The sizes of Qwen3-0.6B-Base, without weights: all that an estimate needs."""
    folder = tmp_path_factory.mktemp("qwen3")
    Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("thing", [QLoRAClassifier, LossCurveDisplay, estimate_memory])
def test_examples_of_docstrings_run(thing, decoder, default_config, corpus):
    mpl.use("Agg")
    model = default_config if thing is estimate_memory else decoder
    docstring = inspect.getdoc(thing).replace("Qwen/Qwen3-0.6B-Base", model)
    names = {"clf": make_classifier(decoder).fit(*corpus)} if thing is LossCurveDisplay else {}
    test = doctest.DocTestParser().get_doctest(docstring, names, thing.__name__, None, None)
    assert test.examples
    failures = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failures.append)
    assert not failures, "".join(failures)


def strings_of(tree):
    """Strings of a file that are no documentation; of f-strings with a mark for each value."""
    documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in documentation
        ):
            yield node.value


def test_quoted_messages_are_ours():
    """Each quotation, with names and numbers left open, is a string of the code."""
    files = sorted((ROOT / "skqlora").rglob("*.py"))
    code = "\n".join(each for path in files for each in strings_of(ast.parse(path.read_text())))
    page = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text()
    quoted = re.findall(r'^\*\*"(.+?)"', page, re.MULTILINE)
    assert len(quoted) >= 10
    for message in quoted:
        parts = re.split(r"'[^']*'|\([\d, ]+\)|\d[\d.,]*%?|\b(?:X|y|nan|float|str)\b", message)
        assert re.search(".{1,80}?".join(map(re.escape, parts)), code), message


def test_sizes_of_the_guide_are_those_of_an_estimate():
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "docs" / "sizes.py")
    sizes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizes)
    page = (ROOT / "docs" / "guide" / "models.md").read_text()
    for name in ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-8B-Base"):
        gigabytes = [f"{n / 1e9:.1f}" for n in sizes.estimates_of(*sizes.MODELS[name])]
        assert f"| `{name}` | {' | '.join(gigabytes)} |" in page


LINKED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDE]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_repository(page):
    """So they also work where the sources are read, without the site."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
