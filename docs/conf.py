"""Configuration of the documentation. Built with warnings as errors: `make docs`."""

import sys
from pathlib import Path

import lightning_robust

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lightning-robust"
author = "the lightning-robust contributors"
copyright = author
version = release = lightning_robust.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "catalogue",
    "compatibility",
    "mathml",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_ext", "_templates"]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"lightning-robust {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
pygments_style = "friendly"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath", "deflist", "fieldlist"]
myst_heading_anchors = 3

autosummary_generate = True  # writes api/generated, which git ignores
autosummary_ignore_module_all = False
autosummary_imported_members = True

autodoc_default_options = {"members": True, "show-inheritance": True}
# Hooks that override Lightning's say nothing new; with inherited texts they would bury what is ours.
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_admonition_for_examples = False
napoleon_custom_sections = [("Shape", "params_style"), "Cost"]
