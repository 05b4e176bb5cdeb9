"""Settings of the documentation: ``make docs`` builds it into build/docs, with warnings as errors and no network."""

import os
from importlib.metadata import version as version_of

project = author = "crsam_jax"
project_copyright = "The crsam_jax authors, Apache-2.0"
release = version = version_of("crsam_jax")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# Written by commands, and shown on pages.
exclude_patterns = ["digits/table.md", "figures/table3.md", "study/*/*.md", "study/*/*/*.md"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|jax|numpy|optax|typing)\..*"),
    ("py:.*", r"crsam_jax\._.*"),
]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "off"  # the tutorial is stored with its outputs; a test runs it
nb_merge_streams = True
nb_render_markdown_format = "myst"  # CommonMark, the default, has no tables
nb_output_stderr = "remove"  # what jax says about devices; an error still ends the build

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what is taken, in words
napoleon_use_ivar = True
napoleon_use_rtype = False

# The inventories of other projects are fetched when they are read, so links to them are made on request only.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

html_theme = "furo"
pygments_dark_style = "github-dark"  # the default underlines every imported name
html_title = f"crsam_jax {release}"
html_show_sphinx = False
