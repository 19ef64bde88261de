"""Limits that stand at a key's field, and the keys in words."""

import pytest

from sbp.training.config.describe import as_text
from sbp.training.config.keys import Key, check_limits, keys_of
from sbp.training.config.run import Config
from scripts.config_page import PAGE, page


@pytest.mark.parametrize(
    ("key", "allowed", "inside", "outside"),
    [
        (Key("", at_least=1), "at least 1", [1, 7], [0, -1]),
        (Key("", above=0), "above 0", [0.1], [0]),
        (Key("", at_most=2), "at most 2", [2, -5], [2.1]),
        (Key("", above=0, at_most=1), "in (0, 1]", [0.5, 1], [0, 1.1]),
        (Key("", at_least=0, below=1), "in [0, 1)", [0, 0.9], [1, -0.1]),
        (Key("", one_of=(False, "model", True)), "one of false, model, true", [True, "model"], [0, 1, "true"]),
        (Key("", length=3), "3 values", [[1, 2, 3]], [[1], []]),
        (Key(""), "", [None, "any"], []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_allowed(key, allowed, inside, outside):
    assert key.allowed == allowed
    assert all(key.admits(value) for value in inside) and not any(key.admits(value) for value in outside)


def test_an_error_names_key_limits_and_value():
    config = Config()
    config.backbone.name = "vit_tiny_patch16_224"
    check_limits(config)
    config.recipe.ema_decay = 1.0
    with pytest.raises(ValueError, match=r"^recipe\.ema_decay must be null or lie in \(0, 1\), got 1\.0$"):
        check_limits(config)


def test_each_key_has_a_meaning_and_stands_in_the_help():
    values: dict = {}
    for one in keys_of(Config):
        *groups, last = one.name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = one.default
    text = as_text(Config, values)
    assert all(one.key.meaning and f"  {one.name}=" in text for one in keys_of(Config))


def test_the_page_is_up_to_date():
    """Otherwise: python -m scripts.config_page"""
    assert page() == PAGE.read_text()
