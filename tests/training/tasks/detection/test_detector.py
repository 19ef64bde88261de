import copy
from itertools import pairwise

import pytest
import timm
import torch
from timm.models import ConvNeXt
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, roi_align

import sbp
from sbp.training.config.model import DETECTORS, BackboneConfig, DetectorConfig, SbpConfig
from sbp.training.config.recipe import RecipeConfig
from sbp.training.models.optim import build_optimizer
from sbp.training.runtime import wrapping
from sbp.training.tasks.detection.detector import OBJECTS_AT_ONCE, Anchors, build_detector, load_body, overlaps
from sbp.training.tasks.detection.heads import AlignedPool, crop_masks
from tests import oracles
from tests.conftest import assert_same_gradients, others_long
from tests.training.tasks.detection.detectors import (
    BACKBONE,
    CLASSES,
    SWIN,
    batch,
    gradients,
    losses,
    rectangles,
    small_detector,
    small_swin_detector,
)

BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]
DOWNSAMPLES = ["stages.1.downsample", "stages.2.downsample"]


def plain(model):
    return sbp.remove(copy.deepcopy(model))


@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_what_timm_does_not_decay_is_not_decayed_in_a_detector(backbone):
    def decayed(model):
        name_of = {parameter: name for name, parameter in model.named_parameters()}
        groups = build_optimizer(model, RecipeConfig(weight_decay=0.05), 1.0).param_groups
        return {name_of[one] for group in groups if group["weight_decay"] for one in group["params"]}

    model = small_swin_detector(backbone)
    found = {name.removeprefix("backbone.body.") for name in decayed(model) if name.startswith("backbone.body.")}
    assert found == decayed(model.backbone.body) != set()
    assert not any("relative_position_bias_table" in name for name in found)


@pytest.mark.parametrize("name", DETECTORS)
def test_keep_ratio_1_is_the_plain_detector(name):
    model = small_detector(name, keep_ratio=1.0)
    assert_same_gradients(gradients(model, *batch()), gradients(plain(model), *batch()))


@pytest.mark.parametrize("name", DETECTORS)
def test_gradients_equal_the_oracle(name):
    """On batches of different shapes, padded; the loss is that of the plain detector."""
    model = small_detector(name, keep_ratio=0.5)
    for height, width in [(64, 96), (96, 64)]:
        images, targets = batch(height, width)
        mask = torch.rand(height // 16, width // 16, generator=torch.Generator().manual_seed(0)) < 0.5
        expected = plain(model)
        oracles.install(expected.backbone.body, BLOCKS, oracles.convnext_block, mask)
        oracles.install(expected.backbone.body, DOWNSAMPLES, oracles.convnext_downsample, mask)
        with sbp.fixed_mask(model, mask):
            found = gradients(model, images, targets)
        assert_same_gradients(found, gradients(expected, images, targets))
        exact = gradients(plain(model), images, targets)
        torch.testing.assert_close(found[0], exact[0], rtol=1e-11, atol=0)
        assert not torch.allclose(found[1]["backbone.body.stem.0.weight"], exact[1]["backbone.body.stem.0.weight"])


SWIN_BLOCKS = [name.replace("stages", "layers") for name in BLOCKS]
SWIN_MERGING = [name.replace("stages", "layers") for name in DOWNSAMPLES]
SWIN_TILE = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_gradients_on_a_swin_equal_the_oracle(name, recompute):
    """Windows of 4 x 4 on maps of 24 x 16 (whole windows), of 12 x 8, 6 x 4 and 3 x 2 (padded)."""
    model = small_swin_detector(name, mhsa_drop="query", recompute=recompute)
    images, targets = batch(96, 64)
    expected = plain(model)
    oracles.install(expected.backbone.body, SWIN_BLOCKS, oracles.swin_block, SWIN_TILE, "query")
    oracles.install(expected.backbone.body, SWIN_MERGING, oracles.swin_merging, SWIN_TILE)
    with sbp.fixed_mask(model, SWIN_TILE):
        found = gradients(model, images, targets)
    assert_same_gradients(found, gradients(expected, images, targets))
    exact = gradients(plain(model), images, targets)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-11, atol=0)
    stem = "backbone.body.patch_embed.proj.weight"
    assert not torch.allclose(found[1][stem], exact[1][stem])
    assert all(gradient is not None for gradient in found[1].values())


