"""The reference lists all that is public or returned, and its names can be imported."""

import pydoc
import re
from pathlib import Path

import pytest
from helpers import make_classifier
from numpydoc.docscrape import ClassDoc, FunctionDoc

import skqlora

PAGE = Path(__file__).parent.parent / "docs" / "api.rst"
LISTED = {
    name: pydoc.locate(name) for name in re.findall(r"^   ~(\S+)$", PAGE.read_text(), re.MULTILINE)
}


def test_names_of_the_reference_can_be_imported():
    assert [name for name, thing in LISTED.items() if thing is None] == []


def test_reference_has_all_public_names():
    assert {f"skqlora.{name}" for name in skqlora.__all__} <= LISTED.keys()


def test_reference_has_the_objects_that_a_user_gets(encoder, corpus):
    clf = make_classifier(encoder).partial_fit(*corpus, classes=sorted({*corpus[1]}))
    public = [value for name, value in vars(clf).items() if not name.startswith("_")]
    returned = [skqlora.estimate_memory(encoder, device="cpu"), skqlora.backbone_cache_info()]
    things = [*public, clf.adapter_.lora, clf.adapter_.text_settings, *returned]
    kinds = {type(thing) for thing in things if type(thing).__module__.startswith("skqlora")}
    assert len(kinds) == 8
    assert kinds <= set(LISTED.values())


@pytest.mark.parametrize(
    "name", ["QLoRAClassifier", "QLoRARegressor", "LossCurveDisplay", "estimate_memory"]
)
def test_see_also_names_things_that_exist(name):
    thing = getattr(skqlora, name)
    doc = ClassDoc(thing) if isinstance(thing, type) else FunctionDoc(thing)
    names = [found for entry in doc["See Also"] for found, _ in entry[0]]
    assert len(names) >= 3
    missing = [each for each in names if not (pydoc.locate(each) or hasattr(skqlora, each))]
    assert missing == []
