"""The layers that the networks share, all of one precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Shape = tuple[int, int, int]
"""Height, width and channels of an image."""

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class RunningStatistic(nnx.BatchStat[jax.Array]):
    """A statistic of BatchNorm that an assignment replaces whole.

    nnx first compares the two arrays' sharding. A traced array has none, and jax before 0.12 walks the whole program
    traced so far to say so in an error that is then dropped: minutes in a network of a hundred layers.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        if index is ...:
            self.set_value(value)
        else:
            super().__setitem__(index, value)


class Layers(NamedTuple):
    """Makes the layers of one network, which compute in ``dtype``; parameters and statistics are float32."""

    dtype: DTypeLike
    rngs: nnx.Rngs

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int | str | None = None
    ) -> nnx.Conv:
        """A convolution without bias.

        By default it is padded by kernel // 2 on every side: "SAME" pads one only when it strides.
        """
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2 if padding is None else padding,
            use_bias=False,
            kernel_init=he_normal,
            dtype=self.dtype,
            rngs=self.rngs,
        )

    def batch_norm(
        self, features: int, *, zero_init: bool = False, momentum: float = 0.9, epsilon: float = 1e-5
    ) -> nnx.BatchNorm:
        """Batch normalization.

        By default a tenth of each batch's statistics enters the running ones, which start at 0 and 1.
        """
        scale_init = nnx.initializers.zeros if zero_init else nnx.initializers.ones
        norm = nnx.BatchNorm(
            features, momentum=momentum, epsilon=epsilon, scale_init=scale_init, dtype=self.dtype, rngs=self.rngs
        )
        norm.mean, norm.var = RunningStatistic(norm.mean[...]), RunningStatistic(norm.var[...])
        return norm

    def head(self, inputs: int, outputs: int, **options: Any) -> nnx.Linear:
        """The classifier. It computes in float32: a loss of rounded logits would be rounded itself."""
        return nnx.Linear(inputs, outputs, dtype=jnp.float32, rngs=self.rngs, **options)
