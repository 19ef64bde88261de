"""Lightning: the model is patched where the module makes it."""

import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import sbp


class Classifier(lightning.LightningModule):
    def __init__(self, name: str, keep_ratio: float = 0.5, **kwargs):
        super().__init__()
        self.model = sbp.apply(timm.create_model(name, **kwargs), keep_ratio=keep_ratio)

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_index):  # in eval mode: timm's own forward pass
        images, labels = batch
        self.log("val/top1", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(epochs: int = 1) -> Classifier:
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))  # your own
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    classifier = Classifier("convnext_atto", num_classes=10)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, devices=1)
    trainer.fit(classifier, loader, loader)
    return classifier


if __name__ == "__main__":
    train()
