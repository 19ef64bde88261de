"""SBP for timm's plain vision transformers (ViT, DeiT): `Block` with `Attention`.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels,
h heads of d channels. A prefix token (class, register) is always kept.

The tokens are split once, in front of the first SBP block, into a kept and a dropped stream; every block runs
on both, and they are joined once after the last SBP block. No block gathers or scatters.
"""

from collections.abc import Callable
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
from sbp.state import Grid, LayerMap, Shape, State

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

    def enter_model(self, model: Any, args: tuple) -> None:
        """Forward pre-hook of the transformer: unlike forward_features, forward reads pooled tokens only."""
        self.plain_forward = _reads_prefix_only(model) and self.never_regrows(model.blocks)

    def never_regrows(self, blocks: nn.Sequential) -> bool:
        """Whether no block sees a token again that one before it dropped."""
        ratios = [
            (self.keep_ratios[block.sbp_index] if self.fixed is None else 0.5) if isinstance(block, SBPBlock) else 1.0
            for block in blocks
        ]
        return all(after <= before for before, after in pairwise(ratios))

    def enter_patch_embed(self, patch_embed: Any, args: tuple) -> None:
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
        maps = (LayerMap(height, width),) * len(self.layers)
        self.begin(Shape((height, width), maps, plain_forward and self.mhsa_drop == "qkv"), images.device)


class SBPBlock(Block):
    """timm's `Block`, which in training back-propagates its two branches through kept tokens only."""

    sbp_state: ViTState
    sbp_index: int
    attn: Any  # with timm's own attributes, which torch's types do not know
    mlp: nn.Module

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
        streams = split_tokens(x, where)
        if self.sbp_state.running.shape.prefix_only:  # nothing reads dropped tokens: they pass by
            streams = Streams(self.run(Streams(streams.kept, None)).kept, streams.dropped)
        else:
            streams = self.run(streams)
        out = join(streams, *where)
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

    def forward(self, x: Any) -> Tensor:
        """x: tokens (B, N, C), and between SBP blocks the streams of them."""
        where = [block.sbp_positions() if isinstance(block, SBPBlock) else None for block in self]
        state = next((block.sbp_state for block in self if isinstance(block, SBPBlock)), None)
        if state is None or not any(where):
            return super().forward(x)
        skip_dropped = state.running.shape.prefix_only
        current: Positions | None = None
        for block, wanted in zip(self, where, strict=True):
            if wanted is not current:
                if current is not None:
                    x = join(x, *current)
                if wanted is not None:
                    x = split_tokens(x, wanted)
                    x = Streams(x.kept, None) if skip_dropped else x
                current = wanted
            x = block(x)
        if current is not None:
            x = x.kept if skip_dropped else join(x, *current)
        state.watch(x)
        return x


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
    kept, dropped = block.norm1(x.kept), block.norm1(x.dropped)
    return _attend_to_all(block, kept, dropped, _qkv(block.attn, kept), _qkv(block.attn, dropped))


def _attend_to_detached(block: SBPBlock, x: Streams) -> Streams:
    """qkv_exact: every query sees all keys and values; those of dropped tokens give no gradient."""
    kept = block.norm1(x.kept)
    kept_qkv = _qkv(block.attn, kept)
    with torch.no_grad():
        dropped = block.norm1(x.dropped)
        dropped_qkv = _qkv(block.attn, dropped)
    return _attend_to_all(block, kept, dropped, kept_qkv, dropped_qkv)


def _attend_to_all(block: SBPBlock, kept: Tensor, dropped: Tensor, kept_qkv: QKV, dropped_qkv: QKV) -> Streams:
    """From normed tokens of both streams and their queries, keys and values."""
    attn = block.attn
    (q, *_), (q_dropped, *_) = kept_qkv, dropped_qkv
    k, v = (torch.cat(pair, 2) for pair in zip(kept_qkv[1:], dropped_qkv[1:], strict=True))
    q = q.clone()  # what is saved for backward must not be a view that keeps the other two alive
    out = block.ls1(_project(attn, _attention(attn, q, k, v), kept))
    with torch.no_grad():
        return Streams(out, block.ls1(_project(attn, _attention(attn, q_dropped, k, v), dropped)))


def _attend_with_some_heads(block: SBPBlock, x: Streams) -> Streams:
    """head: some heads run with gradient at all tokens, the others without; the projection's bias keeps its own."""
    attn, state = block.attn, block.sbp_state
    count = kept_heads(attn.num_heads, state.keep_ratios[block.sbp_index])
    order = torch.argsort(masks.hashed_scores(state.running.key, attn.num_heads, stream=1 + block.sbp_index))
    assert x.dropped is not None  # only "qkv" skips it
    tokens = block.norm1(torch.cat([x.kept, x.dropped], 1))  # (B, P + K + D, C)
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


def _qkv(attn: Any, x: Tensor) -> QKV:
    """Normed tokens (B, n, C) to q, k and v, each (B, h, n, d)."""
    qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)


def _project(attn: Any, out: Tensor, normed: Tensor) -> Tensor:
    """Attention output (B, h, n, d) and its normed tokens (B, n, C) to (B, n, C)."""
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(normed).sigmoid()
    return attn.proj_drop(attn.proj(out))


# -- small parts


def _add(x: Streams, branch: Streams, drop_path: nn.Module) -> Streams:
    """The residual addition, with one drop-path decision for an image's kept and dropped tokens."""
    kept, dropped = branch
    if not isinstance(drop_path, nn.Identity):
        scale = drop_path(kept.new_ones(len(kept), 1, 1))
        kept, dropped = kept * scale, None if dropped is None else dropped * scale
    if x.dropped is None or dropped is None:
        return Streams(x.kept + kept, None)
    return Streams(x.kept + kept, x.dropped + dropped)


def _reads_prefix_only(model: Any) -> bool:
    """Whether the head of this transformer reads the class (and distillation) token and nothing else."""
    return (
        type(model) in (VisionTransformer, VisionTransformerDistilled)
        and model.attn_pool is None
        and model.global_pool == "token"
        and model.num_prefix_tokens > 0
    )


def _patch_size(patch_embed: Any) -> Grid:
    ratio = patch_embed.feat_ratio(as_scalar=False)
    return ratio if isinstance(ratio, tuple) else (ratio, ratio)


SBP_CLASSES = {Block: SBPBlock, nn.Sequential: SBPBlocks}
