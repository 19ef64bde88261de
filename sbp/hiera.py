"""SBP for timm's Hiera: the mask is one of mask units, squares of tokens that end as one token of the last stage.

Shapes: tokens (B, T * U, C) of U units with T tokens each. The unit is the faster index, in all stages, so that the
kept units alone are laid out like a smaller image. Pooling stays within a unit.

Where attention does, too (in the first stages), kept and dropped units do not see each other, and every `mhsa_drop` is
exact. Where it is global, `mhsa_drop` says what it drops.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn

from sbp.backbone import Backbone, blocks_of, only, require
from sbp.functional import Streams, join, rescale_gradient, split
from sbp.loops import LoopBlock, LoopState
from sbp.masks import Positions
from sbp.recompute import Function
from sbp.state import LayerMap, Shape
from sbp.tokens import Scales, add, drop_path_scale

SUPPORTED = "timm's Hiera (`HieraBlock`)"


def find(model: nn.Module) -> Backbone | None:
    """The Hiera in `model`, or None. Raises ValueError where SBP cannot train it."""
    found: Any = only(model, Hiera)
    if found is None:
        return None
    name, hiera = found
    layers = blocks_of(name, hiera)
    for layer, block in layers.items():
        require(layer, block, HieraBlock)
        require(f"{layer}.attn", block.attn, MaskUnitAttention)
        require(f"{layer}.mlp", block.mlp, Mlp)
    if hiera.patch_drop_rate:
        raise ValueError("patch_drop_rate must be 0: SBP masks a whole grid of mask units")
    if len(hiera.mask_spatial_shape) != 2:
        raise ValueError(f"SBP masks images; this Hiera takes mask units of {len(hiera.mask_spatial_shape)} dimensions")
    tokens, of_a_unit = hiera.mu_size, {}
    for layer, block in layers.items():
        of_a_unit[layer] = tokens
        tokens //= block.attn.q_stride  # type: ignore[union-attr, operator]
    second, third = (hiera.stage_ends[1], hiera.stage_ends[2]) if len(hiera.stage_ends) > 2 else (len(layers) - 1,) * 2
    return Backbone(
        layers=layers,
        published=list(layers)[: second + 1 + round((third - second) * 2 / 3)],
        hooks=[(hiera, "enter_model"), (hiera.patch_embed, "enter_patch_embed")],
        state=partial(
            HieraState, blocks=[*layers], kind=Hiera, units=tuple(hiera.mask_spatial_shape), of_a_unit=of_a_unit
        ),
        mhsa_drops=("qkv", "query", "qkv_exact"),
    )


class HieraState(LoopState):
    """Draws when the patch embedding receives images.

    units: (H, W) of the mask units. of_a_unit: how many tokens of a unit each block receives, by its name; each SBP
    layer, by its number, once this is made.
    """

    def __init__(self, *args: Any, units: tuple[int, int], of_a_unit: dict[str, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.units, self.of_a_unit = units, [of_a_unit[name] for name in self.layers]

    def enter_model(self, model: Any, args: tuple) -> None:
        """Forward pre-hook of the network. Its own forward looks at nothing between the blocks."""
        self.hands_on = self.has_own_loop(model) and self.may_hand_on(model)

    def enter_patch_embed(self, patch_embed: Any, args: tuple) -> None:
        """Forward pre-hook of the patch embedding. Images: (B, 3, height, width)."""
        images, hands_on = args[0], self.hands_on
        self.hands_on = False  # the next pass may come from elsewhere
        maps = (LayerMap(*self.units),) * len(self.layers)
        self.begin(Shape(self.units, maps, len(images), hands_on=hands_on), images.device)


class SBPHieraBlock(LoopBlock, HieraBlock):
    """timm's `HieraBlock`, which in training back-propagates its layers through kept units only.

    Where it pools, the layer on its shortcut is SBP, too: dropped units get no gradient by it, as in the downsampling
    layers of a ConvNeXt.
    """

    sbp_state: HieraState
    proj: Any

    def forward(self, x: Tensor | Streams) -> Tensor | Streams:  # type: ignore[override]
        """x: tokens (B, T * U, C) or the streams of them."""
        return self.sbp_forward(x, partial(super().forward, x))  # type: ignore[arg-type]

    def sbp_split(self, x: Tensor, where: Positions) -> Streams:
        assert self.sbp_index is not None
        units, tokens = where.keep.shape[-1] + where.drop.shape[-1], self.sbp_state.of_a_unit[self.sbp_index]
        if x.shape[1] != units * tokens:
            raise ValueError(
                f"an SBP block got {x.shape[1]} tokens, but its mask is for {units} units of {tokens}: in training it "
                "takes neither a `mask` nor images of another size"
            )
        return split(x, *_tokens_of(where, tokens))

    def sbp_join(self, streams: Streams, where: Positions) -> Tensor:
        return join(streams, *_tokens_of(where, streams.kept.shape[1] // where.keep.shape[-1]))

    def sbp_reads_dropped_again(self) -> bool:
        """As of a `TokenBlock`: attention within units reads no others."""
        return self.sbp_state.settings.mhsa_drop != "qkv" and not self.attn.use_mask_unit_attn

    def _branches(  # type: ignore[override]
        self,
        kept: Tensor,
        dropped: Tensor | None,
        read: None,
        key: None,
        scale: Scales,
        places: Any,
        scales: tuple[Tensor | None, Tensor | None] | None = None,
        again: bool = False,
    ) -> Streams:
        """As `TokenBlock._branches`."""
        method, within = self.sbp_state.settings.mhsa_drop, self.attn.use_mask_unit_attn
        to_shortcut, to_qkv, project, mlp = self.sbp_shortcut(), self.sbp_qkv(), self.sbp_projection(), self.sbp_mlp()
        q, k, v = to_qkv(kept)
        if dropped is not None:
            with nullcontext() if method == "query" and not within else torch.no_grad():
                q_dropped, k_dropped, v_dropped = to_qkv(dropped)
            if not within:
                with torch.no_grad() if method == "qkv" else nullcontext():
                    k_dropped, v_dropped = torch.cat([k, k_dropped], 2), torch.cat([v, v_dropped], 2)
                k, v = (k, v) if method == "qkv" else (k_dropped, v_dropped)
        branch = rescale_gradient(project(F.scaled_dot_product_attention(q, k, v), len(kept)), scale[0])
        scale1 = drop_path_scale(self.drop_path1, kept) if scales is None else scales[0]
        shortcut = kept if to_shortcut is None else rescale_gradient(to_shortcut(kept), scale[0])
        kept = add(shortcut, branch, scale1)
        branch = rescale_gradient(mlp(kept), scale[1])
        scale2 = drop_path_scale(self.drop_path2, kept) if scales is None else scales[1]
        kept = add(kept, branch, scale2)
        if dropped is None or again:
            return Streams(kept, None)
        with torch.no_grad():
            out = F.scaled_dot_product_attention(q_dropped, k_dropped, v_dropped)
            branch = project(out, len(dropped))
            shortcut = dropped if to_shortcut is None else to_shortcut(dropped)
        dropped = add(dropped if to_shortcut is None else shortcut, branch, scale1)
        with torch.no_grad():
            branch = mlp(dropped)
        return Streams(kept, add(dropped, branch, scale2))

    def sbp_shortcut(self) -> Function | None:
        """Where the block pools: from tokens (B, n, C) to its shortcut, (B, n / stride, C')."""
        if not self.do_expand:
            return None
        stride = self.attn.q_stride
        if self.proj is not None:
            project = self.sbp_linear(self.proj, self.norm1)
            return lambda tokens: project(tokens).unflatten(1, (stride, -1)).amax(1)

        def pool(tokens: Tensor) -> Tensor:
            apart = tokens.unflatten(1, (stride, -1))
            return torch.cat([apart.amax(1), apart.mean(1)], -1)

        return pool

    def sbp_qkv(self) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """From tokens (B, n, C) to queries, pooled where the block pools, keys and values.

        Each (B, h, n, d); of attention within units (B * units, h, tokens, d), as if the units were images.
        """
        attn = self.attn
        to_qkv = self.sbp_linear(attn.qkv, self.norm1)

        def heads(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            units = tokens.shape[1] // (attn.q_stride * attn.window_size) if attn.use_mask_unit_attn else 1
            qkv = to_qkv(tokens).unflatten(2, (3, attn.heads, -1)).unflatten(1, (-1, units))  # (B, n, units, 3, h, d)
            q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).contiguous().unbind(0)
            if attn.q_stride > 1:
                q = q.unflatten(2, (attn.q_stride, -1)).amax(2)
            return q, k, v

        return heads

    def sbp_projection(self) -> Callable[[Tensor, int], Tensor]:
        """From attention output and the number of images to the branch (B, n, C')."""
        project = self.sbp_linear(self.attn.proj, scale=self.sbp_layer_scale(1))

        def to_branch(out: Tensor, images: int) -> Tensor:
            out = out.unflatten(0, (images, -1))  # (B, units, h, n, d)
            return project(out.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2))

        return to_branch


def _tokens_of(where: Positions, tokens: int) -> Positions:
    """The tokens (..., T * K) and (..., T * D) of units (..., K) and (..., D), the unit as the faster index."""
    units = where.keep.shape[-1] + where.drop.shape[-1]
    first = units * torch.arange(tokens, device=where.keep.device)[:, None]
    return Positions(*((index[..., None, :] + first).flatten(-2) for index in where))


SBP_CLASSES = {HieraBlock: SBPHieraBlock}
