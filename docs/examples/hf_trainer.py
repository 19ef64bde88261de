"""Hugging Face's Trainer: a timm backbone within TimmWrapper, patched after it is made."""

import torch
from torch.utils.data import Dataset
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import sbp


class Images(Dataset):
    """Your own."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return {"pixel_values": torch.randn(3, 64, 64), "labels": index % 10}


def train(folder: str = "outputs/hf", steps: int = 4) -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(architecture="convnext_atto", num_labels=10)  # or TimmWrapper....from_pretrained(name)
    model = TimmWrapperForImageClassification(config)
    sbp.apply(model, keep_ratio=0.5)  # finds the timm backbone within
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, report_to="none", save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=Images()).train()
    return model


if __name__ == "__main__":
    train()
