"""Average precision: that of pycocotools, in pixels of the files, on any number of processes."""

import numpy as np
import pytest
import torch
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval

from sbp.training.config.recipe import RecipeConfig
from sbp.training.data.loading import ValidationSampler, make_loader
from sbp.training.data.preprocessing import Normalize
from sbp.training.record.status import Preempted
from sbp.training.runtime import signals
from sbp.training.tasks.detection import evaluation
from sbp.training.tasks.detection.augmentation import PaddedNormalize, collate
from sbp.training.tasks.detection.evaluation import average_precision, coco_results, evaluate_detection
from sbp.training.tasks.detection.heads import crop_masks, paste_masks
from tests.training.configs import ROOT
from tests.training.tasks.detection.coco_files import coco_folder, coco_settings, plain
from tests.training.tasks.detection.finding import CPU, IMAGES, Finder, disturbed, figures, perfect, shapes
from tests.training.test_processes import TORCHRUN, load, run

NAMES = ["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"]


@pytest.fixture
def coco(tmp_path):
    return plain(coco_settings(coco_folder(tmp_path)))[1]


def test_the_objects_themselves_reach_100():
    """Crowds, images without objects and category ids with gaps included."""
    dataset = shapes()
    found = figures(dataset, perfect(dataset.ground_truth()))
    assert list(found) == NAMES
    assert found["box_ap"] == found["box_ap50"] == pytest.approx(100)
    assert found["mask_ap50"] == pytest.approx(100) and found["mask_ap"] > 99


@pytest.mark.parametrize("side", [10, 40, 200])
def test_a_mask_that_its_box_was_trained_to_show_is_pasted_where_it_was(side):
    """To the resolution of its 28 x 28 numbers; boxes lie between pixels, and may reach beyond the image."""
    rows, columns = torch.meshgrid(torch.arange(240.0), torch.arange(320.0), indexing="ij")
    for x, y in ((30.3, 40.6), (20.0, 20.0), (250.7, 30.2)):
        across, down = side / 2, side / 3
        middle = x + across, y + down
        true = ((columns + 0.5 - middle[0]) / across) ** 2 + ((rows + 0.5 - middle[1]) / down) ** 2 <= 1
        box = torch.tensor([[x, y, x + 2 * across, y + 2 * down]])
        mask = crop_masks(true[None].to(torch.uint8), box, torch.tensor([0]), 28)
        (found,) = paste_masks(mask[:, None], box, (240, 320))
        assert found.dtype == torch.bool and (found & true).sum() > 0.95 * (found | true).sum()
    assert not paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[-9.0, 3, -2, 8]]), (20, 20)).any()
    assert paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[2.0, 3, 6, 8]]), (20, 20)).sum() == 4 * 5


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_boxes_come_back_through_resizing_and_padding(coco, batch, capsys):
    """The images have five sizes; a box of a degenerate object is 0.5 px wide."""
    found = figures(coco, perfect(coco.ground_truth()), batch=batch)
    assert found["box_ap"] == found["box_ap75"] == pytest.approx(100)
    assert capsys.readouterr() == ("", "")


def detection(boxes, masks=None, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    return {
        "boxes": boxes,
        "labels": torch.ones(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels),
        "scores": torch.linspace(0.9, 0.1, len(boxes)),
        "masks": torch.ones(len(boxes), 1, 28, 28) if masks is None else masks,
    }


def test_results_are_in_pixels_of_the_file():
    target = {"image_id": 5, "size": (100, 200), "original_size": (50, 160)}
    first, second = coco_results(detection([[20, 10, 60, 40], [0, 0, 200, 100]], labels=[2, 1]), target)
    assert {name: first[name] for name in ("image_id", "label")} == {"image_id": 5, "label": 2}
    assert first["bbox"] == pytest.approx([16, 5, 32, 15]) and first["score"] == pytest.approx(0.9)
    assert second["bbox"] == pytest.approx([0, 0, 160, 50])
    mask = run_lengths.decode(first["segmentation"])
    assert mask.shape == (50, 160)
    rows, columns = np.nonzero(mask)
    assert abs(rows.min() - 5) <= 1 and abs(rows.max() - 19) <= 1
    assert abs(columns.min() - 16) <= 1 and abs(columns.max() - 47) <= 1
    assert run_lengths.decode(second["segmentation"]).mean() > 0.97


def test_masks_are_pasted_a_few_at_a_time_with_one_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(9, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(9, 2, generator=generator) * 50], 1).tolist()
    found = detection(boxes, torch.rand(9, 1, 28, 28, generator=generator))
    target = {"image_id": 5, "size": (100, 120), "original_size": (100, 120)}
    whole, calls = coco_results(found, target), []
    paste = evaluation.paste_masks
    monkeypatch.setattr(evaluation, "paste_masks", lambda m, *rest: calls.append(len(m)) or paste(m, *rest))
    monkeypatch.setattr(evaluation, "_PASTED", 4 * 100 * 120)
    assert coco_results(found, target) == whole and calls == [4, 4, 1]
    monkeypatch.setattr(evaluation, "_PASTED", 1)
    assert coco_results(found, target) == whole
    assert coco_results({name: value[:0] for name, value in found.items()}, target) == []


