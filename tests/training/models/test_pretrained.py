"""Training starts from the weights of a file or of timm: all of them, or an error."""

import logging
import re
import shutil
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from sbp.training.config.images import DataConfig
from sbp.training.config.model import BackboneConfig
from sbp.training.config.requests import EvalConfig
from sbp.training.engine import setup
from sbp.training.engine.evaluate import evaluate_checkpoint
from sbp.training.engine.export import export
from sbp.training.engine.train import train
from sbp.training.models import pretrained
from sbp.training.models.build import create
from sbp.training.models.pretrained import preprocessing_differences, starting_weights, timm_name
from sbp.training.record.checkpoint import find
from sbp.training.runtime.distributed import pick_device
from tests.conftest import one_of
from tests.training.comparing import assert_equal
from tests.training.configs import BACKBONES, composed, small

CPU = pick_device("cpu")
CLASSIFIER = {"vit": "head.", "convnext": "head.fc."}


def trained(config, num_classes=10, **kwargs):
    """Random weights, of which none is zero or one, as of a network that was trained."""
    torch.manual_seed(1)
    backbone = replace(config.backbone, kwargs=config.backbone.kwargs | kwargs)
    return {name: value + torch.randn_like(value) for name, value in create(backbone, num_classes).state_dict().items()}


def start(config, path=None):
    """The model and the averaged model of a run's beginning, as state dicts."""
    config.backbone.pretrained = None if path is None else str(path)
    order = setup.load_images(config, CPU).order
    trainer = setup.build_trainer(config, order, CPU, starting_weights(config.backbone, config.data))
    return trainer.model.state_dict(), trainer.ema.module.state_dict()


def authors_convnext(state):
    """timm's names turned into those of ConvNeXt's authors."""
    old = {}
    for name, value in state.items():
        name = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        old[name.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    return {"model": old}


@pytest.mark.parametrize(
    ("kind", "backbone", "num_classes"),
    one_of(2, ["timm", "ema", "prefixes", "safetensors", "authors"], BACKBONES, [10, 7]),
)
def test_every_weight_comes_from_the_file_and_so_does_the_average(tmp_path, caplog, backbone, kind, num_classes):
    caplog.set_level(logging.INFO)
    config = small("recipe.ema_decay=0.9", backbone=backbone)
    random, _ = start(config)
    state = trained(config, num_classes)
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        content = {
            "timm": state,
            "ema": {"state_dict": {name: -value for name, value in state.items()}, "state_dict_ema": state},
            "prefixes": {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
            "authors": authors_convnext(state) if backbone == "convnext" else {"model": state},
        }
        torch.save(content[kind], path)
    model, average = start(config, path)
    for name, value in model.items():
        new = num_classes != 10 and name.startswith(CLASSIFIER[backbone])
        assert torch.equal(value, random[name] if new else state[name]), name
    assert_equal(dict(average), dict(model))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("weights ")]
    assert len(said) == 1
    assert ("with its classifier of 10 classes" if num_classes == 10 else "that of 7 is left out") in said[0]


@pytest.mark.parametrize(
    ("name", "nest", "rename"),
    [
        ("hiera_tiny_224", "model_state", lambda key: key.replace("head.fc.", "head.projection.")),
        ("eva02_tiny_patch14_224", "module", lambda key: key),
    ],
)
def test_files_of_authors_have_the_weights_within(tmp_path, name, nest, rename):
    small_ones = {"hiera_tiny_224": {"embed_dim": 8, "num_heads": 1, "stages": [1, 1, 1, 1]}}
    backbone = BackboneConfig(name, kwargs=small_ones.get(name, {"embed_dim": 24, "num_heads": 2, "depth": 1}))
    state = create(backbone, 10).state_dict()
    path = tmp_path / "x.pth"
    torch.save({nest: {rename(key): value for key, value in state.items()}}, path)
    found = pretrained.starting_weights(replace(backbone, pretrained=str(path)), DataConfig(num_classes=10))
    assert_equal(dict(found), dict(state))


def test_a_vit_starts_at_another_image_size_with_timms_interpolation(tmp_path):
    config = small("data.image_size=48", "recipe.ema_decay=0.9")
    state = trained(config, img_size=32)
    torch.save(state, tmp_path / "x.pth")
    model, _ = start(config, tmp_path / "x.pth")
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], num_prefix_tokens=0)
    assert_equal(dict(model), state | {"pos_embed": expected})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_does_not_fit_is_named_with_the_file(tmp_path, backbone):
    config = small(backbone=backbone)
    path = tmp_path / "x.pth"
    state = trained(config)
    first = next(iter(state))
    cases = {
        f'Missing key(s) in state_dict: "{first}"': {name: value for name, value in state.items() if name != first},
        'Unexpected key(s) in state_dict: "gate"': state | {"gate": torch.ones(1)},
        "size mismatch for": trained(small(backbone=backbone), **({"depth": 2, "embed_dim": 96}
            if backbone == "vit" else {"dims": [8, 8, 16, 32]})),
    }  # fmt: skip
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            start(config, path)
        text = str(caught.value)
        assert f"backbone.pretrained={path} cannot be loaded into {config.backbone.name}" in text
        assert "\n" not in text and len(text) < 1200
    lacking = {name: value for name, value in state.items() if name != first}
    with pytest.raises(ValueError, match=rf"missing {re.escape(first)}"):
        pretrained.load_starting_weights(create(config.backbone, 10), lacking)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    config = small()
    path = tmp_path / "x.pth"
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match=rf"backbone\.pretrained={path} cannot be read"):
        start(config, path)
    torch.save(trained(config), path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # within a weight: torch.load would take it
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read: wrong checksum of"):
        start(config, path)
    numpy = tmp_path / "x.npz"
    numpy.touch()
    with pytest.raises(ValueError, match=rf"backbone\.pretrained={numpy} is a NumPy file, which is not read here"):
        start(config, numpy)
    for missing in (tmp_path / "y.pth", tmp_path, "y.pth"):
        with pytest.raises(ValueError, match=rf"backbone\.pretrained={missing} is no file"):
            start(config, missing)


@pytest.mark.parametrize("value", ["timm", "vit_tiny_patch16_224", "augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"])
def test_names_of_timm_by_tag_and_in_full(value):
    config = composed("backbone=vit_tiny", f"backbone.pretrained={value}")
    default = "augreg_in21k_ft_in1k"
    tag = "augreg_in21k" if value.endswith("in21k") else default
    assert timm_name(config.backbone) == f"vit_tiny_patch16_224.{tag}"
    config.backbone.name += ".augreg_in21k"  # a tag of its own is what "timm" means then
    assert timm_name(config.backbone) == "vit_tiny_patch16_224.augreg_in21k"


def test_an_unknown_name_is_refused_with_those_that_there_are():
    config = composed("backbone=vit_tiny", "backbone.pretrained=fb_in1k")
    with pytest.raises(ValueError, match=r"fb_in1k is neither a file nor .*: timm, augreg_in21k, augreg_in21k_ft_in1k"):
        starting_weights(config.backbone, config.data)
    config.backbone.name = "vit_teeny"
    with pytest.raises(ValueError, match=r"backbone\.name=vit_teeny is no timm model"):
        starting_weights(config.backbone, config.data)


@pytest.mark.parametrize(("tag", "classes"), [("timm", 1000), ("augreg_in21k", 21843)])
def test_what_timm_downloads_is_loaded_and_its_preprocessing_compared(monkeypatch, caplog, tag, classes):
    caplog.set_level(logging.INFO)
    config = composed("backbone=vit_tiny", "data=imagenet", "data.root=somewhere", f"backbone.pretrained={tag}")
    state, asked = trained(config, classes), []

    def downloaded(name, **_):
        asked.append(name)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", downloaded)
    weights = starting_weights(config.backbone, config.data)
    assert asked == [f"timm/{timm_name(config.backbone)}"]
    assert weights.keys() == {name for name in state if classes == 1000 or not name.startswith("head.")}
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert "data.mean=[0.5,0.5,0.5], and this run has [0.485, 0.456, 0.406]" in caplog.text
    assert "data.std=[0.5,0.5,0.5]" in caplog.text and "data.interpolation" not in caplog.text


def test_a_download_that_fails_is_one_error_before_the_images_are_read(monkeypatch, tmp_path):
    def refused(*_, **__):
        raise ConnectionError("[Errno 111] Connection refused\nmore")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refused)
    config = composed("backbone=convnext_tiny", "data=imagenet", "data.root=nowhere", "backbone.pretrained=timm")
    with pytest.raises(ValueError, match=r"backbone\.pretrained=timm cannot be loaded into .*: \[Errno 111\]"):
        train(config, tmp_path)


