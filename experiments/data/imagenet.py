"""ImageNet, ImageNet-C and ImageNet-R: batches from worker processes, each host its own share.

Batches are dicts of ``image``, uint8 [batch, size, size, 3], and ``label``, int32 [batch]. The label −1 marks the
padding of an evaluation's last batches: every process sees equally many batches of equal shape, as steps over several
hosts need.
"""

import dataclasses
import io
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from experiments.data.source import examples, find_builder, undamaged

NUM_CLASSES = 1000
TRAINING_EXAMPLES = 1_281_167
PADDING = -1

# Of pixels in [0, 1]; the figures everyone uses.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen of ImageNet-C over which accuracy is averaged; evaluate ``imagenet2012_corrupted/{name}_{severity}``."""

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reader:
    """ImageNet and its relatives, as one of several processes reads them.

    Data that is not there is a FileNotFoundError that says what to do, and a batch that the processes cannot share
    equally a ValueError. Batch sizes are those of all processes together.

    Attributes:
      data_dir: see :func:`experiments.data.source.find_data_dir`.
      image_size: side of the crops in pixels.
      num_workers: processes that decode; 0 decodes in this one.
      process_index: which share of the data, ``jax.process_index()``.
      process_count: of how many, ``jax.process_count()``.
    """

    data_dir: str | Path | None = None
    image_size: int = 224
    num_workers: int = 8
    process_index: int = 0
    process_count: int = 1

    def train_batches(self, batch_size: int, seed: int, name: str = "imagenet2012") -> grain.DatasetIterator[Batch]:
        """Endless random batches: shuffled anew each epoch, Inception-style crops, flips; ``seed`` is that of all.

        The iterator's ``get_state()`` and ``set_state(...)`` make it resume at the very batch.
        """
        dataset = grain.MapDataset.source(self._source(name, "train")).seed(seed).shuffle()
        dataset = dataset[self.process_index :: self.process_count].repeat()
        return self._batches(dataset.random_map(partial(train_example, image_size=self.image_size)), batch_size)

    def eval_batches(
        self, batch_size: int, name: str = "imagenet2012", split: str = "validation"
    ) -> grain.DatasetIterator[Batch]:
        """One pass in order, the last batches padded: 8/7 of ``image_size`` for the shorter side, the central crop.

        Names are ``"imagenet2012"``, ``"imagenet2012_corrupted/fog_3"``, or ``"imagenet_r"`` with the split ``"test"``.
        """
        source = self._source(name, split)
        dataset = grain.MapDataset.source(Padded(source, -(-len(source) // batch_size) * batch_size))
        dataset = dataset[self.process_index :: self.process_count]
        return self._batches(dataset.map(partial(eval_example, image_size=self.image_size)), batch_size)

    def classes_present(self, name: str, split: str) -> np.ndarray:
        """The classes that occur, ascending: 200 in ImageNet-R, among whose logits alone its accuracy is measured."""
        return np.unique([example["label"] for example in examples(self._source(name, split))])

    def _source(self, name: str, split: str) -> Any:
        import tensorflow_datasets as tfds

        builder = find_builder(name, self.data_dir)
        with undamaged(name, self.data_dir):
            return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def _batches(self, dataset: grain.MapDataset[Batch], batch_size: int) -> grain.DatasetIterator[Batch]:
        """Each worker makes whole batches, every ``num_workers``-th, so that their number does not change the order."""
        if batch_size < 1 or batch_size % self.process_count:
            raise ValueError(f"A batch of {batch_size} cannot be shared equally by {self.process_count} processes.")
        batches = dataset.batch(batch_size // self.process_count, drop_remainder=True)
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only an absl application parses
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.num_workers))
        return iter(stream)


def train_example(element: dict[str, Any], rng: np.random.Generator, *, image_size: int) -> Batch:
    """From an encoded example to a random crop, flipped half of the time."""
    image = _decode(element["image"])
    box = random_box(rng, image.width, image.height)
    pixels = np.asarray(image.crop(box).resize((image_size, image_size), Image.Resampling.BILINEAR))
    return _example(pixels[:, ::-1] if rng.random() < 0.5 else pixels, element["label"])


def eval_example(element: dict[str, Any], *, image_size: int) -> Batch:
    """From an encoded example to the central crop; an image of the right size, as in ImageNet-C, stays as it is."""
    if not element:
        return _example(np.zeros((image_size, image_size, 3), np.uint8), PADDING)
    image = _decode(element["image"])
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=central_box(image))
    return _example(np.asarray(image), element["label"])


class Padded:
    """A source with empty elements after its last example, up to ``size``; grain would skip ``None``."""

    def __init__(self, source: Any, size: int):
        self._source = source
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index] if index < len(self._source) else {}


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """An Inception-style crop: 8 to 100 % of the area, aspect ratio log-uniform in [3/4, 4/3].

    After ten sizes that do not fit, the largest central box whose ratio does.

    Returns:
      left, upper, right, lower in whole pixels.

    References:
      Szegedy et al.: Going Deeper with Convolutions, CVPR 2015.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * width * height
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_width, box_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            upper = int(rng.integers(height - box_height + 1))
            return left, upper, left + box_width, upper + box_height
    box_width, box_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - box_width) // 2, (height - box_height) // 2
    return left, upper, left + box_width, upper + box_height


def central_box(image: Image.Image) -> tuple[float, float, float, float]:
    """The central square whose side is 7/8 of the image's shorter one: 224 pixels of 256."""
    side = min(image.size) * 7 / 8
    left, upper = (image.width - side) / 2, (image.height - side) / 2
    return left, upper, left + side, upper + side


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _example(pixels: np.ndarray, label: int) -> Batch:
    return {"image": np.ascontiguousarray(pixels), "label": np.asarray(label, np.int32)}
