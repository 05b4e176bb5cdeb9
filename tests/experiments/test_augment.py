"""Augmentations against the Python imaging library and NumPy, and their chances against the stated ones."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("PIL", reason="the experiments need pip install crsam_jax[experiments]")

from PIL import Image, ImageEnhance, ImageOps

from experiments.networks.augment import augment, autoaugment, basic, cutout, inception_crop, normalize, random_flip
from experiments.networks.augment.autoaugment import POLICY, apply, make_operation
from experiments.networks.augment.basic import random_crop
from experiments.networks.augment.inception import random_box, resize_box

OPERATIONS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "Invert", "AutoContrast", "Equalize"),
)
apply_jitted = jax.jit(apply)


def photograph(height=32, width=32, channels=3, seed=0):
    """Smooth with some noise, like a small photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int32) + rng.integers(-9, 10, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)[..., :channels]


def imaging_library(image, name, level, sign):
    """The operation as the Python imaging library does it, magnitudes as in the paper's table 6."""
    picture = Image.fromarray(image.squeeze())
    grey = (128,) * image.shape[-1] if image.shape[-1] == 3 else 128
    strength = sign * level / 9

    def affine(*coefficients):
        return picture.transform(
            picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=grey
        )

    width, height = picture.size
    match name:
        case "ShearX":
            result = affine(1, 0.3 * strength, 0, 0, 1, 0)
        case "ShearY":
            result = affine(1, 0, 0, 0.3 * strength, 1, 0)
        case "TranslateX":
            result = affine(1, 0, int(150 / 331 * width * strength), 0, 1, 0)
        case "TranslateY":
            result = affine(1, 0, 0, 0, 1, int(150 / 331 * height * strength))
        case "Rotate":
            result = picture.rotate(30 * strength, Image.Resampling.NEAREST, fillcolor=grey)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            enhancer = getattr(ImageEnhance, name)(picture)
            other, tenths = np.asarray(enhancer.degenerate, np.int32).reshape(image.shape), 10 + sign * level
            result = np.clip(((10 - tenths) * other + tenths * image.astype(np.int32)) // 10, 0, 255).astype(np.uint8)
            # The library blends in float32, which where the blend is a whole number may fall just below it.
            theirs = np.asarray(enhancer.enhance(tenths / 10), np.int32).reshape(image.shape)
            assert set(np.unique(result - theirs)) <= {0, 1}
        case "Posterize":
            result = ImageOps.posterize(picture, int(np.round(np.linspace(8, 4, 10))[level]))
        case "Solarize":
            result = ImageOps.solarize(picture, np.linspace(256, 0, 10)[level])
        case "Invert":
            result = ImageOps.invert(picture)
        case "AutoContrast":
            theirs = np.asarray(ImageOps.autocontrast(picture), np.int32).reshape(image.shape)
            low, high = (bound(image.astype(np.int32), axis=(0, 1)) for bound in (np.min, np.max))
            # Where the stretched level is a whole number, the library's doubles may fall just below it.
            level, rest = np.divmod((image - low) * 255, np.maximum(high - low, 1))
            result = np.where((rest == 0) & (high > low), level, theirs).astype(np.uint8)
            assert set(np.unique(result - theirs)) <= {0, 1}
        case "Equalize":
            result = ImageOps.equalize(picture)
    return np.asarray(result).reshape(image.shape)


PICTURES = {
    "photograph": photograph(),
    "noise": np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8),
    "constant": np.full((32, 32, 3), 77, np.uint8),
    "two levels": np.random.default_rng(2).choice(np.array([30, 200], np.uint8), (32, 32, 3)),
    "not square": photograph(20, 36, seed=3),
    "one channel": photograph(28, 28, channels=1, seed=4),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_the_imaging_library(name, picture):
    image = PICTURES[picture]
    height, width, _ = image.shape
    for level in range(10):
        for sign in (1, -1):
            result = apply_jitted(make_operation(name, level, sign, height, width), image)
            np.testing.assert_array_equal(result, imaging_library(image, name, level, sign), err_msg=f"{level} {sign}")


def chances_of_policy(image):
    """All images the policy can lead to, as bytes, with their probabilities."""
    chances = collections.Counter()
    for subpolicy in POLICY:
        outcomes = {image.tobytes(): 1 / len(POLICY)}
        for name, probability, level in subpolicy:
            following = collections.Counter()
            for data, chance in outcomes.items():
                before = np.frombuffer(data, np.uint8).reshape(image.shape)
                following[data] += chance * (1 - probability)
                for sign in (1, -1):
                    following[imaging_library(before, name, level, sign).tobytes()] += chance * probability / 2
            outcomes = following
        chances.update(outcomes)
    return {data: chance for data, chance in chances.items() if chance > 0}


def assert_counts_fit(counts, chances, total):
    """Pearson's χ² test at 10⁻⁴, outcomes expected fewer than five times taken together."""
    assert set(counts) <= set(chances)
    observed, expected = [0], [0.0]
    for outcome, chance in chances.items():
        if chance * total < 5:
            observed[0] += counts[outcome]
            expected[0] += chance * total
        else:
            observed.append(counts[outcome])
            expected.append(chance * total)
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 0)
    freedom = len(expected) - 1 - (expected[0] == 0)
    # Wilson and Hilferty: (χ²/k)^⅓ is normal of mean 1 − 2/(9k) and variance 2/(9k).
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 3.72


