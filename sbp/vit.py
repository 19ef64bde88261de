"""SBP for timm's plain vision transformers (ViT, DeiT): `Block` with `Attention`.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels,
h heads of d channels. A prefix token (class, register) is always kept.

The tokens are split once, in front of the first SBP block, into a kept and a dropped stream; every block runs
on both, and they are joined once after the last SBP block. No block gathers or scatters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sbp import masks
from sbp.backbone import Backbone, only
from sbp.functional import Streams, join, kept_gradient, split
from sbp.masks import Positions
from sbp.state import Grid, LayerMap, State

SUPPORTED = "timm's ViT and DeiT (`Block` with `Attention` and a position-wise MLP)"
QKV = tuple[Tensor, Tensor, Tensor]
MHSA_DROPS = ("qkv", "query", "head", "qkv_exact")


def find(model: nn.Module) -> Backbone | None:
    """The vision transformer in `model`, or None. Raises ValueError where SBP cannot train it."""
    transformer = only(model, VisionTransformer)
    if transformer is None:
        return None
    name, vit = transformer
    name = f"{name}." if name else ""
    layers = {f"{name}blocks.{i}": block for i, block in enumerate(vit.blocks)}
    for layer, block in layers.items():
        if type(block) is not Block or type(block.attn) is not Attention:
            kind = type(getattr(block, "attn", block))
            raise ValueError(f"{layer} has {kind.__name__}; SBP knows {SUPPORTED}")
        if type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
            raise ValueError(f"{layer} has {type(block.mlp).__name__}, which is not known to be position-wise")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError("patch_drop_rate must be 0: SBP masks a whole grid of tokens")
    return Backbone(
        layers=layers,
        published=list(layers)[len(layers) - round(len(layers) * 2 / 3) :],
        containers=[vit.blocks],
        hooks=[(vit, "enter_model"), (vit.patch_embed, "enter_patch_embed")],
        state=partial(_state, layers, prefix=vit.num_prefix_tokens),
    )


def _state(blocks: dict[str, nn.Module], names: list[str], *args: Any, **kwargs: Any) -> "ViTState":
    for name in names if kwargs["mhsa_drop"] == "head" else []:
        attn = blocks[name].attn
        if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
            raise ValueError(f"mhsa_drop='head' needs heads that do not mix before the projection; see {name}.attn")
    return ViTState(names, *args, **kwargs)


class ViTState(State):
    """Draws when the patch embedding receives images, and knows which token the loss will read."""

    plain_forward = False

    def enter_model(self, model: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the transformer: unlike forward_features, forward reads pooled tokens only."""
        self.plain_forward = _reads_prefix_only(model)

    def enter_patch_embed(self, patch_embed: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the patch embedding. Images: (B, 3, height, width)."""
        (images,) = args
        plain_forward, self.plain_forward = self.plain_forward, False
        height, width = patch_embed.dynamic_feat_size(images.shape[-2:])
        patch_height, patch_width = _patch_size(patch_embed)
        whole = (height * patch_height, width * patch_width) == tuple(images.shape[-2:])
        if not (height and width) or not (whole or getattr(patch_embed, "dynamic_img_pad", False)):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels leave no whole grid of "
                f"{patch_height} x {patch_width} patches"
            )
        maps = [LayerMap(height, width)] * len(self.layers)
        self.begin((height, width), maps, images.device, prefix_only=plain_forward and self.mhsa_drop == "qkv")


class SBPBlock(Block):
    """timm's `Block`, which in training back-propagates its two branches through kept tokens only."""

    sbp_state: ViTState
    sbp_index: int

    def sbp_positions(self) -> Positions | None:
        return self.sbp_state.positions(self, self.sbp_index)

    def forward(  # type: ignore[override]
        self, x: Tensor | Streams, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | Streams:
        """x: tokens (B, N, C), or the two streams of them from `SBPBlocks`; returns the same kind."""
        if isinstance(x, Streams):
            return self.run(x)
        where = self.sbp_positions()
        if where is None:
            return super().forward(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise ValueError("SBP blocks take no attn_mask or is_causal in training")
        out = join(self.run(split_tokens(x, where)), *where)
        self.sbp_state.watch(out)
        return out

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)

    def run(self, x: Streams) -> Streams:
        x = _add(x, _ATTENTION[self.sbp_state.mhsa_drop](self, x), self.drop_path1)
        return _add(x, kept_gradient(lambda tokens: self.ls2(self.mlp(self.norm2(tokens))), x), self.drop_path2)


class SBPBlocks(nn.Sequential):
    """The container of a transformer's blocks: splits before the first SBP block, joins after the last.

    timm also calls the blocks one by one (checkpointing, forward_intermediates); each then splits for itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        where = [block.sbp_positions() if isinstance(block, SBPBlock) else None for block in self]
        if not any(where):
            return super().forward(x)
        state = next(block.sbp_state for block in self if isinstance(block, SBPBlock))
        skip_dropped = state.current.prefix_only and _never_regrows(where)
        current: Positions | None = None
        streams: Tensor | Streams = x
        for block, wanted in zip(self, where, strict=True):
            if wanted is not current:
                if current is not None:
                    streams = join(streams, *current)
                if wanted is not None:
                    streams = split_tokens(streams, wanted)
                    if skip_dropped:
                        streams = Streams(streams.kept, None)
                current = wanted
            streams = block(streams)
        if current is not None:
            streams = streams.kept if skip_dropped else join(streams, *current)
        state.watch(streams)
        return streams


def split_tokens(x: Tensor, where: Positions) -> Streams:
    """Tokens (B, N, C) to streams (B, P + K, C) and (B, D, C)."""
    tokens = len(where.keep) + len(where.drop)
    if x.shape[1] != tokens:
        raise ValueError(f"an SBP block got {x.shape[1]} tokens, but its mask is for {tokens}")
    return split(x, *where)


# -- attention branches: norm, attention, layer scale of both streams


def _attend_kept(block: SBPBlock, x: Streams) -> Streams:
    """qkv: kept queries see kept keys and values; dropped queries see all, without gradient."""
    attn = block.attn
    normed = block.norm1(x.kept)
    q, k, v = _qkv(attn, normed)
    kept = block.ls1(_project(attn, _attention(attn, q, k, v), normed))
    if x.dropped is None:
        return Streams(kept, None)
    with torch.no_grad():
        normed = block.norm1(x.dropped)
        q, k_dropped, v_dropped = _qkv(attn, normed)
        k, v = torch.cat([k, k_dropped], 2), torch.cat([v, v_dropped], 2)
        return Streams(kept, block.ls1(_project(attn, _attention(attn, q, k, v), normed)))


def _attend_from_kept(block: SBPBlock, x: Streams) -> Streams:
    """query: kept queries see all keys and values, with gradient; dropped queries give none."""
    normed = Streams(block.norm1(x.kept), block.norm1(x.dropped))
    return _attend_to_all(block, normed, _qkv(block.attn, normed.kept), _qkv(block.attn, normed.dropped))


def _attend_to_detached(block: SBPBlock, x: Streams) -> Streams:
    """qkv_exact: every query sees all keys and values; those of dropped tokens give no gradient."""
    normed = kept_gradient(block.norm1, x)
    kept = _qkv(block.attn, normed.kept)
    with torch.no_grad():
        dropped = _qkv(block.attn, normed.dropped)
    return _attend_to_all(block, normed, kept, dropped)


def _attend_to_all(block: SBPBlock, normed: Streams, kept: QKV, dropped: QKV) -> Streams:
    attn = block.attn
    k, v = torch.cat([kept[1], dropped[1]], 2), torch.cat([kept[2], dropped[2]], 2)
    q = kept[0].clone()  # what is saved for backward must not be a view that keeps the other two alive
    out = block.ls1(_project(attn, _attention(attn, q, k, v), normed.kept))
    with torch.no_grad():
        return Streams(out, block.ls1(_project(attn, _attention(attn, dropped[0], k, v), normed.dropped)))


def _attend_with_some_heads(block: SBPBlock, x: Streams) -> Streams:
    """head: some heads run with gradient at all tokens, the others without; the projection's bias keeps its own."""
    attn, state = block.attn, block.sbp_state
    count = kept_heads(attn.num_heads, state.keep_ratios[block.sbp_index])
    order = torch.argsort(masks.hashed_scores(state.current.key, attn.num_heads, stream=1 + block.sbp_index))
    tokens = block.norm1(torch.cat(x, 1))  # (B, P + K + D, C)
    weight = attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))  # (3, h, d, C)
    bias = None if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (3, attn.num_heads, -1))
    proj = attn.proj.weight.unflatten(1, (attn.num_heads, -1))  # (C, h, d)

    def run(tokens: Tensor, heads: Tensor) -> Tensor:
        w = weight.index_select(1, heads).flatten(0, 2)
        b = None if bias is None else bias.index_select(1, heads).flatten()
        qkv = F.linear(tokens, w, b).unflatten(2, (3, len(heads), -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = _attention(attn, attn.q_norm(q), attn.k_norm(k), v).transpose(1, 2).flatten(2)
        return F.linear(out, proj.index_select(1, heads).flatten(1))

    out = run(tokens, order[:count])
    if count < attn.num_heads:
        with torch.no_grad():
            rest = run(tokens, order[count:])
        out = out + rest
    if attn.proj.bias is not None:
        out = out + attn.proj.bias.to(out.dtype)
    out = block.ls1(attn.proj_drop(out))
    return Streams(*out.split([x.kept.shape[1], x.dropped.shape[1]], 1))


_ATTENTION: dict[str, Callable[[SBPBlock, Streams], Streams]] = {
    "qkv": _attend_kept,
    "qkv_exact": _attend_to_detached,
    "query": _attend_from_kept,
    "head": _attend_with_some_heads,
}


def kept_heads(num_heads: int, keep_ratio: float) -> int:
    """How many heads run with gradient under mhsa_drop="head"."""
    return max(1, round(keep_ratio * num_heads))


def _qkv(attn: Attention, x: Tensor) -> QKV:
    """Normed tokens (B, n, C) to q, k and v, each (B, h, n, d)."""
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _attention(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)


def _project(attn: Attention, out: Tensor, normed: Tensor) -> Tensor:
    """Attention output (B, h, n, d) and its normed tokens (B, n, C) to (B, n, C)."""
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(normed).sigmoid()
    return attn.proj_drop(attn.proj(out))


# -- small parts


def _add(x: Streams, branch: Streams, drop_path: nn.Module) -> Streams:
    """The residual addition, with one drop-path decision for an image's kept and dropped tokens."""
    if isinstance(drop_path, nn.Identity):
        scale = None
    else:
        scale = drop_path(branch.kept.new_ones(len(branch.kept), 1, 1))
    sums = [
        None if one is None else one + (branched if scale is None else branched * scale)
        for one, branched in zip(x, branch, strict=True)
    ]
    return Streams(*sums)


def _never_regrows(where: Sequence[Positions | None]) -> bool:
    """Whether, from the first SBP block on, no block sees a token again that one before it dropped."""
    kept = [None if one is None else len(one.keep) for one in where]
    first = next(i for i, count in enumerate(kept) if count is not None)
    tail = kept[first:]
    return None not in tail and all(after <= before for before, after in pairwise(tail))


def _reads_prefix_only(model: nn.Module) -> bool:
    """Whether the head of this transformer reads the class (and distillation) token and nothing else."""
    return (
        type(model) in (VisionTransformer, VisionTransformerDistilled)
        and model.attn_pool is None
        and model.global_pool == "token"
        and model.num_prefix_tokens > 0
    )


def _patch_size(patch_embed: nn.Module) -> Grid:
    ratio = patch_embed.feat_ratio(as_scalar=False)
    return ratio if isinstance(ratio, tuple) else (ratio, ratio)


SBP_CLASSES = {Block: SBPBlock, nn.Sequential: SBPBlocks}
