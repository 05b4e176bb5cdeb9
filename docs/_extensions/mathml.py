"""Formulas as MathML, converted at build time.

Browsers draw MathML without a script or a network. The font for it, STIX Two Math (SIL
Open Font License), comes with ziamath and is copied into the built pages, because many
machines have no font with brackets that grow.
"""

import re
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert


def mathml(formula, **settings):
    # As in TeX, a thin space before the name of a function.
    return re.sub(
        "(?<=</mi>)(<mi>(log|exp|max|min)</mi>)",
        r'<mspace width="0.17em"/>\1',
        convert(formula, **settings),
    )


def inline(self, node):
    self.body.append(f'<span class="math">{mathml(node.astext())}</span>')
    raise nodes.SkipNode


def block(self, node):
    self.body.append(
        f'<div class="math">{mathml(node.astext(), display="block")}</div>\n'
    )
    raise nodes.SkipNode


def copy_font(app, error):
    if error is None and app.builder.format == "html":
        with as_file(files("ziamath.fonts") / "STIXTwoMath-Regular.ttf") as font:
            shutil.copy(font, Path(app.outdir) / "_static")


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("build-finished", copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