def copies(image, count):
    return jnp.broadcast_to(jnp.asarray(image), (count, *image.shape))


def counted(images):
    return collections.Counter(image.tobytes() for image in np.asarray(images))


def test_the_policy_has_25_subpolicies_of_known_operations():
    assert len(POLICY) == 25
    assert {name for subpolicy in POLICY for name, _, _ in subpolicy} <= set(OPERATIONS)


def test_autoaugment_follows_the_policy():
    image, total = photograph(16, 16), 20_000
    chances = chances_of_policy(image)
    assert sum(chances.values()) == pytest.approx(1)
    results = jax.jit(autoaugment)(jax.random.key(0), copies(image, total))
    assert results.dtype == jnp.uint8
    assert_counts_fit(counted(results), chances, total)


def test_autoaugment_of_normalized_images_is_an_error():
    with pytest.raises(TypeError, match="augment before normalizing"):
        autoaugment(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_basic_takes_each_crop_and_flip_as_often(dtype):
    image, total = photograph(8, 10).astype(dtype), 8000
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 8, x : x + 10] for y in range(9) for x in range(9)]
    chances = {crop[:, ::step].tobytes(): 1 / 162 for crop in crops for step in (1, -1)}
    assert len(chances) == 162
    results = jax.jit(basic)(jax.random.key(1), copies(image, total))
    assert results.dtype == dtype
    assert_counts_fit(counted(results), chances, total)


def test_flip_and_crop_treat_the_images_of_a_batch_apart():
    images = jnp.asarray(np.stack([photograph(seed=seed) for seed in range(64)]))
    flipped = random_flip(jax.random.key(0), images)
    is_same = np.array([(a == b).all() for a, b in zip(flipped, images, strict=True)])
    assert 16 < is_same.sum() < 48
    np.testing.assert_array_equal(flipped[~is_same], images[~is_same][:, :, ::-1])
    np.testing.assert_array_equal(random_crop(jax.random.key(0), images, padding=0), images)


@pytest.mark.parametrize("size", [4, 6])
def test_cutout_centres_on_each_pixel_as_often(size):
    image, total = photograph(7, 9).astype(np.float32) + 1, 8000
    chances = collections.Counter()
    for y in range(7):
        for x in range(9):
            expected = image.copy()
            top, left = max(y - size // 2, 0), max(x - size // 2, 0)
            expected[top : y + size // 2, left : x + size // 2] = 0
            chances[expected.tobytes()] += 1 / 63
    results = jax.jit(cutout, static_argnums=2)(jax.random.key(2), copies(image, total), size)
    assert_counts_fit(counted(results), chances, total)


def test_cutout_of_16_pixels_covers_at_most_256_and_at_least_a_quarter():
    areas = np.sum(np.asarray(cutout(jax.random.key(0), jnp.ones((5000, 32, 32, 1)))) == 0, axis=(1, 2, 3))
    assert areas.max() == 256
    assert areas.min() == 64


@pytest.mark.parametrize("size", [(32, 32), (12, 50)])
def test_resize_box_equals_the_imaging_library(size):
    image = photograph(40, 48)
    rng = np.random.default_rng(0)
    resize = jax.jit(resize_box, static_argnums=2)
    for _ in range(20):
        height, width = rng.integers(3, 41), rng.integers(3, 49)
        upper, left = rng.integers(0, 41 - height), rng.integers(0, 49 - width)
        cropped = Image.fromarray(image[upper : upper + height, left : left + width])
        expected = cropped.resize(size[::-1], Image.Resampling.BILINEAR)
        result = resize(image, jnp.array([upper, left, height, width]), size)
        # The library rounds to whole levels between rows and columns, too.
        assert np.abs(np.asarray(result, np.int32) - np.asarray(expected, np.int32)).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 45), (8, 200)])
