"""An error with suggestions for a misspelt name."""

import difflib
from collections.abc import Collection, Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the close ones, or all.

    Example:
      >>> unknown("model", "resnet81", ["resnet18", "vit_s32"])
      ValueError("There is no model 'resnet81': did you mean 'resnet18'?")
    """
    names = list(known)
    close = difflib.get_close_matches(name, names)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(names)}."
    return ValueError(f"There is no {kind} {name!r}: {hint}")


def check_names(kind: str, names: Collection[str], known: Collection[str]) -> None:
    """Checks that there are names, and that each exists.

    Example:
      >>> check_names("task", [], ["digits", "fashion"])
      Traceback (most recent call last):
      ValueError: Name a task: digits, fashion.
    """
    if not names:
        raise ValueError(f"Name a {kind}: {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
