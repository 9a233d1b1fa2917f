"""The documentation site. `python -m sphinx -W -b html docs docs/_build` builds it, offline."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import rmjax

project = "rmjax"
copyright = "the authors of rmjax"
release = version = rmjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "extensions.fields",
    "extensions.machines",
    "extensions.coverage",
    "extensions.mathml",
    "extensions.outside",
    "extensions.spaces",
]
exclude_patterns = ["_build", "results/records", "**/.ipynb_checkpoints"]
default_role = "code"  # `name` in docstrings

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are stored with outputs, and a test executes them
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Names of rmjax/types.py that stand for pytrees and arrays stay as they are in signatures.
_ALIASES = [
    "Array",
    "Carry",
    "Features",
    "Key",
    "Memory",
    "Params",
    "State",
    "Sum",
    "Terms",
    "Weight",
]
autodoc_type_aliases = {name: name for name in _ALIASES}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "rmjax"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
