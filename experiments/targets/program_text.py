"""What the text of a compiled program tells of its cost."""

import re
from collections import Counter
from typing import NamedTuple

_KERNELS = frozenset(
    {"fusion", "custom-call", "copy", "copy-start", "sort", "reduce", "transpose", "concatenate"}
)  # fmt: skip
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = .*?[\])}] ([a-z][\w-]*)\(", re.MULTILINE)


class Counts(NamedTuple):
    """Of one execution of a program without loops; a loop's body is counted once.

    Attributes:
      launches: kernels that a GPU starts: fusions, calls of libraries, copies, and what else computes by itself.
      cycles: that a TPU takes, as its compiler estimates instruction by instruction; 0 in a GPU's program.
      collectives: how many of each kind, by name.
    """

    launches: int
    cycles: int
    collectives: dict[str, int]


def count(text: str) -> Counts:
    """Counts in the optimized program's text, ``compiled.as_text()``.

    Example:
      >>> count('''ENTRY %main (x: f32[2]) -> f32[2] {
      ...   %x = f32[2]{0} parameter(0)
      ...   %sum = f32[2]{0} all-reduce(%x), to_apply=%add
      ...   ROOT %y = f32[2]{0} fusion(%sum), kind=kLoop, backend_config={"estimated_cycles":"120"}
      ... }''')
      Counts(launches=1, cycles=120, collectives={'all-reduce': 1})
    """
    instructions = Counter(_INSTRUCTION.findall(_entry(text)))
    collectives = Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    return Counts(
        launches=sum(number for name, number in instructions.items() if name in _KERNELS),
        cycles=sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
        collectives=dict(sorted(collectives.items())),
    )


def _entry(text: str) -> str:
    """The computation that a program starts with: what it calls is inside of kernels."""
    start = re.search(r"^ENTRY ", text, re.MULTILINE)
    if start is None:
        raise ValueError(f"This is not the text of a compiled program: {text[:80]!r}")
    return text[start.start() :].partition("\n}")[0]
