"""Sphinx configuration: ``python -m sphinx -W --keep-going docs docs/_build/html``."""

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

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Class and method pages as scikit-learn has them: one for each name of api.rst.
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc sections say it
numpydoc_show_class_members = True
numpydoc_class_members_toctree = False
numpydoc_show_inherited_class_members = False
suppress_warnings = ["ref.ref"]  # scikit-learn's docstrings that we inherit refer to its pages

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    # Scripts for clusters and several processes, and one that needs a model of the Hub, are shown
    # and not run; the tests run them.
    "filename_pattern": r"/(01|05|06|07|08|09|10|11)_",
    "ignore_pattern": r"(demo\.py|benchmarks|serving)",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "reference_url": {"skqlora": None},
    "backreferences_dir": "_build/backreferences",
    "doc_module": ("skqlora",),
}

html_theme = "pydata_sphinx_theme"
html_title = "skqlora"
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 4,
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "tango",
    "footer_start": ["copyright"],
    "footer_end": [],
}
PAGES_ALONE = "changelog", "benchmarks", "how_well", "how_qlora_works", "design", "contributing"
html_sidebars = {page: [] for page in PAGES_ALONE}

plot_html_show_formats = False
plot_html_show_source_link = False