def test_a_swin_has_timms_weights_and_its_layers():
    model = small_swin_detector(mhsa_drop="query")
    layer = model.group_matcher()
    assert [
        layer(f"backbone.body.{name}") for name in ("patch_embed.proj.weight", "layers.1.downsample.norm.bias")
    ] == [
        0,
        2,
    ]
    assert layer("backbone.body.layers.3.blocks.0.norm1.bias") == 4 and layer("rpn.head.conv.0.0.bias") == 5
    weights = timm.create_model(SWIN.name, num_classes=7, **SWIN.kwargs).state_dict()
    load_body(model.float(), weights)
    body = model.backbone.body.state_dict()
    assert set(weights) - set(body) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, weights[name]) for name, value in body.items())


def test_sbp_can_be_applied_to_the_whole_detector():
    model, expected = small_detector(), small_detector(keep_ratio=0.5)
    sbp.apply(model, keep_ratio=0.5)
    assert_same_gradients(gradients(model, *batch()), gradients(expected, *batch()), tolerance=0)


@pytest.mark.parametrize("name", others_long(DETECTORS, "cascade_mask_rcnn"))
def test_evaluation_is_the_plain_detectors_bit_for_bit(name):
    model = small_detector(name, keep_ratio=0.5).eval()
    images, targets = batch()
    targets = [{"size": target["size"], "image_id": target["image_id"]} for target in targets]
    with torch.no_grad():
        for found, expected in zip(model(images, targets), plain(model)(images, targets), strict=True):
            assert found.keys() == {"boxes", "labels", "scores", "masks"}
            assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_of_their_image(name):
    model = small_detector(name).eval()
    images, targets = batch()
    with torch.no_grad():
        detections = model(images, targets)
    for found, target in zip(detections, targets, strict=True):
        height, width = target["size"]
        count = len(found["boxes"])
        assert 0 < count <= 100 and len(found["labels"]) == len(found["scores"]) == count
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert found["labels"].min() >= 1 and found["labels"].max() <= CLASSES
        assert found["masks"].shape == (count, 1, 28, 28) and ((found["masks"] > 0) & (found["masks"] < 1)).all()
        assert all(one >= other for one, other in pairwise(found["scores"]))


@pytest.mark.parametrize("name", DETECTORS)
def test_nothing_is_detected(name):
    model = small_detector(name).eval()
    for stage in getattr(model.roi_heads, "stages", [model.roi_heads]):
        stage.score_thresh = 1.0
    for found in model(*batch()):
        assert {key: tuple(value.shape) for key, value in found.items()} == {
            "boxes": (0, 4),
            "labels": (0,),
            "scores": (0,),
            "masks": (0, 1, 28, 28),
        }


@pytest.mark.parametrize("name", DETECTORS)
def test_less_is_saved(name):
    images, targets = batch(128, 128)
    model = small_detector(name, keep_ratio=0.5)
    expected = plain(model)
    found, all_of_it = (
        sbp.saved_bytes(lambda m=m: sum(losses(m, images, targets).values())) for m in (model, expected)
    )
    body = sbp.saved_bytes(lambda: sum(x.sum() for x in expected.backbone.body.forward_intermediates(images)[1]))
    assert found < all_of_it - 0.2 * body


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)], ids=str)
def test_images_without_objects(name, counts):
    """DDP waits for a gradient of each parameter."""
    images, targets = batch()
    targets = [rectangles(target["size"], count) for target, count in zip(targets, counts, strict=True)]
    loss, found = gradients(small_detector(name, keep_ratio=0.5), images, targets)
    assert loss.isfinite()
    for parameter, gradient in found.items():
        assert gradient is not None and gradient.isfinite().all(), parameter
        if counts == (0, 0) and ("mask" in parameter or "bbox_pred" in parameter):
            assert not gradient.any(), parameter


@pytest.mark.parametrize("name", DETECTORS)
def test_names_of_weights(name):
    model = small_detector(name, keep_ratio=0.5)
    assert list(model.state_dict()) == list(small_detector(name).state_dict())
    body = timm.create_model(BACKBONE.name, **BACKBONE.kwargs)
    expected = [key for key in body.state_dict() if not key.startswith("head.")]
    assert list(model.backbone.body.state_dict()) == expected
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "rpn", "roi_heads"}


