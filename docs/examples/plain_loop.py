"""A plain PyTorch loop: a timm model, one call, and everything else as ever."""

import timm
import torch

import sbp


def train(steps: int = 10, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> torch.nn.Module:
    model = timm.create_model("convnext_atto", num_classes=10).to(device)
    sbp.apply(model, keep_ratio=0.5, recompute="cheap")  # before DDP, torch.compile, the optimizer and a moving average
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        images = torch.randn(8, 3, 64, 64, device=device)  # your own
        labels = torch.randint(10, (8,), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    torch.save(model.state_dict(), "convnext_atto.pt")  # timm's own keys
    return model


if __name__ == "__main__":
    train()
