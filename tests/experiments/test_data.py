"""Data sets: the bytes that were stored, in the right order, or an error that helps."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("grain", reason="the experiments need pip install crsam_jax[experiments]")

from PIL import Image

from experiments.data import imagenet, source, subset, vision
from experiments.data.dataset import Split
from tests.experiments.prepared import examples, png, prepare

REAL = source.find_data_dir()
needs_real_data = pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="no prepared data sets in $TFDS_DATA_DIR")

# Numbers with which these data sets are normalized everywhere.
QUOTED = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (32, 32, 3), 50_000),
    "fashion_mnist": ((0.2860,), (0.3530,), (28, 28, 1), 60_000),
}


CIFAR = (32, 32, 3)
STORED = {"train": examples(30, CIFAR, 10, seed=0), "test": examples(7, CIFAR, 10, seed=1)}


def photographs(count, seed):
    """Images of several sizes whose pixels say which one it is."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(40, 80, (count, 2))
    images = [np.full((height, width, 3), index, np.uint8) for index, (height, width) in enumerate(sizes)]
    return images, np.arange(count) * 3


PHOTOGRAPHS = {"train": photographs(23, 0), "validation": photographs(11, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    prepare(path, "cifar10", "3.0.2", CIFAR, STORED, num_classes=10)
    prepare(path, "imagenet2012", "5.1.0", (None, None, 3), PHOTOGRAPHS, num_classes=1000)
    return path


def test_load_returns_the_stored_bytes_with_and_without_cache(folder, tmp_path):
    for _ in range(2):
        dataset = vision.load("cifar10", folder, tmp_path)
        for name, (images, labels) in STORED.items():
            split = getattr(dataset, name)
            assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
            np.testing.assert_array_equal(split.images, images)
            np.testing.assert_array_equal(split.labels, labels)
    assert (dataset.name, dataset.num_classes) == ("cifar10", 10)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_of_another_folder_is_not_taken(folder, tmp_path):
    images, labels = examples(5, CIFAR, 10, seed=2)
    prepare(tmp_path / "other", "cifar10", "3.0.2", CIFAR, {"train": (images, labels), "test": STORED["test"]}, 10)
    vision.load("cifar10", folder, tmp_path / "cache")
    other = vision.load("cifar10", tmp_path / "other", tmp_path / "cache")
    np.testing.assert_array_equal(other.train.images, images)


def test_channel_moments():
    images, _ = examples(9, (5, 6, 3), 2, seed=3)
    mean, std = vision.channel_moments(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


@needs_real_data
@pytest.mark.slow
@pytest.mark.parametrize("name", QUOTED)
def test_real_data_has_the_size_and_moments_everyone_quotes(name, tmp_path):
    dataset = vision.load(name, REAL, tmp_path)
    mean, std, shape, size = QUOTED[name]
    assert dataset.train.images.shape == (size, *shape)
    assert dataset.test.images.shape == (10_000, *shape)
    np.testing.assert_allclose(dataset.mean, mean, atol=1e-4)
    np.testing.assert_allclose(dataset.std, std, atol=1e-4)
    for split in dataset.train, dataset.test:
        np.testing.assert_array_equal(np.bincount(split.labels), len(split.labels) // 10)


def test_missing_data_says_what_to_do(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tfds build cifar100 --data_dir=.* --file_format=array_record"):
        vision.load("cifar100", folder, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_img_train.tar .* in .*manual"):
        imagenet.Reader(tmp_path).train_batches(8, seed=0)
    with pytest.raises(FileNotFoundError, match="imagenet2012_corrupted/fog_3 is not in"):
        imagenet.Reader(tmp_path).eval_batches(8, name="imagenet2012_corrupted/fog_3")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        vision.load("cifar-10", folder, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was fetched, nothing left behind


def test_another_file_format_is_an_error(tmp_path, monkeypatch):
    prepare(tmp_path, "cifar10", "3.0.2", CIFAR, STORED, num_classes=10)
    info = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord"):
        vision.load("cifar10", tmp_path, tmp_path / "cache")


def test_find_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert source.find_data_dir() == tmp_path
    assert source.find_data_dir("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert source.find_data_dir() == Path.home() / "tensorflow_datasets"


def shades(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def test_training_epochs_are_permutations_shared_by_the_processes(folder):
    count = 23
    streams = [
        imagenet.Reader(folder, image_size=16, num_workers=0, process_index=index, process_count=2).train_batches(
            2, seed=5
        )
        for index in range(2)
    ]
    # Process 0 has 12 examples, process 1 has 11: in that many batches each shows its own once.
    first, second = (
        [shades(next(stream))[0] for _ in range(size)] for stream, size in zip(streams, (12, 11), strict=True)
    )
    assert sorted(first + second) == list(range(count))
    again = [shades(next(streams[0]))[0] for _ in range(12)]
    assert again != first  # a new order, maybe of other examples


def test_training_batches_belong_together_and_resume(folder):
    def stream(seed):
        return imagenet.Reader(folder, image_size=16, num_workers=0).train_batches(6, seed=seed)

    batches = stream(5)
    batch = next(batches)
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 16, 16, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((6,), np.int32)
    np.testing.assert_array_equal(3 * batch["image"][:, 0, 0, 0].astype(np.int32), batch["label"])
    state = batches.get_state()
    following = [next(batches) for _ in range(6)]  # beyond the epoch
    resumed = stream(5)
    resumed.set_state(state)
    for batch in following:
        np.testing.assert_equal(next(resumed), batch)
    assert any((a["label"] != b["label"]).any() for a, b in zip(stream(6), [batch, *following], strict=False))


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_example_once_in_equal_batches(folder, process_count):
    streams = [
        list(
            imagenet.Reader(
                folder, image_size=16, num_workers=0, process_index=index, process_count=process_count
            ).eval_batches(4)
        )
        for index in range(process_count)
    ]
    assert {len(stream) for stream in streams} == {3}
    batches = [batch for stream in streams for batch in stream]
    assert {batch["image"].shape for batch in batches} == {(4 // process_count, 16, 16, 3)}
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sorted(labels[labels != imagenet.PADDING]) == PHOTOGRAPHS["validation"][1].tolist()
    for batch in batches:
        is_real = batch["label"] != imagenet.PADDING
        np.testing.assert_array_equal(3 * batch["image"][is_real, 0, 0, 0].astype(np.int32), batch["label"][is_real])


def test_worker_processes_change_nothing(folder):
    one, many = (
        imagenet.Reader(folder, image_size=16, num_workers=workers).train_batches(6, seed=5) for workers in (0, 2)
    )
    for _ in range(5):
        np.testing.assert_equal(next(many), next(one))
    once = [list(imagenet.Reader(folder, image_size=16, num_workers=workers).eval_batches(4)) for workers in (0, 2)]
    np.testing.assert_equal(once[1], once[0])


def test_unequal_shares_are_an_error(folder):
    with pytest.raises(ValueError, match="batch of 6 cannot be shared equally by 4"):
        imagenet.Reader(folder, process_count=4).train_batches(6, seed=0)


def test_classes_present(folder):
    np.testing.assert_array_equal(
        imagenet.Reader(folder).classes_present("imagenet2012", "validation"), np.arange(11) * 3
    )


def test_central_crop_is_resize_256_crop_224():
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((600, 300)))
    example = imagenet.eval_example({"image": png(pixels).read(), "label": 7}, image_size=224)
    resized = np.asarray(Image.fromarray(pixels).resize((512, 256), Image.Resampling.BILINEAR), np.int32)
    assert np.abs(example["image"].astype(np.int32) - resized[16:240, 144:368]).max() <= 1
    assert example["label"] == 7


def test_an_image_of_the_right_size_is_evaluated_as_it_is():
    pixels, _ = examples(1, (224, 224, 3), 2, seed=0)
    example = imagenet.eval_example({"image": png(pixels[0]).read(), "label": 1}, image_size=224)
    np.testing.assert_array_equal(example["image"], pixels[0])


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (32, 32), (1000, 20)])
def test_random_boxes_have_the_stated_area_and_ratio(width, height):
    rng = np.random.default_rng(0)
    boxes = np.array([imagenet.random_box(rng, width, height) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert (left >= 0).all()
    assert (upper >= 0).all()
    assert (right <= width).all()
    assert (lower <= height).all()
    box_width, box_height = right - left, lower - upper
    ratio = box_width / box_height
    slack = 1 / box_height.min() + 1 / box_width.min()  # of rounding to whole pixels
    assert ratio.min() > 3 / 4 * (1 - slack)
    assert ratio.max() < 4 / 3 * (1 + slack)
    area = box_width * box_height / (width * height)
    if width < 1000:
        assert 0.08 * (1 - slack) < area.min() < 0.1
        assert 0.9 < area.max() <= 1
    else:  # nearly all fall back on the central box
        assert np.median(box_width) == round(20 * 4 / 3)


def labelled(count, num_classes, seed=0):
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Split(images, np.random.default_rng(seed).integers(0, num_classes, count).astype(np.int32))


def test_label_noise_is_exact_symmetric_and_seeded():
    split = Split(np.zeros((30_000, 1, 1, 1), np.uint8), np.arange(30_000, dtype=np.int32) % 5)
    before = split.labels.copy()
    noisy = subset.with_label_noise(split, 0.4, 5, seed=1)
    np.testing.assert_array_equal(split.labels, before)
    is_wrong = noisy.labels != split.labels
    assert is_wrong.sum() == 12_000
    assert noisy.labels.dtype == np.int32
    table = np.zeros((5, 5), int)
    np.add.at(table, (split.labels[is_wrong], noisy.labels[is_wrong]), 1)
    others = table[~np.eye(5, dtype=bool)]
    expected = 12_000 / 20
    assert np.sum((others - expected) ** 2 / expected) < 43.8  # χ² of 19 degrees of freedom, p = 0.001
    np.testing.assert_array_equal(noisy.labels, subset.with_label_noise(split, 0.4, 5, seed=1).labels)
    assert (noisy.labels != subset.with_label_noise(split, 0.4, 5, seed=2).labels).any()


def test_take_per_class():
    split = labelled(200, 4)
    small = subset.take_per_class(split, 7, seed=3)
    np.testing.assert_array_equal(np.bincount(small.labels), 7)
    indices = small.images.ravel()
    assert (np.diff(indices.astype(int)) > 0).all()
    np.testing.assert_array_equal(split.labels[indices], small.labels)
    assert not np.array_equal(indices, subset.take_per_class(split, 7, seed=4).images.ravel())
    np.testing.assert_array_equal(indices, subset.take_per_class(split, 7, seed=3).images.ravel())


def test_split_validation_is_a_stratified_partition():
    split = labelled(200, 4)
    train, validation = subset.split_validation(split, 0.25, seed=0)
    together = np.concatenate([train.images.ravel(), validation.images.ravel()])
    np.testing.assert_array_equal(np.sort(together), split.images.ravel())
    for part in train, validation:
        np.testing.assert_array_equal(split.labels[part.images.ravel()], part.labels)
    np.testing.assert_array_equal(np.bincount(validation.labels), np.round(0.25 * np.bincount(split.labels)))


def test_subset_errors():
    split = labelled(20, 4)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        subset.with_label_noise(split, 1.5, 4, seed=0)
    with pytest.raises(ValueError, match="at least two classes"):
        subset.with_label_noise(split, 0.5, 1, seed=0)
    with pytest.raises(ValueError, match=r"Cannot take 100 of the \d+ examples of class 0"):
        subset.take_per_class(split, 100, seed=0)
    with pytest.raises(ValueError, match="Cannot take 0 of"):
        subset.split_validation(split, 0.01, seed=0)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\), got 1"):
        subset.split_validation(split, 1, seed=0)