def test_figures_are_those_of_pycocotools_on_the_same_results(coco):
    """By hand: results with category ids, through COCOeval as its authors call it."""
    truth = coco.ground_truth()
    by_hand, ours = [], []
    for category, label, image, box, score in [
        (7, 2, 10, (6, 4, 20, 10), 0.9),
        (90, 3, 10, (30, 10, 21, 25), 0.8),
        (90, 3, 10, (31, 10, 21, 21), 0.7),
        (3, 1, 11, (10, 32, 17, 17), 0.6),
        (3, 1, 11, (0, 50, 12, 10), 0.3),
        (3, 1, 12, (5, 5, 30, 30), 0.95),  # a crowd: it counts neither way
        (7, 2, 12, (0, 20, 10, 10), 0.5),
        (7, 2, 13, (40, 0, 20, 20), 0.99),
        (7, 2, 14, (0, 0, 20, 20), 0.2),
    ]:
        mask = np.zeros((truth.imgs[image]["height"], truth.imgs[image]["width"]), np.uint8, order="F")
        x, y, width, height = box
        mask[y : y + height, x : x + width] = 1
        row = {"image_id": image, "bbox": list(box), "score": score, "segmentation": run_lengths.encode(mask)}
        by_hand.append(row | {"category_id": category})
        ours.append(row | {"label": label})
    for images in (range(10, 15), [10, 11], [11, 12, 14]):
        expected = []
        for measure in ("bbox", "segm"):
            scores = COCOeval(truth, truth.loadRes([dict(row) for row in by_hand]), measure)
            scores.params.imgIds = list(images)
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            expected += [100 * value for value in scores.stats[:3]]
        found = average_precision(coco.ground_truth(), [dict(row) for row in ours], list(images))
        assert list(found) == NAMES and list(found.values()) == pytest.approx(expected, abs=1e-9)
        assert 5 < found["box_ap"] < 95 and found["box_ap"] != found["mask_ap"]


def test_finding_nothing_is_0_and_where_nothing_is_to_find_an_error(coco):
    found = {
        number: {name: value[:0] for name, value in one.items()} for number, one in perfect(coco.ground_truth()).items()
    }
    assert figures(coco, found) == dict.fromkeys(NAMES, 0)
    with pytest.raises(ValueError, match="cannot evaluate: the 2 images have no objects"):
        average_precision(coco.ground_truth(), [], [13, 14])


def test_images_that_were_not_looked_at_do_not_count(coco):
    found = perfect(coco.ground_truth())
    loader = make_loader(coco, [[(0, 0), (0, 4)]], seed=0, workers=0, device=CPU, collate=collate)
    assert evaluate_detection(Finder(found), loader, ground_truth=coco.ground_truth)["box_ap"] == pytest.approx(100)


def test_the_model_sees_normalised_images_with_zeros_around_and_stays_in_its_mode(coco):
    model = Finder(perfect(coco.ground_truth())).train()
    normalize = PaddedNormalize(coco_settings("unused"), RecipeConfig())
    plain_normalize = Normalize(coco_settings("unused"), RecipeConfig())
    loader = make_loader(coco, ValidationSampler(5, 5), seed=0, workers=0, device=CPU, collate=collate)
    evaluate_detection(model, loader, ground_truth=coco.ground_truth, normalize=normalize)
    ((images, targets),) = model.calls
    assert model.training and images.dtype == torch.float32 and images.shape == (5, 3, 96, 96)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        height, width = target["size"]
        assert torch.equal(image[:, :height, :width], plain_normalize(coco[index][0][None])[0])
        assert image[:, height:].abs().sum() == image[:, :, width:].abs().sum() == 0


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path):
    root = coco_folder(tmp_path)
    bad = root / "images" / "val" / "12.png"
    bad.write_bytes(b"no image")
    dataset = plain(coco_settings(root))[1]
    with pytest.raises(ValueError, match=f"cannot evaluate: 1 of the images cannot be read: {bad} \\(not an image\\)"):
        figures(dataset, perfect(dataset.ground_truth()))


def test_a_signal_ends_it():
    dataset = shapes()
    found = perfect(dataset.ground_truth())
    try:
        signals.remember(signals.SIGNALS[0])
        with pytest.raises(Preempted, match="stopped by SIGTERM during evaluation"):
            figures(dataset, found)
    finally:
        signals.remember(None)


@pytest.mark.multiprocess
@pytest.mark.long
def test_two_processes_find_what_one_does(tmp_path):
    dataset = shapes()
    alone = figures(dataset, disturbed(perfect(dataset.ground_truth())))
    assert len(dataset) == IMAGES and 5 < alone["mask_ap"] < 95
    script = ROOT / "tests" / "training" / "tasks" / "detection" / "finding.py"
    result = run(*TORCHRUN, script, tmp_path, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [load(tmp_path / f"{rank}.pt") for rank in range(2)] == [[alone, alone]] * 2
