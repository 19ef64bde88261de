"""The training step: scaled, accumulated, clipped, averaged and left out as it should be."""

import copy

import pytest
import timm
import torch

from sbp.training.engine import setup
from sbp.training.engine.trainer import Trainer
from sbp.training.models.build import build_model
from sbp.training.models.optim import build_criterion, build_optimizer, build_scheduler
from sbp.training.runtime.distributed import pick_device
from tests.training.comparing import assert_equal
from tests.training.configs import BACKBONES, small

CPU = pick_device("cpu")


def test_float16_scales_the_loss_and_skips_a_step_that_overflows():
    config = small("amp=float16", "recipe.ema_decay=0.9", "global_batch_size=16")
    images = setup.load_images(config, CPU)
    trainer = setup.build_trainer(config, images.order, CPU)
    batch = next(iter(images.train))[:2]
    first = trainer.scaler.get_scale()
    trainer.step(0, [batch])
    before = copy.deepcopy([trainer.model.state_dict(), trainer.ema.module.state_dict()])
    infinite = (torch.full_like(batch[0], float("inf"), dtype=torch.float32), batch[1])
    trainer.step(1, [infinite])
    assert trainer.scaler.get_scale() == first / 2
    assert_equal(before, [trainer.model.state_dict(), trainer.ema.module.state_dict()])
    for step in range(2, 30):
        loss = trainer.step(step, [batch])
    assert loss < 2.1 and trainer.scaler.get_scale() <= first


def test_a_step_that_is_left_out_leaves_batch_norms_as_they_were():
    """Their averages of an infinite batch would stay: no checkpoint could be written any more."""
    recipe = small().recipe
    model = timm.create_model("test_efficientnet", num_classes=10)
    optimizer = build_optimizer(model, recipe, 1e-2)
    trainer = Trainer(
        model, optimizer, build_scheduler(optimizer, recipe, 10), build_criterion(recipe), patched=False, accumulation=2
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    trainer.step(0, [(images, labels)] * 2)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    trainer.backward(1, [(images, labels), (images * torch.inf, labels)])
    assert not model.state_dict()["bn1.running_mean"].isfinite().all()
    trainer.skip()
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    trainer.step(2, [(images, labels)] * 2)
    assert not torch.equal(model.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def double_trainer(config, accumulation):
    torch.manual_seed(0)
    model = build_model(config.backbone, config.sbp, 10, 32).double()
    optimizer = build_optimizer(model, config.recipe, 1e-2)
    return Trainer(
        model,
        optimizer,
        build_scheduler(optimizer, config.recipe, 10),
        build_criterion(config.recipe),
        accumulation=accumulation,
        clip_grad=0.1,
        hold_mask=True,
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_accumulation_equals_one_large_batch(backbone):
    config = small("backbone.drop_path=0", "recipe.optimizer=sgd", backbone=backbone)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.arange(12) % 10
    one, four = double_trainer(config, 1), double_trainer(config, 4)
    for step, images in enumerate(batches):
        loss = one.step(step, [(images, labels)])
        split = four.step(step, zip(images.split(3), labels.split(3), strict=True))
        torch.testing.assert_close(loss, split)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(four.model.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_float16_unscales_and_clips_once_a_step(monkeypatch):
    """Else the weights would change 65536 times too little, or by the gradient of a micro batch."""
    given = ("recipe.optimizer=sgd", "recipe.clip_grad=0.1", "backbone.drop_path=0", "sbp.hold_mask=true")
    batches = ("global_batch_size=16", "micro_batch_size=4")
    clipped, changes = [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clipped.append(clip(*args)) or clipped[-1])
    for amp in ("off", "float16"):
        config = small(*given, *batches, f"amp={amp}")
        images = setup.load_images(config, CPU)
        trainer = setup.build_trainer(config, images.order, CPU)
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        loader = iter(images.train)
        trainer.step(0, [next(loader)[:2] for _ in range(4)])
        changes.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before)
    assert len(clipped) == 2 and clipped[0] > 0.1  # so that there was something to clip
    torch.testing.assert_close(clipped[1], clipped[0], rtol=0.01, atol=0)
    assert torch.dist(*changes) < 0.03 * changes[0].norm()


def test_a_loss_scale_goes_on_where_it_was():
    config = small("amp=float16", "global_batch_size=16")
    images = setup.load_images(config, CPU)
    one, other = (setup.build_trainer(config, images.order, CPU) for _ in range(2))
    batch, labels = next(iter(images.train))[:2]
    for step, factor in enumerate((1, float("inf"), 1)):
        one.step(step, [(batch.float() * factor, labels)])
    other.load_state_dict(one.state_dict())
    assert other.scaler.state_dict() == one.scaler.state_dict()
    assert one.scaler.get_scale() == 2.0**15 and one.scaler.state_dict()["_growth_tracker"] == 1


def test_averaged_weights_start_as_the_mean_of_all_steps():
    """With their decay from the start on, 0.9999 would leave them at the initial weights for an epoch."""
    config = small("recipe.ema_decay=0.9999", "recipe.optimizer=sgd", "global_batch_size=16")
    images = setup.load_images(config, CPU)
    trainer = setup.build_trainer(config, images.order, CPU)
    seen = []
    for step, batch in zip(range(4), images.train, strict=False):
        trainer.step(step, [batch[:2]])
        seen.append(copy.deepcopy(trainer.model.state_dict()))
    for name, average in trainer.ema.module.state_dict().items():
        mean = torch.stack([one[name] for one in seen]).mean(0)
        torch.testing.assert_close(average, mean, rtol=1e-5, atol=1e-7, msg=name)
