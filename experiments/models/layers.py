"""The layers that the convolutional networks share, all of one precision."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

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


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network.

    Attributes:
      dtype: in which convolutions and normalizations compute.
      param_dtype: in which parameters and running statistics are kept.
      rngs: where initial values come from.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nnx.Conv:
        """A convolution without bias, padded by kernel // 2 on every side."""
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=(stride, stride),
            padding=kernel // 2,  # not "SAME", which pads one side only when it strides
            use_bias=False,
            kernel_init=he_normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def batch_norm(self, features: int, *, zero_init: bool = False) -> nnx.BatchNorm:
        """Batch normalization; a tenth of each batch's statistics enters the running ones, which start at 0 and 1."""
        norm = nnx.BatchNorm(
            features,
            momentum=0.9,
            epsilon=1e-5,
            scale_init=nnx.initializers.zeros if zero_init else nnx.initializers.ones,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )
        norm.mean, norm.var = RunningStatistic(norm.mean[...]), RunningStatistic(norm.var[...])
        return norm

    def head(self, inputs: int, outputs: int) -> nnx.Linear:
        """The classifier. It computes in ``param_dtype``: a loss of rounded logits would be rounded itself."""
        return nnx.Linear(inputs, outputs, dtype=self.param_dtype, param_dtype=self.param_dtype, rngs=self.rngs)