@pytest.mark.parametrize("timm_name", ["convnext_tiny", "convnext_tiny_hnf"])
def test_weights_of_timm(timm_name):
    backbone = BackboneConfig(name=timm_name, kwargs=BACKBONE.kwargs)
    weights = timm.create_model(timm_name, num_classes=7, **BACKBONE.kwargs).state_dict()
    model = build_detector(backbone, SbpConfig(), DetectorConfig(fpn_channels=8, hidden_size=16), CLASSES)
    load_body(model, weights)
    for name, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, weights[name])
    weights.pop("stages.2.blocks.1.norm.weight")
    with pytest.raises(ValueError, match=r"another model: missing stages.2.blocks.1.norm.weight"):
        load_body(model, weights)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            BackboneConfig(name="resnet50"),
            r"backbone.name=resnet50 is neither ConvNeXt nor Swin; task=detection needs one of",
        ),
        (BackboneConfig(name="convnext_tinny"), "is no timm model"),
        (BackboneConfig("test_convnext", kwargs={"output_stride": 16}), r"strides \[4, 8, 16, 16\]"),
    ],
    ids=str,
)
def test_other_backbones(backbone, message, monkeypatch):
    if backbone.name != "test_convnext":
        monkeypatch.setattr(timm, "create_model", None)  # nothing is built
    with pytest.raises(ValueError, match=message):
        build_detector(backbone, SbpConfig(), DetectorConfig(), CLASSES)


def test_layers_have_timms_names():
    model = small_detector(layers=["stages.1.blocks.0"])
    assert type(model.backbone.body.stages[1].blocks[0]).__name__ == "SBPConvNeXtBlock"
    assert isinstance(model.backbone.body, ConvNeXt)


@pytest.mark.parametrize("name", others_long(DETECTORS, "mask_rcnn"))
def test_under_autocast_boxes_stay_in_full_precision(name):
    model, (images, targets) = small_detector(name).float(), batch(320, 480)
    images = images.float()
    boxes = {}

    def note(module, args, output):
        boxes[torch.is_autocast_enabled("cpu")] = output[0]

    with model.rpn.register_forward_hook(note):
        expected = losses(model, images, targets)
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(model, images, targets)
    assert all(one.dtype == torch.float32 for one in found.values())
    for loss, value in expected.items():
        torch.testing.assert_close(found[loss], value, rtol=0.03, atol=0.01, msg=lambda m, n=loss: f"{n}: {m}")
    for one, other in zip(boxes[True], boxes[False], strict=True):
        assert one.dtype == torch.float32
        assert (box_iou(one[:100], other).max(dim=1).values > 0.95).float().mean() > 0.8
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(images)
        detections = model.eval()(images, targets)
    for found in detections:
        assert len(found["boxes"]) and all(found[key].dtype == torch.float32 for key in ("boxes", "scores", "masks"))
    assert features["0"].dtype == torch.bfloat16
    maps, size = list(features.values()), ImageList(images, [(320, 480)])
    narrow, wide = (
        model.rpn.anchor_generator(size, [x.to(dtype) for x in maps])[0] for dtype in (torch.bfloat16, torch.float32)
    )
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


def test_anchors_stand_on_the_levels_strides():
    """Also where a map of odd size is halved: 3 x 5 positions of stride 32 become 2 x 3 of stride 64."""
    anchors = Anchors([8, 16], [32, 64])
    maps = [torch.zeros(2, 1, 3, 5), torch.zeros(2, 1, 2, 3)]
    both = anchors(ImageList(torch.zeros(2, 3, 96, 160), [(96, 160), (50, 60)]), maps)
    expected = [
        (x * stride, y * stride)
        for stride, (rows, columns) in ((32, (3, 5)), (64, (2, 3)))
        for y in range(rows)
        for x in range(columns)
        for _ in range(3)
    ]
    for one in both:
        assert (one[:, :2] + one[:, 2:]).div(2).tolist() == [list(centre) for centre in expected]
        sides = (one[:, 2:] - one[:, :2])[[0, 1, 2, 45, 46, 47]]
        expected_sides = torch.tensor([[12, 6], [8, 8], [6, 12], [22, 12], [16, 16], [12, 22]])
        assert (sides - expected_sides).abs().max() <= 2  # torchvision rounds corners


