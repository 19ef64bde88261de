"""timm's networks within those of other libraries, and these libraries' own; with the real packages, where they are."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import sbp
from tests.conftest import assert_same_gradients, gradients, images, randomise
from tests.paths import through_intermediates

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.long  # the packages alone take seconds to import

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OWN = {  # of Hugging Face: its sizes, and the network of timm to take instead
    "ViT": (SMALL, "vit_base_patch16_224"),
    "Dinov2": (SMALL, "vit_base_patch14_dinov2"),
    "Dinov2WithRegisters": (SMALL, "vit_base_patch14_reg4_dinov2"),
    "DINOv3ViT": (SMALL, "vit_base_patch16_dinov3"),
    "DINOv3ConvNext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "convnext_tiny"),
    "ConvNext": ({"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, "convnext_tiny"),
    "Beit": (SMALL, "beit_base_patch16_224"),
    "Swin": ({"embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]}, "swin_tiny_patch4_window7_224"),
}
BACKBONES = {  # in TimmWrapper: what makes each of them small, and the pixels of an image
    "vit_tiny_patch16_224": ({"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 3}, 64),
    "vit_small_patch16_dinov3": ({"img_size": 64, "embed_dim": 24, "num_heads": 2, "depth": 3}, 64),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 8, "depths": [1, 1, 2, 1], "strict_img_size": False}, 72),
    "convnext_atto": ({"depths": [1, 1, 2, 1], "dims": [8, 12, 16, 32]}, 64),
}
each_backbone = pytest.mark.parametrize("name", BACKBONES)


def wrapped(name):
    """A TimmWrapper for 5 classes, and the same network of timm's."""
    options, size = BACKBONES[name]
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=5, model_args=options)
    model = transformers.TimmWrapperForImageClassification(config)
    randomise(model.timm_model)
    plain = timm.create_model(name, num_classes=5, **options)
    plain.load_state_dict(model.timm_model.state_dict())
    return model.double().train(), plain.double().train(), images(size)


class Logits(nn.Module):
    """The logits alone of what a wrapper returns."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x):
        return self.model(x, **self.options).logits


@pytest.mark.parametrize("kind", OWN)
def test_hugging_faces_own_networks_are_refused_with_what_to_take_instead(kind):
    sizes, instead = OWN[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    reason = sbp.supports(model).reason
    assert f"{kind}Model is Hugging Face's own and not timm's: load {instead} or another" in reason
    assert "through TimmWrapperModel or TimmWrapperForImageClassification" in reason
    with torch.device("meta"):
        assert sbp.supports(timm.create_model(instead))
    with pytest.raises(ValueError, match="is Hugging Face's own"):
        sbp.apply(model)


def test_a_network_without_sbp_in_a_wrapper():
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="resnet18"))
    assert "ResNet has no SBP form, as convolutions mix positions" in sbp.supports(model).reason


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_timm_backbone(name):
    """What Hugging Face's detectors and segmentation networks stand on: timm's networks with features_only."""
    config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False)
    model = transformers.TimmBackbone(config)
    assert sbp.supports(model)
    sbp.apply(model).train()
    maps = model(images(224, batch=1).float()).feature_maps
    sum(one.mean() for one in maps).backward()
    assert int(sbp.mask_state(model)["draw"]) == 1


@each_backbone
def test_gradients_in_a_wrapper_are_those_of_timms_network(name):
    model, plain, x = wrapped(name)
    for one in (model, plain):
        sbp.apply(one, mask="random")
    expected = gradients(plain, x)
    for options in ({}, {"output_hidden_states": True}):
        sbp.set_draw(model, 0)
        sbp.set_draw(plain, 0)
        if options:
            through_intermediates()(plain)
            expected = gradients(plain, x)
        loss, found = gradients(Logits(model, **options), x)
        found = {key.removeprefix("model.timm_model."): value for key, value in found.items()}
        assert_same_gradients((loss, found), expected)


@each_backbone
def test_trainer(name, tmp_path):
    """After one `sbp.apply`, with its checkpointing, too."""
    pytest.importorskip("accelerate")
    _, size = BACKBONES[name]
    data = [{"pixel_values": x.float(), "labels": i % 5} for i, x in enumerate(images(size, batch=8))]
    losses = {}
    for checkpoints in (False, True):
        model, _, _ = wrapped(name)
        sbp.apply(model.float(), recompute="cheap")
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=6,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpoints,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpoints else None,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses[checkpoints] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert int(sbp.mask_state(model)["draw"]) == 12 and losses[checkpoints][-1] < losses[checkpoints][0]
        assert sbp.effective_keep_ratio(model) == pytest.approx(0.5, abs=0.1)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize(
    ("network", "encoder"),
    [
        ("Unet", "tu-convnext_atto"),
        ("FPN", "tu-swin_tiny_patch4_window7_224"),
        ("UPerNet", "tu-hiera_tiny_224"),
        ("DPT", "tu-vit_tiny_patch16_224"),
    ],
)
def test_segmentation_models_pytorch(network, encoder):
    """The forward pass is that of the plain network, and less is saved."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, network)(encoder, encoder_weights=None, classes=3).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d | DropPath):
            module.eval()
    x = images(224, batch=1).float()
    expected, plain = model(x), sbp.saved_bytes(lambda: model(x).sum())
    attends = bool(sbp.supports(model).mhsa_drops)
    sbp.apply(model, **({"mhsa_drop": "query"} if attends else {}))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found.shape == (1, 3, 224, 224)
    assert sbp.saved_bytes(lambda: model(x).sum()) < plain
    assert 0.5 < sbp.gradient_cosine(model, lambda: model(x).square().mean()).total < 1
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