def test_inception_boxes_are_distributed_as_those_of_the_host_pipeline(height, width):
    imagenet = pytest.importorskip("experiments.data.imagenet", reason="needs grain and tensorflow-datasets")
    total = 4000
    draw = jax.jit(jax.vmap(lambda key: random_box(key, height, width)))
    ours = np.asarray(draw(jax.random.split(jax.random.key(3), total)))
    rng = np.random.default_rng(3)
    left, upper, right, lower = np.array([imagenet.random_box(rng, width, height) for _ in range(total)]).T
    theirs = np.stack([upper, left, lower - upper, right - left], axis=1)
    for a, b in [*zip(ours.T, theirs.T, strict=True), (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])]:
        # Kolmogorov and Smirnov: the largest gap between the empirical distributions, at 10⁻⁴.
        points = np.unique(np.concatenate([a, b]))
        gap = np.abs(np.searchsorted(np.sort(a), points, "right") - np.searchsorted(np.sort(b), points, "right")).max()
        assert gap / total < 2.23 * np.sqrt(2 / total)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_inception_crop_keeps_constants_and_dtype(dtype):
    images = jnp.full((16, 20, 24, 3), 200, dtype)
    result = jax.jit(inception_crop, static_argnums=2)(jax.random.key(0), images, (8, 9))
    assert (result.shape, result.dtype) == ((16, 8, 9, 3), dtype)
    np.testing.assert_allclose(result.astype(jnp.float32), 200, rtol=1e-6)


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(jnp.asarray(images), mean, std), expected, atol=2e-6)
    half = normalize(jnp.asarray(images), mean, std, jnp.bfloat16)
    np.testing.assert_array_equal(half, normalize(jnp.asarray(images), mean, std).astype(jnp.bfloat16))
    with jax.enable_x64():
        np.testing.assert_allclose(normalize(jnp.asarray(images), mean, std, jnp.float64), expected, atol=1e-14)
    with pytest.raises(TypeError, match="uint8 images, got float32"):
        normalize(jnp.zeros((1, 2, 2, 3)), mean, std)


@pytest.mark.parametrize("name", ["none", "basic", "cutout", "autoaugment", "inception"])
def test_augment_is_jittable_and_seeded(name):
    images = jnp.asarray(np.stack([photograph(seed=seed) for seed in range(8)]))
    run = jax.jit(lambda key: augment(name, key, images, (0.5,) * 3, (0.25,) * 3))
    first = run(jax.random.key(0))
    assert (first.shape, first.dtype) == (images.shape, jnp.float32)
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert (first == run(jax.random.key(1))).all() == (name == "none")


def test_cutout_fills_with_the_mean():
    images = jnp.full((4, 32, 32, 3), 255, jnp.uint8)
    result = np.asarray(augment("cutout", jax.random.key(0), images, (0.5,) * 3, (0.25,) * 3))
    assert set(np.unique(result)) <= {-2.0, 0.0, 2.0}  # padding, mean, white
    assert (result == 0).any(axis=(1, 2, 3)).all()


def test_a_misspelt_augmentation_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'autoaugment'"):
        augment("auto_augment", jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ValueError, match="there are none, basic"):
        augment("mixup", jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8), (0.5,) * 3, (0.25,) * 3)


def test_contact_sheet_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the experiments need pip install crsam_jax[experiments]")
    from experiments.data.dataset import Dataset, Split
    from experiments.networks.augment.contact_sheet import draw_contact_sheet

    split = Split(np.stack([photograph(16, 16, seed=seed) for seed in range(12)]), np.zeros(12, np.int32))
    dataset = Dataset("small", split, split, 10, (0.5,) * 3, (0.25,) * 3)
    draw_contact_sheet(tmp_path / "sheet.png", dataset, names=("none", "basic"))
    assert Image.open(tmp_path / "sheet.png").size == (1200, 420)
