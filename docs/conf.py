"""Settings of the documentation.

``make docs`` builds it into build/docs, with warnings as errors and no network.
"""

import configparser
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))
setup_cfg = configparser.ConfigParser(interpolation=None)
setup_cfg.read(HERE.parent / "setup.cfg")
url = setup_cfg["metadata"].get("url", "").removesuffix("/").removesuffix(".git")

project = author = "crsam_jax"
project_copyright = "The crsam_jax authors, Apache-2.0"
release = version = version_of("crsam_jax")

extensions = [
    "aliases",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|jax|numpy|optax|typing)\..*"),
    ("py:.*", r"crsam_jax\._.*"),
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "off"  # the tutorial is stored with its outputs; a test runs it
nb_merge_streams = True
nb_render_markdown_format = "myst"  # CommonMark, the default, has no tables
nb_output_stderr = (
    "remove"  # what jax says about devices; an error still ends the build
)

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80  # longer ones have a line for each argument
napoleon_use_ivar = True
napoleon_use_rtype = False

# The inventories of other projects are fetched when they are read, so links to them are
# made on request only.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"  # from a doctest only what is typed

html_theme = "furo"
pygments_dark_style = "github-dark"  # the default underlines every imported name
html_title = f"crsam_jax {release}"
html_show_sphinx = False
if url:
    html_theme_options = {
        "footer_icons": [
            {"name": "Repository", "url": url, "html": "Repository", "class": ""}
        ],
    }
    if url.startswith("https://github.com/"):
        html_theme_options |= {
            "source_repository": url,
            "source_branch": "main",
            "source_directory": "docs/",
        }
