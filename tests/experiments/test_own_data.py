"""Data, networks and recipes of the user: folders of images, arrays, TFDS, and objects in a Python file."""

import json

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from PIL import Image
from sklearn.datasets import load_digits

from experiments.cli import main
from experiments.data import arrays, catalog, folder
from experiments.data.inputs import load
from experiments.settings import overrides, sources
from experiments.training.restore import restore
from tests.experiments.prepared import examples, prepare

CODE = '''
from flax import nnx
import jax.numpy as jnp
import numpy as np
from experiments.settings.recipes import Recipe

def bars():
    """Stripes, of as many pixels as their class says."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = np.zeros((120, 6, 6), np.uint8)
    for image, label in zip(images, labels):
        image[:, : 2 * label + 1] = 255
    return {"train_images": images + rng.integers(0, 2, images.shape, np.uint8) * 0, "train_labels": labels}

class Linear(nnx.Module):
    def __init__(self, num_classes, image_shape, rngs, scale=1.0):
        self.layer, self.scale = nnx.Linear(int(np.prod(image_shape)), num_classes, rngs=rngs), scale

    def __call__(self, images):
        return self.scale * self.layer(images.reshape(len(images), -1))

def wrong_shape(num_classes, rngs):
    return Linear(num_classes + 1, (6, 6, 1), rngs)

def needs_more(num_classes, depth):
    return None

def no_network(rngs):
    return 3

def fails():
    return {}["missing"]

def of_lists():
    return [1, 2]

small = Recipe(":bars", ":Linear", 2, 16, 0.1, 0.0, augmentation="none", model_options={"scale": 2.0})
'''


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return (15 * found.images).astype(np.uint8), found.target


