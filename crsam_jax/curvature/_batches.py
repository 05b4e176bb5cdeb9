"""What a data set is to the measuring tools: an iterable of batches that can be gone through again and again."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import jax
import numpy as np

from crsam_jax._checks import brief, whole_number
from crsam_jax.curvature._fingerprint import fingerprint

Batch = Mapping[str, Any]
"""The arguments of a loss function after params, by name."""

Data = Batch | Iterable[Batch]
"""One batch, or a data set: an iterable of batches that starts afresh each time it is gone through."""

ExampleCount = Callable[[Batch], float]
"""From a batch to the number of examples that its mean loss runs over."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Arrays in memory, cut along their leading axis into the batches of a data set.

    Attributes:
      arrays: arguments of the loss by name, each a pytree of arrays that share the leading axis, the examples.
      batch_size: examples per batch, at least 1; the last batch has what is left.
      fixed: further arguments of the loss, the same for every batch: model state, a temperature.

    Raises:
      TypeError: if ``batch_size`` is not a whole number.
      ValueError: if the leading axes differ, there is no example, ``batch_size`` < 1, or a name is given twice.

    Example:
      >>> import numpy as np
      >>> from crsam_jax.curvature import Batches
      >>> batches = Batches({"batch": (np.zeros((5, 3)), np.zeros(5))}, batch_size=2, fixed={"state": None})
      >>> [batch["batch"][0].shape for batch in batches], len(batches)
      ([(2, 3), (2, 3), (1, 3)], 3)
    """

    arrays: Batch
    batch_size: int
    fixed: Batch = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", whole_number("batch_size", self.batch_size, at_least=1))
        twice = sorted(self.arrays.keys() & self.fixed.keys())
        if twice:
            raise ValueError(f"The arguments {twice} stand in both arrays and fixed; give each once.")
        leading_axis(self.arrays)

    @property
    def example_arguments(self) -> tuple[str, ...]:
        """Names of the arguments that hold examples."""
        return tuple(self.arrays)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, leading_axis(self.arrays), self.batch_size):
            here = slice(start, start + self.batch_size)
            yield {**jax.tree.map(lambda leaf, here=here: leaf[here], dict(self.arrays)), **self.fixed}

    def __len__(self) -> int:
        return -(-leading_axis(self.arrays) // self.batch_size)


class Passes:
    """Goes through a data set again and again, and checks that every pass yields the same examples.

    Args:
      data: one batch, or an iterable of batches.
      example_count: the weight of a batch; None reads it off the arrays.
    """

    def __init__(self, data: Data, example_count: ExampleCount | None):
        self._data = data
        self._example_count = example_count
        self._iterator: Any = None
        self._first: tuple[float, int] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        """Batches and their weights.

        Raises:
          TypeError: if data can be gone through only once, or a batch is not a mapping.
          ValueError: if there is no batch, or the examples differ from the first pass.
        """
        weights, digest = 0.0, 0
        is_fixed = isinstance(self._data, (Mapping, Batches))
        for batch in self._batches():
            weight = count_examples(self._data, batch, self._example_count)
            if not is_fixed:
                arguments = {name: batch[name] for name in example_arguments(self._data, batch) if name in batch}
                weights, digest = weights + weight, (digest + fingerprint(arguments)) % 2**64
            yield batch, weight
        if self._first is None:
            self._first = weights, digest
        elif self._first != (weights, digest):
            raise ValueError(
                f"data yields other examples in this pass ({weights:g} in all) than in the first "
                f"({self._first[0]:g}), so each pass measures another loss. Turn off augmentation, and take all "
                "examples in each pass; their order does not matter."
            )

    def _batches(self) -> Iterator[Batch]:
        data, is_empty = self._data, True
        if isinstance(data, Mapping):
            yield data
            return
        if not isinstance(data, Iterable):
            raise TypeError(f"data must be a mapping of arguments or an iterable of such; got {type(data).__name__}.")
        iterator = iter(data)
        if iterator is data or iterator is self._iterator:
            raise TypeError(
                f"data is an iterator ({type(iterator).__name__}), or its __iter__ returns the same one each time. It "
                "is used up after one pass, but several passes are needed. Give a list, Batches(...), or an object "
                "whose __iter__ starts afresh."
            )
        self._iterator = iterator
        for batch in iterator:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"Each batch must map argument names of the loss to values, got {type(batch).__name__}: "
                    'yield {"batch": batch}.'
                )
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError("data holds no batch. If it wraps an iterator, that one is used up.")


def iterate(data: Data) -> Iterator[Batch]:
    """The batches of ``data`` in one pass, each checked to be a mapping.

    Raises:
      TypeError, ValueError: as :class:`Passes`.
    """
    return Passes(data, None)._batches()


def num_batches(data: Data) -> int | None:
    """How many batches there are; None if ``data`` does not know its length."""
    if isinstance(data, Mapping):
        return 1
    return len(data) if isinstance(data, Sized) else None


def example_arguments(data: Data, batch: Batch) -> tuple[str, ...]:
    """Names of the arguments that hold examples: those in ``data.example_arguments``, else "batch", else all."""
    names: tuple[str, ...] | None = getattr(data, "example_arguments", None)
    if names is not None:
        return names
    return ("batch",) if "batch" in batch else tuple(batch)


def count_examples(data: Data, batch: Batch, example_count: ExampleCount | None) -> float:
    """The weight of a batch: what ``example_count`` says, else the leading axis of its example arguments.

    Raises:
      ValueError: if the leading axes differ, or the count is negative or not finite.
    """
    if example_count is None:
        return float(leading_axis({name: batch[name] for name in example_arguments(data, batch)}))
    count = float(example_count(batch))
    if not (count >= 0 and np.isfinite(count)):
        raise ValueError(f"example_count must return a finite number that is not negative, got {count}.")
    return count


def leading_axis(arguments: Batch) -> int:
    """The length of the leading axis that all arrays in ``arguments`` share; scalars do not count."""
    shapes = {name: [np.shape(leaf) for leaf in jax.tree.leaves(value)] for name, value in arguments.items()}
    lengths = {shape[0] for found in shapes.values() for shape in found if shape}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"The number of examples is not clear from the shapes {brief(shapes)}, which should share one leading "
            "axis. Put the examples into an argument named 'batch', use Batches(...), or pass example_count=."
        )
    return int(lengths.pop())
