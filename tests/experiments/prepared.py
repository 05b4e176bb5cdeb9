"""Small data sets, prepared as TFDS prepares the real ones."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def prepare(folder, name, version, image_shape, splits, num_classes):
    """Writes a small data set where, and as, TFDS would put the real one.

    Args:
      folder: of the data sets.
      name: of the data set, with its configuration if it has several, as in ``"imagenet2012_corrupted/fog_3"``.
      version: of the data set.
      image_shape: of its images, with None where they differ.
      splits: name to (images, labels).
      num_classes: of the labels.
    """
    name, _, config = name.partition("/")

    def info(self):
        features = {
            "image": tfds.features.Image(shape=image_shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=num_classes),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def generate(images, labels):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": png(image), "label": int(label)}

    methods = {
        "VERSION": tfds.core.Version(version),
        "__module__": __name__,
        "pkg_dir_path": Path(__file__).parent,
        "_info": info,
        "_split_generators": lambda self, _: {split: generate(*data) for split, data in splits.items()},
        "_generate_examples": None,
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=config)] if config else [],
    }
    class_name = "".join(map(str.capitalize, name.split("_")))
    with tfds.core.registered.skip_registration():
        builder = type(class_name, (tfds.core.GeneratorBasedBuilder,), methods)
    builder(data_dir=folder, config=config or None, file_format="array_record").download_and_prepare()


def examples(count, shape, num_classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, num_classes, count)
