"""Forecasts under the rules that the paper's memory figures were measured with: torch 1.8 and the authors' layers.

To be used with `experiment=table1/...`, whose recipe has the moving average and float16 of the published runs. The
figures are in Table 1 of Fang et al., NeurIPS 2022. What differs from today:

- GELU runs in float32, so its input is saved as a float32 copy and its output is cast back.
- Attention is not fused: its weights exist, and are saved as float32 (softmax) and float16 (product with v).
- The gradients are zeroed, not freed, after a step, and DDP holds a second copy of them in its buckets.
- A step's images stay on the device until it ends; the optimizer updates one parameter at a time.
- ConvNeXt's norms over channels-first maps are written out operation by operation, and each saves its inputs.
- Under SBP a ViT's first norm and both projections of its attention, and the norm of a ConvNeXt's downsampling, run
  at all tokens with gradient; positions are gathered from and written to whole maps in each layer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sbp import convnext, masks, vit
from sbp.training.config.run import Config
from sbp.training.memory.allocations import CudaCasts
from sbp.training.memory.forecast import Rules
from sbp.training.models.build import build_model


class PaperCasts(CudaCasts):
    float32_inputs = CudaCasts.float32_inputs | {F.gelu}


class PaperRules(Rules):
    casts = PaperCasts
    foreach = False
    images_stay = True
    bytes_per_parameter = 4  # DDP's buckets

    def keeps_gradients(self, config: Config, micro_batch_size: int, world_size: int) -> bool:
        return True

    def build(self, config: Config) -> nn.Module:
        """The plain model with the authors' layers in place of timm's. Raises ValueError for what they do not have."""
        settings = config.sbp
        model = build_model(
            config.backbone, replace(settings, enabled=False), config.data.num_classes, config.data.image_size
        )
        if not isinstance(model, VisionTransformer | ConvNeXt):
            raise ValueError(f"rules=paper is for ViT and ConvNeXt, got backbone.name={config.backbone.name}")
        share = _kept_share(config) if settings.enabled else 1.0
        family: Any = vit if isinstance(model, VisionTransformer) else convnext
        backbone = family.find(model)
        sbp_layers = backbone.published if share < 1 else []
        for name, layer in backbone.layers.items():
            vars(layer)["share"] = share if name in sbp_layers else 1.0
        if isinstance(model, VisionTransformer):
            for block in model.blocks:
                block.attn.__class__ = PaperAttention
                block.__class__ = PaperBlock
        else:
            model.stem[1].__class__ = PaperChannelNorm
            for name, layer in backbone.layers.items():
                if isinstance(layer, ConvNeXtBlock):
                    layer.__class__ = PaperConvNeXtBlock if name in sbp_layers else ConvNeXtBlock
                elif sbp_layers:
                    layer.__class__ = PaperDownsample
                else:
                    layer[0].__class__ = PaperChannelNorm
        return model


PAPER = PaperRules()


def _kept_share(config: Config) -> float:
    """The share that the authors' masks keep. Their grid has whole diagonals only: 0.4, 0.5 and 0.6 all give 0.5."""
    settings = config.sbp
    fixed: dict[str, Any] = {"mhsa_drop": "qkv", "layers": None, "recompute": "none", "mask_per": "batch"}
    fixed |= {"rescale": False, "dropped": "none"}
    for key, value in fixed.items():
        if getattr(settings, key) != value:
            raise ValueError(f"rules=paper knows sbp.{key}={value} only, got {getattr(settings, key)}")
    if isinstance(settings.keep_ratio, list):
        raise ValueError("rules=paper takes one sbp.keep_ratio for all layers")
    ratio = masks.check_keep_ratio(settings.keep_ratio)
    if ratio == 1 or settings.mask == "random":
        return ratio
    return 1 / round(1 / ratio) if ratio <= 0.5 else 1 - 1 / round(1 / (1 - ratio))


def _split_positions(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices of the right number of kept and of dropped positions: which ones makes no difference to memory."""
    return torch.arange(count).tensor_split([round(share * count)])  # type: ignore[return-value]


def _through_kept(f: Callable[[Tensor], Tensor], x: Tensor, share: float) -> Tensor:
    """f on positions (B, N, C), with gradient at a share of them; results are written into a map of zeros."""
    if share == 1:
        return f(x)
    keep, drop = _split_positions(x.shape[1], share)
    kept = f(x.index_select(1, keep))
    out = kept.new_zeros(*x.shape[:2], kept.shape[2])
    out[:, keep] = kept  # unlike index_copy_, saves nothing but the index
    with torch.no_grad():
        out[:, drop] = f(x.index_select(1, drop))
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.matmul(q, k.mT).mul(scale)
    return torch.matmul(_Softmax.apply(weights), v)


class _Softmax(torch.autograd.Function):
    """float16 to float32; torch 1.8 saved the input beside the result, to know its dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch._softmax(x, -1, x.dtype == torch.float16)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, out = ctx.saved_tensors
        return torch._softmax_backward_data(grad, out, -1, x.dtype)


class PaperAttention(Attention):
    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:  # type: ignore[override]
        """x: (B, N, C), the class token first. Kept queries see kept keys; the others see all, without gradient."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = (qkv.select(0, i) for i in range(3))
        if share == 1:
            out = _attend(q, k, v, self.scale)
        else:
            keep, drop = _split_positions(tokens - 1, share)
            keep, drop = torch.cat([torch.zeros(1, dtype=keep.dtype), keep + 1]), drop + 1
            kept = _attend(q.index_select(2, keep), k.index_select(2, keep), v.index_select(2, keep), self.scale)
            out = kept.new_zeros(q.shape)
            out[:, :, keep] = kept
            with torch.no_grad():
                out[:, :, drop] = _attend(q.index_select(2, drop), k, v, self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))


class PaperBlock(Block):
    share: float

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.drop_path1(self.attn(self.norm1(x), self.share))
        return x + self.drop_path2(_through_kept(lambda tokens: self.mlp(self.norm2(tokens)), x, self.share))


class PaperConvNeXtBlock(ConvNeXtBlock):
    share: float

    def forward(self, x: Tensor) -> Tensor:
        positions = self.conv_dw(x).flatten(2).transpose(1, 2)
        y = _through_kept(lambda some: self.gamma * self.mlp(self.norm(some)), positions, self.share)
        return self.drop_path(y.transpose(1, 2).unflatten(2, x.shape[2:])) + x


class PaperDownsample(nn.Sequential):
    share: float

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) to (B, C', H / 2, W / 2): a norm at all pixels, then a linear layer on 2 x 2 patches."""
        norm: Any = self[0]
        conv: Any = self[1]
        height, width = x.shape[2] // 2, x.shape[3] // 2
        pixels = F.layer_norm(x.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        patches = (
            pixels.unflatten(1, (height, 2))
            .unflatten(3, (width, 2))
            .transpose(2, 3)
            .reshape(len(x), -1, 4 * x.shape[1])
        )
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        y = _through_kept(lambda some: F.linear(some, weight, conv.bias), patches, self.share)
        return y.transpose(1, 2).unflatten(2, (height, width)).contiguous()


class PaperChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). The mean is subtracted twice, as the result is not shared between the two uses."""
        mean = x.mean(1, keepdim=True)
        spread = torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight.view(-1, 1, 1) * ((x - mean) / spread) + self.bias.view(-1, 1, 1)
