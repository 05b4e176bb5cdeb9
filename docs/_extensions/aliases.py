"""Shorter types: optax's name of a type, and names without their modules."""

import re

import optax
from sphinx.util.typing import stringify_annotation

SPELLED_OUT = stringify_annotation(optax.ScalarOrSchedule, "smart")


def in_signature(app, what, name, obj, options, signature, returned):
    short = signature and signature.replace(SPELLED_OUT, "~optax.ScalarOrSchedule")
    return short, returned


def in_docstring(app, what, name, obj, options, lines):
    for n, line in enumerate(lines):
        if line.startswith(":vartype "):
            line = line.replace("jax.jaxlib._jax.", "jax.")
            lines[n] = re.sub(r"(?<![\w.~])(?=(\w+\.)+\w)", "~", line)


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", in_signature)
    # After napoleon, which writes the types of attributes into the docstring.
    app.connect("autodoc-process-docstring", in_docstring, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