@pytest.fixture
def photos(digits, tmp_path):
    """Ten images of each of three classes for training, and four for testing."""
    images, labels = digits
    for label in range(3):
        for index, number in enumerate(np.flatnonzero(labels == label)[:14]):
            split = "train" if index < 10 else "test"
            write(tmp_path / "photos" / split / f"class_{label}" / f"{index:02}.png", images[number])
    return tmp_path / "photos"


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def run_command(monkeypatch, capsys, tmp_path):
    """Runs a command line in this process: status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["experiments", *map(str, arguments)])
        status = main()
        return (status, *capsys.readouterr())

    return run


def test_a_folder_gives_its_pixels_and_classes(photos, tmp_path):
    (photos / "train" / "class_0" / "notes.txt").write_text("no image")
    for _ in range(2):  # decoded, then from the cache
        found = folder.load(photos, 64, tmp_path / "cache")
        assert (found.name, found.num_classes, found.train.images.shape) == ("photos", 3, (30, 8, 8, 1))
        np.testing.assert_array_equal(found.train.labels, np.repeat(np.arange(3), 10))
        with Image.open(photos / "test" / "class_2" / "11.png") as image:
            np.testing.assert_array_equal(found.test.images[9, ..., 0], np.asarray(image))
    assert "30 training, 12 test images; 8x8 pixels, 1 channel(s); 3 classes: class_0, class_1, class_2" in found.note
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_images_of_several_sizes_become_squares(photos, tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200  # the central square
    write(photos / "train" / "class_0" / "wide.png", pixels)
    found = folder.load(photos, 16, tmp_path / "cache")
    assert found.train.images.shape == (31, 16, 16, 3)
    assert (found.train.images[10, :, 1:-1] == 200).all()


def test_photographs_are_turned_as_their_camera_says(photos, tmp_path):
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:20] = 200  # the upper half, which was the right one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(photos / "train" / "class_0" / "turned.jpg", exif=exif)
    found = folder.load(photos, 16, tmp_path / "cache").train.images[10, ..., 0].astype(int)
    assert found[:, 9:].min() > 150
    assert found[:, :7].max() < 50


def test_without_test_data_a_fifth_is_held_out(photos, tmp_path):
    (photos / "test").rename(tmp_path / "elsewhere")
    found = folder.load(photos, 64, tmp_path / "cache")
    assert np.bincount(found.train.labels).tolist() == [8] * 3
    assert np.bincount(found.test.labels).tolist() == [2] * 3
    assert "6 test images, 20% of the training images" in found.note


def test_a_folder_with_validation_data_is_searched_on_it(photos, tmp_path):
    (photos / "val").mkdir()
    (photos / "train" / "class_1").rename(tmp_path / "kept")
    (tmp_path / "kept").rename(photos / "train" / "class_1")
    write(photos / "val" / "class_1" / "a.png", np.full((8, 8), 7, np.uint8))
    recipe = overrides.find(str(photos))
    assert recipe.validation_fraction == 0.0
    found = load(overrides.changed(recipe, {"evaluate_on": "validation"}))
    assert (found.test.images == 7).all()
    assert found.test.labels.tolist() == [1]


def damage(name):
    def act(photos):
        match name:
            case "train":
                (photos / "train").rename(photos / "tarin")
            case "one class":
                for label in (1, 2):
                    for path in (photos / "train" / f"class_{label}").iterdir():
                        path.unlink()
                    (photos / "train" / f"class_{label}").rmdir()
            case "empty class":
                (photos / "train" / "class_9").mkdir()
            case "unknown class":
                (photos / "test" / "class_0").rename(photos / "test" / "clas_0")
            case "no image":
                (photos / "train" / "class_0" / "00.png").write_bytes(b"text")
            case "cut off":
                path = photos / "train" / "class_0" / "00.png"
                path.write_bytes(path.read_bytes()[:60])
            case "deep":
                write(photos / "train" / "class_0" / "00.png", np.zeros((8, 8), np.uint16))
            case "few":
                (photos / "test").rename(photos / "set aside")
                for path in sorted((photos / "train" / "class_2").iterdir())[1:]:
                    path.unlink()

    return act


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("train", "has no folder train with a folder of images for each class; it holds tarin, test"),
        ("one class", r"must hold a folder for each of at least two classes, got \['class_0'\]"),
        ("empty class", r"class_9 has no image; known are files ending in \.png"),
        ("unknown class", r"no class in .*train like that of .*clas_0, 'clas_0': did you mean 'class_0'"),
        ("no image", r"class_0/00.png is damaged, or no image: replace or remove it"),
        ("cut off", r"class_0/00.png is damaged, or no image: replace or remove it"),
        ("deep", r"class_0/00.png has pixels of more than 8 bits .*: convert it to 8 bits"),
        ("few", r"there is no test data, and class 'class_2' has a single training image"),
    ],
)
def test_each_mistake_in_a_folder_is_a_line(how, said, photos, tmp_path):
    damage(how)(photos)
    with pytest.raises(ValueError, match=said) as caught:
        folder.load(photos, 64, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_arrays_under_our_names_and_keras(tmp_path):
    images, labels = examples(30, (5, 6), 3, seed=0)
    labels[:3] = range(3)
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images[:4], test_labels=labels[:4]
    )
    np.savez(
        tmp_path / "b.npz", x_train=images[..., None], y_train=labels[:, None], x_test=images[:4], y_test=labels[:4]
    )
    names = np.array(["ant", "bee", "cat"])
    np.savez(
        tmp_path / "c.npz", train_images=images, train_labels=names[labels], val_images=images[:2],
        val_labels=names[labels[:2]], test_images=images[:4], test_labels=names[labels[:4]],
    )  # fmt: skip
    for name in "abc":
        found = catalog.load(str(tmp_path / f"{name}.npz"))
        np.testing.assert_array_equal(found.train.images[..., 0], images)
        np.testing.assert_array_equal(found.train.labels, labels)
        np.testing.assert_array_equal(found.test.labels, labels[:4])
        assert found.num_classes == 3
    assert "3 classes: ant, bee, cat" in found.note
    assert [arrays.has_validation(tmp_path / f"{name}.npz") for name in "abc"] == [False, False, True]


IMAGES, LABELS = np.zeros((6, 4, 4), np.uint8), np.arange(6) % 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": IMAGES}, "must hold train_images and train_labels, .*; it holds images"),
        ({"train_images": IMAGES}, "has no train_labels; it holds train_images"),
        ({"train_images": IMAGES / 255, "train_labels": LABELS}, r"must be uint8, .*, got float64 in 0, ..., 0"),
        (
            {"train_images": IMAGES[0], "train_labels": LABELS},
            r"must have the shape \[examples, height, width, channels\]",
        ),
        ({"train_images": IMAGES, "train_labels": LABELS[:5]}, "6 images and 5 labels"),
        ({"train_images": IMAGES, "train_labels": LABELS - 1}, "labels must be in 0, ..., classes - 1, got -1, ..., 0"),
        (
            {"train_images": IMAGES, "train_labels": 2 * LABELS},
            "with images of each class, but 1 has none: number the classes",
        ),
        (
            {"train_images": IMAGES, "train_labels": np.eye(6)},
            r"list of whole numbers .*, got float64 of shape \[6, 6\]",
        ),
        (
            {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES[:, :3], "test_labels": LABELS},
            r"test: images must have shape \[4, 4, 1\], got \[3, 4, 1\]",
        ),
        (
            {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS + 1},
            "test: labels must be in 0, ..., 1 for 2 classes, but they are in 1, ..., 2",
        ),
        (
            {
                "x_train": IMAGES,
                "y_train": np.array(list("aabbcc")),
                "x_test": IMAGES,
                "y_test": np.array(list("aabbcd")),
            },
            "test: class 'd' is not in train",
        ),
    ],
)
def test_each_mistake_in_arrays_is_a_line(content, said):
    with pytest.raises(ValueError, match=said) as caught:
        arrays.from_arrays("few", content)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_npz_and_a_path_that_is_not_there(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"is no .npz file of plain arrays"):
        catalog.load(str(tmp_path / "a.npz"))
    with pytest.raises(FileNotFoundError, match=r"If it was moved, name the folder that holds b.npz with --data-dir"):
        catalog.load(str(tmp_path / "b.npz"))
    (tmp_path / "moved").mkdir()
    np.savez(tmp_path / "moved" / "b.npz", train_images=IMAGES, train_labels=LABELS)
    assert len(catalog.load(str(tmp_path / "b.npz"), tmp_path / "moved").test.labels) == 2


def test_any_image_classification_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits = {"train": examples(20, (9, 7, 3), 2, seed=0), "validation": examples(6, (9, 7, 3), 2, seed=1)}
    prepare(tmp_path, "horses_or_humans", "3.0.0", (9, 7, 3), splits, 2)
    for name in ("horses_or_humans", "tfds:horses_or_humans"):
        found = catalog.load(name, tmp_path)
        np.testing.assert_array_equal(found.train.images, splits["train"][0])
        np.testing.assert_array_equal(found.test.labels, splits["validation"][1])
    several = [np.full((height, 12, 3), 5 * height, np.uint8) for height in (10, 20, 30, 12)], np.arange(4) % 2
    prepare(tmp_path / "other", "cats_vs_dogs", "4.0.1", (None, None, 3), {"train": several}, 2)
    found = catalog.load("cats_vs_dogs", tmp_path / "other", image_size=8)
    assert found.train.images.shape == (2, 8, 8, 3)
    assert {*found.train.images.ravel(), *found.test.images.ravel()} == {50, 100, 150, 60}


def test_a_data_set_that_does_not_exist_says_what_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no data set 'mnits': did you mean 'mnist'"):
        catalog.load("mnits", tmp_path)
    (tmp_path / "photos-of-mine").mkdir()
    with pytest.raises(ValueError, match=r"neither digits nor a name of TFDS. .* write ./photos-of-mine"):
        catalog.load("photos-of-mine", tmp_path)
    with pytest.raises(ValueError, match=r"no recipe 'photos-of-mine': .* write ./photos-of-mine"):
        overrides.find("photos-of-mine")


def test_a_recipe_of_a_file_is_trained_opened_and_exported(code, run_command, tmp_path):
    status, said, errors = run_command("train", "mine.py:small", "--method", "sam", "--keep", "1")
    assert status == 0, errors
    assert "bars: 96 training, 24 test images, 20% of the training images; 6x6 pixels" in said
    out = tmp_path / "results" / "small" / "sam-none-seed0"
    config = json.loads((out / "config.json").read_text())
    assert config["dataset"] == f"{code}:bars"
    assert config["model"] == f"{code}:Linear"
    assert restore(out).state.params["layer"]["kernel"].shape == (36, 3)
    assert run_command("evaluate", out)[0] == 0
    assert run_command("export", out)[0] == 0
    status, said, _ = run_command("train", out / "config.json", "--out", out)
    assert "complete, 12 steps" in said


LINE = CODE[: CODE.index('["missing"]')].count("\n") + 1
NO_OPTIONS = ["--set", "model_options={}"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.py:small"], "There is no file nothing.py"),
        (["mine.py:smal"], "no object in mine.py named 'smal': did you mean 'small'"),
        (["mine.py:bars"], "mine.py:bars must be a Recipe of experiments.settings.recipes, got function"),
        (["broken.py:x"], "broken.py, line 2: NameError: name 'undefined' is not defined"),
        (["syntax.py:x"], "syntax.py, line 1: SyntaxError"),
        (["mine.py:small", "--dataset", "mine.py:fails"], f"mine.py:fails, line {LINE}: KeyError: 'missing'"),
        (["mine.py:small", "--dataset", "mine.py:of_lists"], "of_lists must give a dict of arrays, train_images and"),
        (["mine.py:small", "--dataset", "mine.py:small"], "mine.py:small must be a function, got Recipe"),
        (["mine.py:small", "--model", "mine.py:wrong_shape", *NO_OPTIONS], "logits of the shape [examples, 3]"),
        (["mine.py:small", "--model", "mine.py:no_network", *NO_OPTIONS], "must return a flax.nnx.Module, got int"),
        (["mine.py:small", "--model", "mine.py:needs_more", *NO_OPTIONS], "the argument depth, which nothing gives"),
        (["mine.py:small", "--set", "model_options={\"scal\": 1}"], "did you mean 'scale'"),
        (["mine.py:small", "--dtype", "bfloat16"], "has no argument dtype, so it computes in float32 alone"),
        (["mine.py:small", "--batch-size", "200"], "96 training examples do not fill a batch of 200: choose a smaller"),
    ],
)  # fmt: skip
def test_each_mistake_in_a_file_is_a_line(arguments, said, code, run_command, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\nundefined\n")
    (tmp_path / "syntax.py").write_text("x = (\n")
    status, _, errors = run_command("train", *arguments)
    assert status == 1
    assert said in errors
    assert errors.count("\n") == 1


def test_a_folder_is_compared_in_worker_processes(photos, run_command, tmp_path):
    status, said, errors = run_command(
        "compare", "./photos", "--methods", "base", "sam", "--seeds", "2", "--epochs", "1", "--batch-size", "8",
        "--model", "convnet", "--model-options", "width", "4", "--processes", "2", "--probe-examples", "0",
    )  # fmt: skip
    assert status == 0, errors
    assert said.count("24 training") == 0
    assert "photos: 30 training, 12 test images" in said
    table = (tmp_path / "results" / "photos" / "compare" / "table.md").read_text()
    assert "SAM" in table
    config = json.loads((tmp_path / "results" / "photos" / "compare" / "sam-seed1" / "config.json").read_text())
    assert config["dataset"] == str(photos)


def test_names_of_paths():
    assert sources.absolute("digits") == "digits"
    assert sources.absolute("imagenet2012_corrupted/fog_3") == "imagenet2012_corrupted/fog_3"
    assert sources.absolute("/a/../b.npz") == "/b.npz"
    assert not sources.is_own("cifar10")
