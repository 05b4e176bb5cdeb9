"""The command ``crsam-experiments``; in the wheel this is the package ``crsam_jax_experiments``.

Many projects have a folder ``experiments`` of their own, which a package of that name in site-packages would hide. So
the wheel holds the laboratory inside this package, and only a process that imports this one can import ``experiments``.
"""

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
ROOT = _HERE if (_HERE / "experiments").is_dir() else _HERE.parents[1]
"""The folder that holds the package ``experiments``: this one if installed from a wheel, else the checkout."""

_NEEDED = ("flax", "grain", "matplotlib", "optax", "orbax", "rich", "sklearn", "tensorboardX", "tyro")

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def main() -> int:
    """Runs one subcommand; without the packages that it needs, a line says what to install."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"error: crsam-experiments needs packages that are not installed ({', '.join(missing)}): "
            'pip install "crsam_jax[experiments]"',
            file=sys.stderr,
        )
        return 1
    from experiments.__main__ import main

    return main()
