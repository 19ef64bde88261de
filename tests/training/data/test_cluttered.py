import numpy as np
import pytest
import torch

from sbp.training.data import cluttered
from sbp.training.data.cluttered import ClutteredDigits
from sbp.training.data.sources import Digits, build_datasets
from tests.training.configs import composed


def config(*overrides: str):
    few = ("data.train_images=600", "data.val_images=100")
    return composed("data=cluttered_digits", "recipe=demo", *few, *overrides)


def split(*overrides: str):
    """Training and validation set."""
    made = config(*overrides)
    return build_datasets(made.data, made.recipe)


def test_the_config_names_a_data_set_of_many_tokens_and_thousands_of_images():
    data = composed("data=cluttered_digits", "recipe=demo").data
    assert (data.train_images, data.val_images, data.image_size, data.num_classes) == (16384, 4096, 32, 10)


def test_an_image_depends_on_its_split_and_number_alone():
    train, val = split("seed=1")
    again, other = split("seed=2", "data.train_images=300", "data.val_images=101")
    assert np.array_equal(train.pixels[:300], again.pixels)
    assert np.array_equal(val.pixels, other.pixels[:100])
    assert len({image.tobytes() for image in (*train.pixels, *val.pixels)}) == 700


@pytest.mark.parametrize("size", [32, 48])
def test_every_class_is_there_as_often_and_images_have_the_size_of_the_config(size):
    train, val = split(f"data.image_size={size}", f"backbone.kwargs.img_size={size}")
    assert (len(train), len(val)) == (600, 100)
    assert np.bincount(train.labels).tolist() == [60] * 10 and np.bincount(val.labels).tolist() == [10] * 10
    image, label = val[13]
    assert image.dtype == torch.uint8 and image.shape == (3, size, size) and label == 3
    assert (image == torch.from_numpy(val.pixels[13])).all()  # grey, and as generated
    ink = (train.pixels > 128).mean((1, 2))
    assert ink.min() > 0.02 and ink.max() < 0.3  # a digit is in each, of which others are not a part
    assert (train.pixels > 64).any(0).mean() > 0.9  # anywhere


def test_train_and_validation_images_are_made_of_different_digits(monkeypatch):
    sources = {name: Digits(name, None) for name in ("train", "val")}
    seen = {digit.tobytes() for digit in sources["train"].pixels}
    assert not any(digit.tobytes() in seen for digit in sources["val"].pixels)
    given = []
    monkeypatch.setattr(cluttered, "_generate", lambda digits, *_: given.append(digits) or np.zeros((1, 32, 32)))
    split()
    assert [digits.tobytes() for digits in given] == [sources[name].pixels.tobytes() for name in ("train", "val")]


def test_the_label_is_that_of_the_one_whole_digit_which_no_piece_covers(monkeypatch):
    """With digits of class c all grey level 20 (c + 1), a whole one holds a square of 9 x 9 px, and no piece does."""
    monkeypatch.setattr(cluttered, "NOISE", 0.0)
    labels = [9, 3, *range(10), 0]
    digits = np.stack([np.full((8, 8), 20 * (label + 1), np.uint8) for label in labels])
    images = ClutteredDigits(digits, labels, 0, 200, 32, None)
    squares = np.lib.stride_tricks.sliding_window_view(images.pixels, (9, 9), (1, 2))
    for inside, label in zip(squares.reshape(200, -1, 81), images.labels, strict=True):
        even = inside[(inside == inside[:, :1]).all(1), 0]
        assert set(even.tolist()) - {0} == {20 * (label + 1)}


def test_a_linear_classifier_does_badly_on_pixels():
    train, val = split("data.train_images=2000", "data.val_images=500")
    x = np.c_[train.pixels.reshape(2000, -1) / 255, np.ones(2000)]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ np.eye(10)[train.labels])
    guesses = (np.c_[val.pixels.reshape(500, -1) / 255, np.ones(500)] @ weights).argmax(1)
    assert (guesses == val.labels).mean() < 0.25


def test_an_image_too_small_for_a_digit_is_rejected():
    with pytest.raises(ValueError, match=r"data\.image_size must be at least 16 for cluttered digits, got 8"):
        split("data.image_size=8")
