import json
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torchvision.ops import roi_align

import sbp
from sbp.cli.forecast import ForecastConfig, report
from sbp.training.config.model import DETECTORS
from sbp.training.config.run import Config
from sbp.training.engine.train import train
from sbp.training.engine.trainer import Trainer
from sbp.training.memory import advice as advice_module
from sbp.training.memory import allocations, detection
from sbp.training.memory.advice import advice
from sbp.training.memory.allocations import PARTS, CudaCasts
from sbp.training.memory.forecast import RECOMPUTE, forecast, forecast_phases, largest_micro_batch, with_sbp
from sbp.training.memory.paper import PAPER
from sbp.training.models.build import build_model
from sbp.training.plan.arms import BenchmarkRules
from sbp.training.tasks.detection import synthetic
from sbp.training.tasks.detection.heads import MaskRoIHeads
from scripts.reproduction.published import TABLE_1
from tests.conftest import one_of, others_long
from tests.training.configs import BACKBONES, composed, small

MIB = 2**20


def parameters(config) -> int:
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("override", "backbone"),
    one_of(2, ["sbp=none", "sbp=default", "sbp.mask=random", "sbp.mask_per=sample"], ["convnext", "vit"]),
)
def test_it_saves_what_a_real_step_saves(backbone, override):
    config = small(override, "sbp.rescale=true", backbone=backbone)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).train()
    images, labels = torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
    real = sbp.saved_bytes(lambda: F.cross_entropy(model(images), labels, label_smoothing=0.1))
    assert forecast(config, 64).saved == pytest.approx(real, rel=0.005)


@pytest.mark.long
def test_the_step_is_that_of_the_training_size_and_of_the_exact_epochs():
    whole, smaller = small(), small("data.train_image_size=16", "+backbone.kwargs.dynamic_img_size=true")
    assert forecast(smaller, 64).saved == forecast(small("data.image_size=16"), 64).saved < forecast(whole, 64).saved
    exact = forecast(small("sbp.exact_epochs=1"), 64).saved
    assert forecast(whole, 64).saved < exact == pytest.approx(forecast(small("sbp=none"), 64).saved, rel=1e-3)


def test_the_peak_of_a_run_is_that_of_the_phase_that_needs_most():
    config = small("recipe.epochs=3", "sbp.exact_epochs=1", "sbp.exact_recompute=block")
    found = forecast_phases(config, 64)
    assert list(found) == ["SBP", "exact epochs"] and found["exact epochs"].peak < found["SBP"].peak
    assert forecast(config, 64) == found["SBP"]


@pytest.mark.long
def test_advice_names_the_recomputation_of_exact_epochs():
    config = small("recipe.epochs=2", "sbp.exact_epochs=1", "global_batch_size=64")
    found = forecast_phases(config, 64)
    assert found["exact epochs"].peak > found["SBP"].peak
    assert "sbp.exact_recompute=block" in advice(config, 64, found["SBP"].peak)
    assert "sbp.exact_recompute" not in advice(small("global_batch_size=64"), 64, found["SBP"].peak)


@pytest.mark.parametrize("amp", others_long(["off", "bfloat16", "float16"], "bfloat16"))
def test_the_parts_are_those_of_adamw_and_add_up(amp):
    config = small(f"amp={amp}", "global_batch_size=64", "recipe.ema_decay=0.99")
    size, one = parameters(config), forecast(config, 32)
    assert one.peak == sum(getattr(one, part) for part in PARTS)
    assert one.weights == pytest.approx(4 * size, rel=0.2)  # CUDA rounds every tensor up to 512 bytes
    assert one.gradients == pytest.approx(one.weights, rel=0.02)
    assert one.optimizer == pytest.approx(3 * one.weights, rel=0.02)  # two moments and the moving average
    assert 0 < one.activations <= one.saved


def test_gradients_are_alive_in_the_forward_pass_only_when_steps_accumulate_or_ddp_holds_them():
    config = small("global_batch_size=64")
    whole, accumulated = forecast(config, 64), forecast(replace(config, global_batch_size=128), 64)
    assert whole.gradients < accumulated.gradients == forecast(config, 64, world_size=2).gradients
    assert accumulated.activations == pytest.approx(whole.activations, rel=0.01)


