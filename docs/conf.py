"""Sphinx configuration: ``python -m sphinx -W --keep-going docs docs/_build/html``."""

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from numpydoc.xref import DEFAULT_LINKS
from sphinx_gallery.sorting import ExplicitOrder

import skqlora

project = "skqlora"
author = "the skqlora developers"
copyright = "the skqlora developers"
release = skqlora.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode",
    "matplotlib.sphinxext.plot_directive",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates", "auto_examples/**/*.ipynb"]
templates_path = ["_templates"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Class and method pages as scikit-learn has them: one for each name of api.rst.
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc sections say it
numpydoc_show_class_members = True
numpydoc_class_members_toctree = False
numpydoc_show_inherited_class_members = True
# The types of parameters and attributes that are classes of ours link to their pages. Other types
# would be links to Python's and NumPy's sites, whose inventories have to be fetched for each build.
DEFAULT_LINKS.clear()
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {
    name.rpartition(".")[2]: name
    for name in re.findall(r"~(\S+)", (Path(__file__).parent / "api.rst").read_text())
}
toc_object_entries_show_parents = "hide"
# scikit-learn's docstrings that we inherit refer to its own pages and its glossary.
suppress_warnings = ["ref.ref", "ref.term"]

SOURCES = "https://github.com/skqlora/skqlora/blob"


def linkcode_resolve(domain, info):
    """Return the lines on GitHub of a documented object, or None if they are not ours.

    This is not viewcode, which finds no source of inherited methods, such as `save`.
    """
    found = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    if not getattr(found, "__module__", "").startswith("skqlora"):
        return None
    path = Path(inspect.getsourcefile(found)).relative_to(Path(skqlora.__file__).parents[1])
    lines, start = inspect.getsourcelines(found)
    version = "main" if "dev" in release else f"v{release}"
    return f"{SOURCES}/{version}/{path.as_posix()}#L{start}-L{start + len(lines) - 1}"


# Scripts for clusters and several processes, and one that needs a model of the Hub, are shown and
# not run; the tests run them. They are the last in the gallery, since they have no pictures.
NOT_RUN = "02", "03", "04", "12"
EXAMPLES = sorted(path.name for path in Path(__file__).parents[1].glob("examples/[0-9]*.py"))
if os.environ.get("SKQLORA_EXAMPLES_QUICK") == "1":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    importlib.import_module("quick").make_quick()

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": rf"/(?!{'|'.join(NOT_RUN)})\d\d_",
    "ignore_pattern": r"(own_table\.py|benchmarks|serving)",
    "within_subsection_order": ExplicitOrder(
        sorted(EXAMPLES, key=lambda name: name[:2] in NOT_RUN)
    ),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "first_notebook_cell": '# Install the package first: %pip install "skqlora[demo]"',
    "show_memory": False,
    "backreferences_dir": "_build/backreferences",
    "doc_module": ("skqlora",),
}

html_theme = "pydata_sphinx_theme"
html_title = "skqlora"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 4,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,  # the methods of a class
    "pygments_light_style": "tango",
    "footer_start": ["copyright"],
    "footer_end": [],
}
PAGES_ALONE = "changelog", "benchmarks", "how_well", "how_qlora_works", "design", "contributing"
html_sidebars = {page: [] for page in PAGES_ALONE}

plot_html_show_formats = False
plot_html_show_source_link = False
