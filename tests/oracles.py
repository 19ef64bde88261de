"""Naive SBP: timm's own layers on all positions, and `detach` where SBP drops the gradient.

Nothing here is shared with the package: explicit softmax, no split, no streams, no custom backward. `install`
gives the chosen layers of a plain timm model these forward passes.
"""

from types import MethodType

import torch
from torch import Tensor, nn


def install(model: nn.Module, layers: list[str], forward, *args) -> nn.Module:
    for name in layers:
        layer = model.get_submodule(name)
        layer.forward = MethodType(lambda self, x: forward(self, x, *args), layer)
    return model


def only_kept(x: Tensor, kept: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """x whose gradient is cut where kept (broadcast) is False, and multiplied by scale elsewhere."""
    return torch.where(kept, x.detach() + scale * (x - x.detach()), x.detach())


def vit_block(
    block: nn.Module, x: Tensor, grid_mask: Tensor, prefix: int, mhsa_drop: str, heads=None, rescale=False
) -> Tensor:
    """One timm `Block` on tokens (B, N, C). heads: bool (h,), the kept ones, for mhsa_drop="head"."""
    kept = torch.cat([torch.ones(prefix, dtype=torch.bool), grid_mask.flatten()])  # (N,)
    scale = torch.ones(len(kept), 1).to(x)
    if rescale:
        scale[prefix:] = grid_mask.numel() / int(grid_mask.sum())
    x = x + block.drop_path1(_attention(block, x, kept, mhsa_drop, heads, scale))
    return x + block.drop_path2(only_kept(block.ls2(block.mlp(block.norm2(x))), kept[:, None], scale))


def _attention(
    block: nn.Module, x: Tensor, kept: Tensor, mhsa_drop: str, heads: Tensor | None, scale: Tensor
) -> Tensor:
    attn = block.attn
    images, tokens, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(images, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    if mhsa_drop == "head":
        out = _softmax_attention(attn, q, k, v)
        weight = attn.proj.weight.unflatten(1, (attn.num_heads, -1))
        per_head = torch.einsum("bhnd,chd->bhnc", out, weight)
        head_scale = len(heads) / int(heads.sum()) if (scale != 1).any() else 1.0
        return block.ls1(only_kept(per_head, heads[:, None, None], head_scale).sum(1) + attn.proj.bias)
    if mhsa_drop == "qkv":
        only_kept_keys = torch.where(kept[:, None] & ~kept, -torch.inf, 0.0)  # a kept query sees kept keys
        out = _softmax_attention(attn, q, k, v, only_kept_keys.to(q))
    if mhsa_drop == "query":
        out = _softmax_attention(attn, q, k, v)
    if mhsa_drop == "qkv_exact":
        out = _softmax_attention(attn, q, only_kept(k, kept[:, None]), only_kept(v, kept[:, None]))
    out = block.ls1(attn.proj(out.transpose(1, 2).flatten(2)))
    return only_kept(out, kept[:, None], scale)


def _softmax_attention(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (q @ k.transpose(-2, -1) * attn.scale + bias).softmax(-1) @ v


def drop_tokens(block: nn.Module, x: Tensor, grid_mask: Tensor, prefix: int) -> Tensor:
    """Throws the dropped tokens away, then runs timm's block: what class-token qkv SBP equals."""
    kept = torch.cat([torch.ones(prefix, dtype=torch.bool), grid_mask.flatten()])
    return type(block).forward(block, x[:, kept] if x.shape[1] == len(kept) else x)


def convnext_block(block: nn.Module, x: Tensor, base_mask: Tensor, rescale: bool = False) -> Tensor:
    """One timm `ConvNeXtBlock` on a map (B, C, H, W)."""
    y = block.conv_dw(x)
    mask = block_mask(base_mask, *y.shape[-2:])
    y = y if block.use_conv_mlp else y.permute(0, 2, 3, 1)
    kept = mask if block.use_conv_mlp else mask[..., None]
    mlp = block.mlp
    hidden = only_kept(mlp.act(mlp.fc1(block.norm(y))), kept)
    if hasattr(mlp, "grn"):
        hidden = mlp.grn(hidden)
    y = mlp.fc2(hidden)
    y = y if block.use_conv_mlp else y.permute(0, 3, 1, 2)
    if block.gamma is not None:
        y = y * block.gamma[:, None, None]
    return block.drop_path(only_kept(y, mask, _scale(mask, rescale))) + block.shortcut(x)


def convnext_downsample(downsample: nn.Sequential, x: Tensor, base_mask: Tensor, rescale: bool = False) -> Tensor:
    y = downsample[1](downsample[0](x))
    mask = block_mask(base_mask, *y.shape[-2:])
    return only_kept(y, mask, _scale(mask, rescale))


def _scale(mask: Tensor, rescale: bool) -> float:
    return mask.numel() / int(mask.sum()) if rescale else 1.0


def block_mask(base: Tensor, height: int, width: int) -> Tensor:
    """The base mask enlarged position by position: 2^k blocks, clamped at the border."""
    factor = 1
    while base.shape[0] * factor * 2 <= height:
        factor *= 2
    mask = torch.zeros(height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            mask[i, j] = base[min(i // factor, base.shape[0] - 1), min(j // factor, base.shape[1] - 1)]
    return mask
