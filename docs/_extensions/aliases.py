"""Shorter types in signatures: optax's name of a type instead of what it stands for."""

import optax
from sphinx.util.typing import stringify_annotation

SPELLED_OUT = stringify_annotation(optax.ScalarOrSchedule, "smart")


def shorten(app, what, name, obj, options, signature, return_annotation):
    return signature and signature.replace(
        SPELLED_OUT, "~optax.ScalarOrSchedule"
    ), return_annotation


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