def test_a_run_that_goes_on_needs_the_file_no_more_and_neither_do_eval_and_export(tmp_path):
    """One that starts does, and another value of the key is another run."""
    file = tmp_path / "x.pth"
    torch.save(trained(small()), file)
    few = ("probe.every_steps=null", "global_batch_size=479", "recipe.lr=1e-9", "recipe.min_lr=0")
    config = small(*few, f"backbone.pretrained={file}")
    train(config, tmp_path / "one")
    weights = find(tmp_path / "one")[1]["state_dict"]
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in trained(config).items())

    file.unlink()
    (tmp_path / "one" / "summary.json").unlink()
    train(config, tmp_path / "one")
    evaluate_checkpoint(EvalConfig(checkpoint=str(tmp_path / "one")), tmp_path)
    export(tmp_path / "one", tmp_path / "exported")
    with pytest.raises(ValueError, match=r"backbone\.pretrained was .*x\.pth and is now None"):
        train(small(*few), tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(ValueError, match=r"x\.pth is no file"):
        train(config, tmp_path / "one")


def test_the_preprocessing_of_a_file_is_that_of_its_run_or_of_timms_config_beside_it(tmp_path, caplog):
    config = small("data.mean=[0.1,0.5,0.5]", "data.interpolation=bilinear")
    torch.save({"state_dict": trained(config), "config": asdict(config)}, tmp_path / "x.pt")
    here = small("recipe.ema_decay=0.9")
    start(here, tmp_path / "x.pt")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split("trained with ")[1] for line in told] == [
        "data.mean=[0.1,0.5,0.5], and this run has [0.5, 0.5, 0.5]",
        "data.interpolation=bilinear, and this run has bicubic",
    ]
    model = create(config.backbone, 10)
    timm.models.save_for_hf(model, str(tmp_path), model_config={"pretrained_cfg": {"std": (0.1, 0.2, 0.3)}})
    found = pretrained._preprocessing_beside(tmp_path / "model.safetensors")
    assert preprocessing_differences(found, here.data) == ["data.std=[0.1,0.2,0.3], and this run has [0.5, 0.5, 0.5]"]


def test_a_network_without_drop_path_is_made_as_it_is():
    assert create(BackboneConfig("dla46_c"), 3).num_classes == 3
    with pytest.raises(ValueError, match=r"timm cannot make dla46_c with .*drop_path_rate"):
        create(BackboneConfig("dla46_c", drop_path=0.1), 3)
