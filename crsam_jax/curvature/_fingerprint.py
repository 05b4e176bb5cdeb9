"""A checksum of the examples of a batch, by which a loader that changes between passes is noticed.

It does not depend on the order of the examples: a shuffled data set has the same mean loss. It reads at most 16
numbers per example and array, which costs far less than a forward pass.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = 16
_WORD = 2**64
_FACTORS = np.random.default_rng(0).integers(0, _WORD, size=_NUMBERS * 16, dtype=np.uint64) | np.uint64(1)


def fingerprint(arguments: Mapping[str, Any]) -> int:
    """The sum of a hash of each example, modulo 2⁶⁴; a batch whose arrays share no leading axis counts as one."""
    leaves = [_readable(leaf) for leaf in jax.tree.leaves(dict(arguments))]
    shapes = [np.shape(leaf) for leaf in leaves]
    lengths = {shape[0] for shape in shapes if shape}
    count = lengths.pop() if len(lengths) == 1 else 1
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for leaf, shape in zip(leaves, shapes, strict=True):
            is_per_example = bool(shape) and shape[0] == count
            total = total * np.uint64(0x9E3779B97F4A7C15) + _hashes(leaf, count if is_per_example else 1)
        total = (total ^ (total >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return int(np.sum(total ^ (total >> np.uint64(29)), dtype=np.uint64))


def _readable(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:  # other processes hold a part, which cannot be read
            return np.zeros(leaf.shape, np.uint8)
    return leaf


def _hashes(leaf: Any, count: int) -> Any:
    """A hash of some numbers of each of ``count`` rows."""
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        leaf = np.asarray(leaf)
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    rows = leaf.reshape(count, -1) if leaf.size else np.zeros((count, 0), np.uint8)
    columns = np.unique(np.linspace(0, max(rows.shape[1] - 1, 0), _NUMBERS).astype(int))
    sample = np.asarray(rows[:, columns[: rows.shape[1]]])
    if sample.dtype.hasobject:
        sample = np.array([[hash(str(item)) % _WORD for item in row] for row in sample], np.uint64)
    octets = np.ascontiguousarray(sample).view(np.uint8).reshape(count, -1).astype(np.uint64)
    return np.sum((octets + np.uint64(1)) * _FACTORS[: octets.shape[1]], axis=1, dtype=np.uint64)
