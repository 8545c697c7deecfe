"""The documentation site: ``make docs`` writes docs/_build/html."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # autodoc reads this checkout, installed or not
os.environ["PYTHONPATH"] = os.pathsep.join(  # and so do the notebooks
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
)

import jlrp  # noqa: E402

project = "jlrp"
author = "the jlrp authors"
version = release = jlrp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False
myst_heading_anchors = 3

# Notebooks are kept without outputs and run at every build; one that fails fails it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autosummary_generate = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"jlrp {release}"
html_theme_options = {"navigation_with_keys": True}
