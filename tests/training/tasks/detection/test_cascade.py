"""The cascade against a reading of the published algorithm region by region, with a list of lists for every tensor.

Only the networks themselves (pooling, heads, predictors) are shared with the package.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from tests.training.tasks.detection.detectors import rectangles, small_detector

SIZES = [(60, 90), (44, 56)]
STAGES = [(0.5, [0.1, 0.1, 0.2, 0.2], 1), (0.6, [0.05, 0.05, 0.1, 0.1], 0.5), (0.7, [0.033, 0.033, 0.067, 0.067], 0.25)]


def heads():
    model = small_detector("cascade_mask_rcnn").roi_heads
    for stage in model.stages:
        stage.fg_bg_sampler.batch_size_per_image = 1000  # all regions, so that there is nothing to draw
        torch.nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.5)
    return model


def inputs(counts=(3, 2)):
    """Maps of a padded batch, proposals around the objects and elsewhere, and targets."""
    generator = torch.Generator().manual_seed(0)
    maps = {
        str(level): torch.randn(2, 8, 64 // stride, 96 // stride, generator=generator, dtype=torch.float64)
        for level, stride in enumerate((4, 8, 16, 32))
    }
    targets = [rectangles(size, count, seed) for seed, (size, count) in enumerate(zip(SIZES, counts, strict=True))]
    proposals = []
    for target, (height, width) in zip(targets, SIZES, strict=True):
        near = target["boxes"].repeat(8, 1) + torch.randn(8 * len(target["boxes"]), 4, generator=generator) * 3
        boxes = torch.cat([near, rectangles((height, width), 10, 7)["boxes"]]).double()
        proposals.append(boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2)))
    return maps, proposals, targets


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b):
    """Intersection and union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = width * height if width > 0 and height > 0 else 0.0
    return both, area(a) + area(b) - both


def iou(a, b):
    both, either = overlap(a, b)
    return float(both / either)


def giou_loss(a, b):
    both, either = overlap(a, b)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - (both / either - (hull - either) / hull)


def decoded(box, delta, stds):
    dx, dy, dw, dh = (value * std for value, std in zip(delta, stds, strict=True))
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    limit = math.log(1000 / 16)
    width, height = (side * min(d, torch.tensor(limit)).exp() for side, d in ((width, dw), (height, dh)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clipped(box, size):
    return [min(max(float(value), 0.0), float(size[1 - axis % 2])) for axis, value in enumerate(box)]


def tensors(boxes):
    return [torch.tensor(one, dtype=torch.float64).reshape(-1, 4) for one in boxes]


def likeliest(scores):
    return max(range(1, len(scores)), key=scores.detach().tolist().__getitem__)


def published_losses(model, maps, proposals, targets):
    losses, positives = {}, []
    proposals = [boxes.tolist() for boxes in proposals]
    for number, (stage, (threshold, stds, weight)) in enumerate(zip(model.stages, STAGES, strict=True), 1):
        regions, matches = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            objects = target["boxes"].tolist()
            regions.append(boxes + objects)  # the objects' own boxes train, too
            matches.append([])
            for region in regions[-1]:
                overlaps = [iou(one, region) for one in objects]
                best = max(range(len(objects)), key=lambda i, o=overlaps: o[i], default=None)
                matches[-1].append(best if best is not None and overlaps[best] >= threshold else None)
        pooled = stage.box_roi_pool(maps, tensors(regions), SIZES)
        scores, deltas = stage.box_predictor(stage.box_head(pooled))
        classification, boxes_loss, mask_boxes, mask_matches, refined, row = [], [], [], [], [], 0
        for image, target in enumerate(targets):
            refined.append([])
            mask_boxes.append([])
            for place, (region, match) in enumerate(zip(regions[image], matches[image], strict=True)):
                label = 0 if match is None else int(target["labels"][match])
                classification.append(-scores[row].log_softmax(0)[label])
                delta = deltas[row].view(-1, 4)
                if match is not None:
                    boxes_loss.append(giou_loss(decoded(region, delta[label], stds), target["boxes"][match].double()))
                    mask_boxes[-1].append(region)
                    mask_matches.append((target, match, label))
                if place < len(proposals[image]):  # not an object's own box
                    new = decoded(region, delta[label or likeliest(scores[row])].detach(), stds)
                    refined[-1].append(clipped(new, SIZES[image]))
                row += 1
        logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(maps, tensors(mask_boxes), SIZES)))
        masks = []
        every_box = [box for own in mask_boxes for box in own]
        for one, box, (target, match, label) in zip(logits, every_box, mask_matches, strict=True):
            region = torch.tensor([[0, *box]], dtype=torch.float64)
            crop = roi_align(target["masks"][match][None, None].double(), region, 28, aligned=True)[0, 0] >= 0.5
            masks.append(torch.where(crop, -F.logsigmoid(one[label]), -F.logsigmoid(-one[label])).mean())
        losses[f"loss_classifier_{number}"] = weight * sum(classification) / row
        losses[f"loss_box_reg_{number}"] = weight * 10 * sum(boxes_loss) / row
        losses[f"loss_mask_{number}"] = weight * sum(masks) / len(masks)
        positives.append(len(masks))
        proposals = refined
    return losses, positives


