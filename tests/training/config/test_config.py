"""Every shipped config composes and validates; what is wrong is said by name, before anything is built."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf.errors import OmegaConfBaseException

from sbp.training.config.batches import BatchPlan, evaluation_batch, plan_batches, scaled_lr
from sbp.training.config.keys import from_dict
from sbp.training.config.requests import EvalConfig, overridden
from sbp.training.config.rules import check_new_run, validate
from sbp.training.config.run import Config
from sbp.training.config.same_run import check_same_run
from sbp.training.tasks.choice import task_of
from scripts.reproduction.published import TABLE_1
from tests.training.configs import ROOT, composed, small

GROUPS = ("backbone", "sbp", "data", "recipe", "logger")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
EXPERIMENTS = sorted((ROOT / "configs" / "experiment" / "table1").glob("*.yaml"))
RECIPES = {  # nodes, batch, lr, drop path, as published
    "vit_tiny": (1, "8 GPUs x 256 images x 1 accumulated = 2048", 2e-3, 0.0),
    "vit_base": (4, "32 GPUs x 64 images x 2 accumulated = 4096", 4e-3, 0.3),
    "convnext_tiny": (1, "8 GPUs x 128 images x 4 accumulated = 4096", 4e-3, 0.1),
    "convnext_base": (4, "32 GPUs x 64 images x 2 accumulated = 4096", 4e-3, 0.3),
}
DETECTION = ("data=coco", "data=shapes", "recipe=detection", "recipe=detection_demo")


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_a_group_composes_and_validates(option):
    named = ["data.root=somewhere", "data.name=torch/cifar10"]
    if option in DETECTION:
        named += ["backbone=convnext_tiny", "task=detection", *(["data=coco"] if option == "recipe=detection" else [])]
    validate(composed(option, *named, *(["backbone.name=vit_small_patch16_224"] if option == "backbone=timm" else [])))


def test_any_timm_model_by_name():
    config = composed("backbone=timm", "backbone.name=vit_small_patch16_224")
    assert config.backbone.kwargs == {}  # nothing of another backbone is left over
    with pytest.raises(OmegaConfBaseException, match="name"):
        composed("backbone=timm")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_each_experiment_is_that_of_table_1(path):
    network, arm = path.stem.rsplit("_", 1)
    nodes, batch, lr, drop_path = RECIPES[network]
    _, _, *memory, top1, top1_sbp = TABLE_1[network]
    gpus, micro, accumulation, images = map(int, re.findall(r"\d+", batch))
    config = validate(composed(f"experiment=table1/{path.stem}", "data.root=somewhere"))
    recipe = config.recipe
    assert (config.sbp.enabled, config.sbp.keep_ratio, config.sbp.mask) == (arm == "sbp", 0.5, "grid")
    assert plan_batches(config.global_batch_size, config.micro_batch_size, gpus) == BatchPlan(
        images, micro, gpus, accumulation
    )
    assert scaled_lr(recipe, images) == lr and config.backbone.drop_path == drop_path
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.min_lr) == (300, 20, 0.05, 1e-6)
    assert (config.amp, recipe.mixup, recipe.cutmix, recipe.ema_decay) == ("float16", 0.8, 1.0, 0.9999)

    text = path.read_text()
    expected = f"top-1 {top1_sbp} % and {memory[1]}" if arm == "sbp" else f"top-1 {top1} % and {memory[0]}"
    assert batch in text and f"{expected} MB per GPU" in text
    assert arm == "baseline" or f"({memory[1] / memory[0]:.2f}x that without SBP)" in text
    launcher = f"torchrun --nnodes={nodes} --nproc_per_node=8" if nodes > 1 else "torchrun --nproc_per_node=8"
    assert launcher in text and f"experiment=table1/{path.stem} data.root=" in text


def test_there_are_eight_experiments():
    assert len(EXPERIMENTS) == 8


@pytest.mark.parametrize(
    "override", ["sbp.typo=1", "+sbp.typo=1", "+typo=1", "global_batch_size=many", "+sbp.mask.x=1"]
)
def test_an_unknown_key_or_a_value_of_the_wrong_type_is_rejected(override):
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException)):
        composed(override)


@pytest.mark.parametrize(
    "override",
    [
        "sbp.keep_ratio=0",
        "sbp.keep_ratio=1.5",
        "sbp.keep_ratio=half",
        "sbp.keep_ratio=[0.5,2]",
        "sbp.mask=stripes",
        "sbp.mask_per=image",
        "sbp.mhsa_drop=v", "sbp.eval=never", "amp=float8", "device=tpu", "data.source=web", "logger.name=mlflow",
        "recipe.epochs=0", "recipe.warmup_epochs=20", "recipe.lr=0", "recipe.label_smoothing=2", "data.mean=[0.5]",
        "global_batch_size=0", "micro_batch_size=0", "recipe.ema_decay=1", "data.num_classes=1", "seed=-1",
        "recipe.label_smoothing=1", "backbone.drop_path=1", "backbone.drop_path=-0.1", "recipe.optimizer=adamm",
        "recipe.optimizer=adahessian", "recipe.optimizer=lookahead_adahessian", "+backbone.kwargs.proj_drop_rate=1",
        "recipe.scheduler=step", "data.interpolation=cubic", "data.train_image_size=0",
        "sbp.exact_epochs=-1", "sbp.exact_epochs=21", "recipe.crop_padding=-1", "data.cache=true",
        "data.crop_pct=87.5", "recipe.crop_scale=8", "data.std=[0,1,1]", "data.mean=[123.7,116.3,103.5]",
        "recipe.lr=inf", "recipe.decay_rate=nan", "recipe.weight_decay=-1",
        "recipe.color_jitter=-0.4", "+backbone.kwargs.in_chans=1",
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_rejected_by_name(override):
    with pytest.raises(ValueError, match=override.lstrip("+").split("=")[0].replace(".", r"\.")):
        validate(composed("data=digits", "recipe=demo", override))


def test_what_only_attention_has_is_refused_for_a_convnext():
    for name in ("head", "query", "qkv_exact"):
        config = validate(small(f"sbp.mhsa_drop={name}", backbone="convnext"))
        with pytest.raises(ValueError, match=rf"sbp\.mhsa_drop={name} is of attention, which a ConvNeXt has not"):
            task_of(config).build_model(config)
        config.sbp.enabled = False
        task_of(config).build_model(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sbp.keep_ratio_end=0",), r"sbp\.keep_ratio_end must be a number in \(0, 1\], got 0"),
        (("sbp.keep_ratio_end=[0.5,2]",), r"sbp\.keep_ratio_end must be a number in \(0, 1\], got 2"),
        (("sbp.keep_ratio_end=half",), r"sbp\.keep_ratio_end must be a number in \(0, 1\], got 'half'"),
        (("sbp=none", "sbp.keep_ratio_end=0.5"), r"sbp\.keep_ratio_end=0.5 needs sbp\.enabled=true"),
        (
            ("sbp.keep_ratio=[0.5,0.5]", "sbp.keep_ratio_end=[0.5]"),
            r"sbp\.keep_ratio_end must be one number, or 2 as sbp\.keep_ratio, got a list of 1",
        ),
        (("sbp.keep_ratio_end=0.5", "recipe.epochs=1"), r"needs at least 2 epochs with SBP .*, got 1"),
        (("sbp.keep_ratio_end=0.5", "sbp.exact_epochs=2"), r"needs at least 2 epochs with SBP .*, got 1"),
        (("sbp.keep_ratio_end=0.5", "sbp.eval=published"), r"sbp\.keep_ratio_end=0.5 needs sbp\.eval=exact"),
    ],
)
def test_a_keep_ratio_that_cannot_change_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(small("recipe.epochs=3", *overrides))


def test_exact_epochs_need_sbp_in_the_others():
    assert validate(small("sbp.exact_epochs=1")).sbp.exact_epochs == 1
    with pytest.raises(ValueError, match=r"sbp\.exact_epochs=1 needs sbp\.enabled=true"):
        validate(small("sbp=none", "sbp.exact_epochs=1"))
    assert validate(small("sbp.exact_epochs=1", "sbp.exact_recompute=block")).sbp.exact_recompute == "block"
    with pytest.raises(
        ValueError, match=r"sbp\.exact_recompute=cheap is of exact epochs and needs sbp\.exact_epochs in"
    ):
        validate(small("sbp.exact_recompute=cheap"))
    with pytest.raises(ValueError, match=r"sbp\.exact_recompute must be one of none, cheap, block, got 'all'"):
        validate(small("sbp.exact_epochs=1", "sbp.exact_recompute=all"))


def test_keys_that_would_do_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"sbp\.recompute=cheap needs .*; exact gradients with it are sbp\.keep_ratio=1"
    ):
        check_new_run(small("sbp=none", "sbp.recompute=cheap"))
    with pytest.raises(ValueError, match=r"data\.train_images=100 is for generated images \(.*\), not digits"):
        check_new_run(small("data.train_images=100"))
    check_new_run(small("sbp.recompute=cheap", "sbp.keep_ratio=1"))
    validate(small("sbp=none", "sbp.recompute=cheap"))  # of a run that goes on, or is evaluated


def test_an_evaluation_takes_no_global_batch_at_once():
    assert evaluation_batch(Config(global_batch_size=4096)) == 256
    assert evaluation_batch(Config(global_batch_size=4096), 512) == 512
    assert evaluation_batch(Config(global_batch_size=4096, micro_batch_size=64)) == 64
    assert evaluation_batch(Config(global_batch_size=4096, eval_batch_size=1000), 64) == 1000


@pytest.mark.parametrize("option", ["data=imagenet", "data=timm"])
def test_data_that_lies_nowhere_is_rejected(option):
    with pytest.raises(ValueError, match=r"data\.(root|name) is needed"):
        validate(composed(option))


def test_accumulation_is_derived_and_must_be_whole():
    assert plan_batches(4096, 64, 32).accumulation == 2
    assert plan_batches(64, None, 2).micro_batch_size == 32
    with pytest.raises(ValueError, match="global_batch_size=100 cannot be reached"):
        plan_batches(100, 32, 2)
    with pytest.raises(ValueError, match="over 3 processes"):
        plan_batches(100, None, 3)


def test_a_config_survives_json_and_names_what_it_does_not_know():
    config = composed("data=digits", "recipe=demo", "backbone=convnext_demo", "sbp.keep_ratio=[0.5,1]")
    assert from_dict(Config, json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match=r"unknown config key: sbp\.typo"):
        from_dict(Config, {"sbp": {"typo": 1}})


def test_resuming_another_run_is_refused_but_moving_the_data_is_not():
    config = small()
    check_same_run(asdict(small("data.root=elsewhere", "data.workers=2", "logger=wandb")), config)
    older = asdict(config)
    del older["sbp"]["mask_per"], older["sbp"]["rescale"]  # which it did not know
    check_same_run(older, config)
    with pytest.raises(ValueError, match=r"sbp\.mask_per was batch and is now half; sbp\.rescale was False and is"):
        check_same_run(older, small("sbp.mask_per=half", "sbp.rescale=true"))
    with pytest.raises(ValueError, match=r"recipe\.epochs was 2 and is now 1"):
        check_same_run(asdict(small("recipe.epochs=2")), config)


def test_a_checkpoint_from_before_a_key_was_there_has_its_default():
    stored = asdict(small())
    for group, key in (("sbp", "exact_epochs"), ("sbp", "fixed_mask"), ("data", "train_image_size")):
        del stored[group][key]
    check_same_run(stored, small())
    with pytest.raises(ValueError, match=r"sbp\.fixed_mask was False and is now True"):
        check_same_run(stored, small("sbp.fixed_mask=true"))


def test_an_evaluation_changes_what_it_names_and_nothing_else():
    config = small("amp=bfloat16")
    assert overridden(config, EvalConfig(checkpoint="x")) == config
    request = composed("checkpoint=x", "data.image_size=64", "sbp.eval=published", name="eval", kind=EvalConfig)
    changed = overridden(config, request)
    assert changed.data.image_size == changed.backbone.kwargs["img_size"] == 64
    assert changed.sbp.eval == "published" and changed.amp == "bfloat16"


def test_an_evaluation_is_not_asked_for_what_only_training_needs():
    detects = ("task=detection", "data=coco", "data.root=x", "backbone=convnext_tiny", "recipe=detection")
    run = composed(*detects, "objective=[box_ap,peak_allocated]", "device=cuda")
    request = composed("checkpoint=x", "data.image_size=480", "data.max_size=600", name="eval", kind=EvalConfig)
    request.device = "cpu"
    with pytest.raises(ValueError, match=r"peak_allocated is of CUDA's memory"):
        validate(replace(run, device="cpu"))
    validate(overridden(run, request))


def test_no_config_names_a_place_on_a_machine():
    for path in Path(ROOT / "configs").rglob("*.yaml"):
        assert "/home" not in path.read_text() and "/work" not in path.read_text()


def test_presets_of_sbp():
    """The default is the published setting; recommended differs in what attention drops, where there is attention."""
    published = composed("data=digits", "sbp=published").sbp
    assert published == composed("data=digits").sbp == composed("data=digits", "sbp=default").sbp
    for backbone, mhsa_drop in {"vit_base": "query", "swin_tiny": "query", "convnext_tiny": "qkv"}.items():
        recommended = composed("data=digits", "sbp=recommended", f"backbone={backbone}").sbp
        assert recommended == replace(published, mhsa_drop=mhsa_drop)
    detector = composed("task=detection", "sbp=recommended", "sbp.recompute=cheap").sbp
    assert detector == replace(published, recompute="cheap")
