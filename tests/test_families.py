"""The page that lists which families of transformers are accepted."""

import sys
from pathlib import Path

import pytest
import transformers

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def families():
    """The script that writes the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        import families
    yield families
    del sys.modules["families"]


def test_most_families_are_accepted_and_the_others_are_refused_with_a_reason(families):
    accepted, refused = families.try_all()  # whatever is no ValueError of ours ends the test
    assert len(accepted) + len(refused) == len(families.FAMILIES)
    assert len(accepted) >= 240
    assert all(refused.values())
    page = families.page_of(accepted, refused)
    if transformers.__version__ in (DOCS / "families.md").read_text():  # the one it was made with
        assert page == (DOCS / "families.md").read_text()