def test_cuda_casts_norms_to_float32_and_not_gelu():
    config = small("sbp=none", "amp=bfloat16")
    depth, channels, tokens, images = 2, 48, 16, 64
    per_token = depth * (36 * channels + 4 * 3 + 4 * 4)  # logsumexp of 3 heads, mean and rstd of two norms
    saved = forecast(config, images).saved - forecast(config, images // 2).saved
    patches = 2 * 3 * 8 * 8
    assert saved == pytest.approx(images // 2 * tokens * (per_token + patches), rel=0.01)  # the head is left out


USED = {  # of images or maps (2, 8, 8, 8), what networks and losses do with them
    "convolution": lambda x: F.conv2d(x, x),
    "transposed convolution": lambda x: F.conv_transpose2d(x, x.new_ones(8, 4, 2, 2)),
    "linear": lambda x: F.linear(x, x[0, 0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "batch norm": lambda x: F.batch_norm(x, *torch.ones(2, 8, dtype=torch.float32), training=True),
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(),
    "power": lambda x: x**2,
    "pooling": lambda x: F.max_pool2d(x, 1, 2),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "regions": lambda x: roi_align(x, torch.ones(3, 5), 7),
    "cross entropy": lambda x: F.cross_entropy(x[0, 0], torch.zeros(8, dtype=torch.int64)),
    "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(x, x),
    "smooth L1": lambda x: F.smooth_l1_loss(x, x),
}


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_are_those_of_cudas_own_autocast(used, dtype):
    """Which needs no GPU to say on fake CUDA tensors what it casts."""
    with allocations.fake_cuda(CudaCasts()), torch.autocast("cpu", dtype):
        ours = USED[used](torch.empty(2, 8, 8, 8, dtype=dtype))
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` would leave it off where there is no GPU
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            assert USED[used](torch.empty(2, 8, 8, 8, dtype=dtype)).dtype == ours.dtype
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@pytest.mark.parametrize("backbone", others_long(BACKBONES, "vit"))
def test_less_is_kept_with_a_lower_ratio(backbone):
    config = small(backbone=backbone)
    peaks = [forecast(with_sbp(config, keep_ratio=ratio), 64).peak for ratio in (1.0, 0.5, 0.25)]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.long
def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config = small("global_batch_size=4096")
    gib = 0.05
    n = largest_micro_batch(config, gib)
    assert forecast(config, n).peak <= gib * 2**30 < forecast(config, n + 1).peak
    assert largest_micro_batch(config, 1e-6) == 0
    assert largest_micro_batch(small("recipe.mixup=0.8"), gib) % 2 == 0


@pytest.mark.parametrize("backbone", others_long(BACKBONES, "vit"))
def test_the_peak_is_that_of_an_independent_count(backbone):
    config = small("sbp=none", "recipe.label_smoothing=0", "global_batch_size=256", backbone=backbone)
    model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size).train()
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss = F.cross_entropy(model(torch.randn(256, 3, 32, 32)), torch.zeros(256, dtype=torch.int64))
        loss.backward()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    ours = forecast(config, 256)
    assert ours.peak - ours.optimizer == pytest.approx(counted, abs=0.1 * MIB)


@pytest.mark.long
def test_advice_names_settings_that_fit():
    config = small("sbp.keep_ratio=1.0", "global_batch_size=64")
    needed = forecast(config, 64).peak
    text = advice(config, 64, int(0.9 * needed))
    assert "sbp.keep_ratio=0.25" in text and "micro_batch_size=32" in text and "sbp.keep_ratio=1.0" not in text
    assert "no single change" in advice(config, 64, 1000) and "eval_batch_size" not in text
    assert "the step should have fitted" in advice(config, 64, needed)
    plain = advice(small("sbp=none", "global_batch_size=64"), 64, int(0.9 * needed))
    assert "sbp.enabled=true sbp.keep_ratio=0.25" in plain


@pytest.mark.parametrize(
    ("network", "arm"),
    [
        pytest.param("vit_tiny", "sbp", marks=pytest.mark.long),
        pytest.param("vit_tiny", "baseline", marks=pytest.mark.slow),
        pytest.param("vit_base", "baseline", marks=pytest.mark.slow),
        pytest.param("vit_base", "sbp", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", "sbp", marks=pytest.mark.slow),
        pytest.param("convnext_base", "sbp", marks=pytest.mark.slow),
    ],
)
def test_the_rules_of_the_paper_give_its_figures(network, arm):
    """The two ConvNeXt baselines come out 7 to 8 % low, for reasons that are not known."""
    config = composed(f"experiment=table1/{network}_{arm}")
    _, _, plain, sbp, *_ = TABLE_1[network]  # MiB
    peak = forecast(config, config.micro_batch_size, rules=PAPER).peak
    assert peak / MIB == pytest.approx(sbp if arm == "sbp" else plain, rel=0.02)


@pytest.mark.parametrize("key", ["mhsa_drop=head", "layers=all", "keep_ratio=[0.5,0.5]", "mask_per=half"])
def test_the_rules_of_the_paper_know_its_layers_only(key):
    with pytest.raises(ValueError, match=key.split("=")[0]):
        forecast(composed("experiment=table1/vit_tiny_sbp", f"sbp.{key}"), 2, rules=PAPER)


@pytest.mark.long
def test_the_command_reports_what_the_functions_return(tmp_path):
    config = composed(*BACKBONES["vit"], "data=digits", "memory_gib=0.05", name="forecast", kind=ForecastConfig)
    assert config.data.image_size == 32  # the schema's defaults have not come back
    report(config, tmp_path)
    result = json.loads((tmp_path / "forecast.json").read_text())
    run = Config(**{field.name: getattr(config, field.name) for field in fields(Config)})
    assert result["peak"] == forecast(run, 256).peak
    assert forecast(run, result["largest_micro_batch_size"]).peak <= 0.05 * 2**30
    assert list(result["peak_by_recompute_and_keep_ratio"]) == list(RECOMPUTE)


@pytest.mark.parametrize("wrong", ["rules=1998", "world_size=0", "memory_gib=0"])
def test_the_command_names_a_wrong_key(wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong.split("=")[0]):
        report(composed(*BACKBONES["vit"], "data=digits", wrong, name="forecast", kind=ForecastConfig), tmp_path)


@pytest.mark.long
def test_processes_and_how_they_share_the_network_are_heeded(tmp_path, caplog):
    caplog.set_level("INFO")
    peaks = []
    for given in (("processes=4",), ("world_size=4",), ("world_size=4", "processes=4", "parallel=fsdp"), ()):
        overrides = (*BACKBONES["vit"], "data=digits", "global_batch_size=32", "memory_gib=0.02", *given)
        report(composed(*overrides, name="forecast", kind=ForecastConfig), tmp_path)
        peaks.append(json.loads((tmp_path / "forecast.json").read_text())["peak"])
    assert peaks[0] == peaks[1] == peaks[2] < peaks[3]
    assert caplog.text.count("fsdp needs less than this") == 1


@pytest.mark.parametrize("how", [("data=imagenet", "data.cache=true"), ("data=webdataset", "data.shuffle=shards")])
def test_how_images_are_read_makes_no_difference(how):
    config = composed(*BACKBONES["vit"], *how, "data.root=anywhere", "data.image_size=32", "data.num_classes=10")
    assert forecast(config, 4).peak == forecast(composed(*BACKBONES["vit"], "data=digits", "threads=null"), 4).peak


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(
            (
                "backbone=timm",
                "backbone.name=resnet18",
                "recipe=demo",
                "data=digits",
                "+backbone.kwargs.layers=[1,1,1,1]",
            ),
            id="no SBP form",
            marks=pytest.mark.long,
        ),
        pytest.param((*BACKBONES["vit"], "data=digits", "backbone.frozen=true"), id="frozen"),
    ],
)
def test_of_what_cannot_be_sbp_there_is_a_forecast_of_plain_training(network, tmp_path):
    overrides = (*network, "sbp=none", "global_batch_size=16", "memory_gib=1")
    report(composed(*overrides, name="forecast", kind=ForecastConfig), tmp_path)
    result = json.loads((tmp_path / "forecast.json").read_text())
    assert result["peak_by_recompute_and_keep_ratio"] == {"none": {"1.0": result["peak"]}}
    text = advice(composed(*overrides[:-1]), 16, result["peak"] - 1)
    assert "forecast: " in text and "sbp." not in text


@pytest.mark.parametrize(
    ("overrides", "micro", "message"),
    [
        ([], 0, "micro_batch_size"),
        (["recipe.mixup=0.8"], 3, "micro_batch_size must be even"),
        (["recipe.optimizer=nothing"], 4, "recipe.optimizer=nothing"),
        (["sbp.keep_ratio=2"], 4, "sbp.keep_ratio"),
        (["backbone.name=nothing"], 4, "backbone.name=nothing"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(overrides, micro, message):
    with pytest.raises(ValueError, match=message):
        forecast(small(*overrides), micro)


def test_no_memory_is_no_size():
    with pytest.raises(ValueError, match="memory_gib must be above 0"):
        largest_micro_batch(small(), 0)


def test_a_run_out_of_memory_ends_with_advice(monkeypatch, tmp_path):
    config = small("global_batch_size=16")
    needed = forecast(config, 16).peak

    def backward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "backward", backward)
    monkeypatch.setattr(advice_module, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"out of memory with micro_batch_size=16(.|\n)*sbp.recompute=cheap ") as error:
        train(config, tmp_path)
    assert "micro_batch_size=8" in str(error.value) and "sbp.keep_ratio=0.25" in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("override", ["sbp=none", "sbp=default", "sbp.recompute=cheap"])
def test_it_saves_what_a_real_step_of_a_detector_saves(name, override):
    """With as many objects as the forecast assumes, and sampled regions that a real detector may have."""
    config = composed(
        "task=detection", f"detector.name={name}", override, "backbone.drop_path=0", "recipe.augment=false",
        "data.image_size=128", "data.max_size=192", "global_batch_size=2", "backbone.kwargs.dims=[16,32,64,64]",
    )  # fmt: skip
    torch.manual_seed(0)
    model = detection.build(config).train()
    synthetic.propose_objects(model)
    images, targets = synthetic.random(128, 192, 2, num_classes=3)
    assert images.shape == detection.batch(config, 2)[0].shape == (2, 3, 128, 192)
    real = sbp.saved_bytes(lambda: detection.loss(model, images, targets))
    assert forecast(config, 2).saved == pytest.approx(real, rel=0.005)


@pytest.mark.long
@pytest.mark.parametrize("name", DETECTORS)
def test_the_peak_of_a_detector_is_that_of_an_independent_count(name):
    """Of a real step, in which anchors are matched and proposals chosen, which a forecast leaves out."""
    config = composed(
        "task=detection", f"detector.name={name}", "sbp=none", "backbone.drop_path=0", "recipe.augment=false",
        "data.image_size=128", "data.max_size=192", "global_batch_size=2", "backbone.kwargs.dims=[16,32,64,64]",
    )  # fmt: skip
    torch.manual_seed(0)
    model = detection.build(config).train()
    synthetic.propose_objects(model)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        images, targets = synthetic.random(128, 192, 2, num_classes=3)
        detection.loss(model, images, targets).backward()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    ours = forecast(config, 2, rules=BenchmarkRules())  # whose images stay
    assert ours.peak - ours.optimizer == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("name", others_long(DETECTORS, "mask_rcnn"))
def test_a_benchmarked_detector_samples_as_many_regions_with_objects_as_forecast(name, monkeypatch):
    drawn = []

    def subsample(self, labels):
        samples = original(self, labels)
        drawn.extend((len(one), int((label[one] > 0).sum())) for label, one in zip(labels, samples, strict=True))
        return samples

    original = MaskRoIHeads.subsample
    monkeypatch.setattr(MaskRoIHeads, "subsample", subsample)
    config = composed("task=detection", f"detector.name={name}", "detector.rois_per_image=512")
    torch.manual_seed(0)
    model = detection.build(config).train()
    synthetic.propose_objects(model)
    model(*synthetic.random(128, 192, 2, num_classes=3))
    assert len(drawn) == (2 if name == "mask_rcnn" else 6)
    assert all(regions == 512 and 124 <= objects <= 128 for regions, objects in drawn)


@pytest.mark.slow
def test_the_published_detectors_fit_where_the_plain_ones_do_not():
    """The forecasts that RESULTS.md shows, and the shares of the plain detector's memory that were asked for."""
    for name, shares in (("mask_rcnn_convnext_tiny", (0.80, 0.62)), ("cascade_mask_rcnn_convnext_base", (0.80, 0.66))):
        given = ("data.root=/coco", "amp=bfloat16", "global_batch_size=2")
        plain = forecast(composed(f"experiment=table2/{name}_baseline", *given), 2).peak
        for recompute, share in zip(("none", "cheap"), shares, strict=True):
            config = composed(f"experiment=table2/{name}_sbp", f"sbp.recompute={recompute}", *given)
            assert forecast(config, 2).peak < share * plain
    assert "sbp.recompute=block" in advice(config, 2, available=plain // 2)
