"""Sphinx settings of the site that `make docs` builds: the Markdown pages, and API pages from the docstrings."""

from fastsam import __version__

project = "fastsam"
author = "The fastsam authors"
copyright = "2026, The fastsam authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fastsam"

# headings get the anchors that they have on GitHub; a link to one that is not there is a warning, and so an error
myst_heading_anchors = 4
# a name in single backticks is a link where it is documented, and plain code elsewhere
default_role = "py:obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