def test_losses_and_gradients_are_the_published_ones():
    model, (maps, proposals, targets) = heads(), inputs()
    maps = {level: x.requires_grad_() for level, x in maps.items()}
    wanted = [*maps.values(), *model.parameters()]
    _, losses = model(maps, proposals, SIZES, targets)
    gradients = torch.autograd.grad(sum(losses.values()), wanted)
    expected, positives = published_losses(model, maps, proposals, targets)
    assert min(positives) > 5 and len(set(positives)) == 3  # each stage has regions of its own beside the objects
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    for found, other in zip(gradients, torch.autograd.grad(sum(expected.values()), wanted), strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(found, other, rtol=0, atol=1e-9 * scale + 1e-12)


def published_detections(model, maps, proposals):
    logits = 0
    boxes = [one.tolist() for one in proposals]
    for number, (stage, (_, stds, _)) in enumerate(zip(model.stages, STAGES, strict=True)):
        regions = boxes
        pooled = stage.box_roi_pool(maps, tensors(regions), SIZES)
        scores, deltas = stage.box_predictor(stage.box_head(pooled))
        logits = logits + scores / 3
        rows = [(image, region) for image, own in enumerate(regions) for region in own]
        if number < 2:
            boxes = [[], []]
            for (image, region), score, delta in zip(rows, scores, deltas, strict=True):
                new = decoded(region, delta.view(-1, 4)[likeliest(score)], stds)
                boxes[image].append(clipped(new, SIZES[image]))
    candidates = [[], []]
    for (image, region), score, delta in zip(rows, logits.softmax(1), deltas, strict=True):
        for label in range(1, len(score)):
            box = clipped(decoded(region, delta.view(-1, 4)[label], stds), SIZES[image])
            if score[label] > 0.05 and min(box[2] - box[0], box[3] - box[1]) >= 0.01:
                candidates[image].append((float(score[label]), label, box))
    kept = []
    for own in candidates:
        kept.append([])
        for score, label, box in sorted(own, key=lambda one: -one[0]):
            if all(label != other[1] or iou(box, other[2]) <= 0.5 for other in kept[-1]):
                kept[-1].append((score, label, box))
    kept = [own[:100] for own in kept]
    masks = []
    for stage in model.stages:
        pooled = stage.mask_roi_pool(maps, tensors([[box for _, _, box in own] for own in kept]), SIZES)
        masks.append(stage.mask_predictor(stage.mask_head(pooled)).sigmoid())
    return kept, (masks[0] + masks[1] + masks[2]) / 3


def test_detections_are_the_published_ones():
    model, (maps, proposals, targets) = heads(), inputs()
    model(maps, proposals, SIZES, targets)  # batch norm has seen something
    with torch.no_grad():
        found, losses = model.eval()(maps, proposals, SIZES, targets)
        expected, masks = published_detections(model, maps, proposals)
    assert not losses
    row = 0
    for own, others in zip(found, expected, strict=True):
        assert len(own["boxes"]) == len(others) > 10
        for place, (score, label, box) in enumerate(others):
            assert own["labels"][place] == label
            assert float(own["scores"][place]) == pytest.approx(score, rel=1e-9)
            assert own["boxes"][place].tolist() == pytest.approx(box, abs=1e-6)
            torch.testing.assert_close(own["masks"][place, 0], masks[row, label])
            row += 1


def test_regions_are_drawn_for_each_stage():
    """So many in all, a quarter of them with an object."""
    model, (maps, proposals, targets) = heads(), inputs()
    drawn = []
    for stage in model.stages:
        stage.fg_bg_sampler.batch_size_per_image = 8
        for pool in (stage.box_roi_pool, stage.mask_roi_pool):
            pool.register_forward_hook(lambda module, args, output: drawn.append([len(boxes) for boxes in args[1]]))
    model(maps, proposals, SIZES, targets)
    assert drawn[0] == [8, 8] and drawn[1::2] == [[2, 2]] * 3
    assert all(4 <= count <= 8 for counts in drawn[2::2] for count in counts)