def test_regions_are_read_from_the_padded_batch():
    """With the strides of its maps, however small the images within it are, and pixel centres at 0.5."""
    strides = [4, 8, 16, 32]
    maps = {str(level): torch.randn(2, 3, 512 // s, 512 // s, dtype=torch.float64) for level, s in enumerate(strides)}
    boxes = [
        torch.tensor([[3.0, 5.0, 40.0, 60.0], [10.0, 0.0, 200.0, 190.0]], dtype=torch.float64),
        torch.tensor([[0.0, 0.0, 500.0, 500.0], [7.0, 9.0, 250.0, 260.0]], dtype=torch.float64),
    ]
    found = AlignedPool(7, [*strides, 64])(maps, boxes, [(70, 60), (80, 90)])
    for row, (image, box, level) in enumerate([(0, 0, 0), (0, 1, 1), (1, 0, 3), (1, 1, 2)]):
        region = torch.cat([torch.tensor([image]), boxes[image][box]])[None]
        expected = roi_align(maps[str(level)], region, 7, 1 / strides[level], sampling_ratio=0, aligned=True)
        torch.testing.assert_close(found[row : row + 1], expected)


def test_masks_brought_to_boxes():
    target = rectangles((60, 90), 19)
    matched = torch.tensor([18, 0, 7, 8, 18, 3])
    boxes = (target["boxes"][matched] + torch.tensor([-3.0, 2.0, 4.0, 1.0])).double()
    boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([90, 60, 90, 60]))
    found = crop_masks(target["masks"], boxes, matched, 14)
    assert found.dtype == torch.float64 and found.unique().tolist() == [0, 1]
    wrong = 0
    for box, index, crop in zip(boxes.tolist(), matched.tolist(), found, strict=True):
        x1, y1, x2, y2 = box
        for i in range(14):
            for j in range(14):
                x, y = x1 + (j + 0.5) * (x2 - x1) / 14, y1 + (i + 0.5) * (y2 - y1) / 14
                wrong += int(crop[i, j] != target["masks"][index, min(int(y), 59), min(int(x), 89)])
    assert wrong <= 0.08 * found.numel()  # a bin at the mask's border may be on either side


def test_losses_and_detections_are_torchvisions():
    """But for the masks' targets, which torchvision leaves at fractions."""
    model, (images, targets) = small_detector(), batch()
    sizes = [target["size"] for target in targets]
    features = model.backbone(images)
    proposals, _ = model.rpn(ImageList(images, sizes), features, targets)
    results = []
    for forward in (type(model.roi_heads).forward, RoIHeads.forward):
        torch.manual_seed(0)
        results.append(forward(model.roi_heads, features, list(proposals), sizes, targets)[1])
    assert results[0].keys() == results[1].keys()
    for name in ("loss_classifier", "loss_box_reg"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)
    torch.testing.assert_close(results[0]["loss_mask"], results[1]["loss_mask"], rtol=0.1, atol=0)
    model.eval()
    found, expected = (
        f(model.roi_heads, features, proposals, sizes, None)[0]
        for f in (type(model.roi_heads).forward, RoIHeads.forward)
    )
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_batch_norm_of_one_process_stays():
    model = small_detector("cascade_mask_rcnn")
    assert wrapping.synchronise_batch_norm(model, torch.device("cuda")) is model
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_batch_norm_of_several_processes(monkeypatch):
    """Converted, with the names and the very parameters, and with SBP's classes left alone."""
    model = small_detector("cascade_mask_rcnn", keep_ratio=0.5)
    before, classes = dict(model.named_parameters()), [type(module) for module in model.backbone.modules()]
    keys = list(model.state_dict())
    monkeypatch.setattr("sbp.training.runtime.distributed.world_size", lambda: 2)
    assert wrapping.synchronise_batch_norm(model, torch.device("cpu")) is model  # which has none
    model = wrapping.synchronise_batch_norm(model, torch.device("cuda"))
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()) == 12
    assert list(model.state_dict()) == keys and [type(module) for module in model.backbone.modules()] == classes
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_overlaps_are_torchvisions():
    for count in (0, 1, 2 * OBJECTS_AT_ONCE + 3):
        corners = torch.rand(count + 5, 2)
        boxes = torch.cat([corners, corners + torch.rand(count + 5, 2)], 1)
        assert torch.equal(overlaps(boxes[:count], boxes[count:]), box_iou(boxes[:count], boxes[count:]))
