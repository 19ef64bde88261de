"""SBP for timm's plain vision transformers (ViT, DeiT): `Block` with `Attention`.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels,
h heads of d channels. A prefix token (class, register) is always kept.

The tokens are split once, in front of the first SBP block, into a kept and a dropped stream; every block runs
on both, and they are joined once after the last SBP block. No block gathers or scatters.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sbp import input_gradient, masks, recompute
from sbp.backbone import Backbone, only
from sbp.functional import Streams, join, rescale_gradient, split
from sbp.masks import Positions
from sbp.recompute import Function
from sbp.settings import Settings
from sbp.state import Grid, LayerMap, Shape, State

SUPPORTED = "timm's ViT and DeiT (`Block` with `Attention` and a position-wise MLP)"
QKV = tuple[Tensor, Tensor, Tensor]
Scales = tuple[float, float]  # of the attention's branch and of the MLP's
Branch = tuple[Tensor, Callable[[], Tensor]]  # of the kept tokens; and of the dropped ones, computed when called


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
        state=partial(_state, vit, layers, prefix=vit.num_prefix_tokens),
    )


def _state(
    vit: Any,
    blocks: dict[str, nn.Module],
    names: list[str],
    keep_ratios: list[float],
    settings: Settings,
    **kwargs: Any,
) -> "ViTState":
    if settings.dropped == "input":
        _check_input_gradient(vit, {name: blocks[name] for name in names}, settings)
    for name in names if settings.mhsa_drop == "head" else []:
        attn = blocks[name].attn
        if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
            raise ValueError(f"mhsa_drop='head' needs heads that do not mix before the projection; see {name}.attn")
    return ViTState(names, keep_ratios, settings, **kwargs)


def _check_input_gradient(vit: Any, blocks: dict[str, Any], settings: Settings) -> None:
    if settings.mhsa_drop == "qkv" and _reads_prefix_only(vit):
        raise ValueError("dropped='input' changes nothing here: with qkv a class token never reads dropped tokens")
    for name, block in blocks.items():
        mlp = block.mlp
        parts = (mlp.drop1, mlp.norm, mlp.drop2) if type(mlp) is Mlp else (mlp,)
        obstacle = input_gradient.obstacle(block.norm2, getattr(mlp, "act", None), *parts)
        if obstacle is not None:
            raise ValueError(f"dropped='input' does not know {obstacle}, which {name} has")


class ViTState(State):
    """Draws when the patch embedding receives images, and knows which token the loss will read."""

    prefix_only = False
    skips_dropped = False

    def enter_model(self, model: Any, args: tuple) -> None:
        """Forward pre-hook of the transformer: unlike forward_features, forward reads pooled tokens only."""
        self.prefix_only = _reads_prefix_only(model)
        self.skips_dropped = self.prefix_only and self.settings.mhsa_drop == "qkv" and self.never_regrows(model.blocks)

    def never_regrows(self, blocks: nn.Sequential) -> bool:
        """Whether no block sees a token again that one before it dropped."""
        indices = [getattr(block, "sbp_index", None) for block in blocks]
        ratios = [1.0 if i is None else self.keep_ratios[i] if self.fixed is None else 0.5 for i in indices]
        return all(after <= before for before, after in pairwise(ratios))

    def enter_patch_embed(self, patch_embed: Any, args: tuple) -> None:
        """Forward pre-hook of the patch embedding. Images: (B, 3, height, width)."""
        (images,) = args
        reading = self.prefix_only, self.skips_dropped
        self.prefix_only = self.skips_dropped = False  # the next pass may come from elsewhere
        height, width = patch_embed.dynamic_feat_size(images.shape[-2:])
        patch_height, patch_width = _patch_size(patch_embed)
        whole = (height * patch_height, width * patch_width) == tuple(images.shape[-2:])
        if not (height and width) or not (whole or getattr(patch_embed, "dynamic_img_pad", False)):
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels leave no whole grid of "
                f"{patch_height} x {patch_width} patches"
            )
        maps = (LayerMap(height, width),) * len(self.layers)
        self.begin(Shape((height, width), maps, len(images), *reading), images.device)


class SBPBlock(Block):
    """timm's `Block`, which in training back-propagates its two branches through kept tokens only.

    sbp_index: which SBP layer it is; None for one that keeps all tokens and only recomputes.
    """

    sbp_compiled_method = "run"
    sbp_state: ViTState
    sbp_index: int | None
    attn: Any  # with timm's own attributes, which torch's types do not know
    mlp: Any

    def forward(  # type: ignore[override]
        self, x: Tensor | Streams, attn_mask: Tensor | None = None, is_causal: bool = False, prefix_only: bool = False
    ) -> Tensor | Streams:
        """x: tokens (B, N, C), or the two streams of them from `SBPBlocks`; returns the same kind.

        prefix_only: return prefix tokens alone, as nothing reads the others (streams only).
        """
        if isinstance(x, Streams):
            return self.run(x, prefix_only, self.sbp_scale())
        masked = attn_mask is not None or is_causal
        where = self.sbp_positions()
        if where is None:
            compiled = "run" in vars(self)
            if masked or not self.training or (self.sbp_state.recomputes(self) == "none" and not compiled):
                return super().forward(x, attn_mask, is_causal)
            return self.run(Streams(x, None)).kept
        scale = self.sbp_scale()
        if masked:
            raise ValueError("SBP blocks take no attn_mask or is_causal in training")
        streams = split_tokens(x, where)
        if self.sbp_state.running.shape.skips_dropped:  # nothing reads dropped tokens: they pass by
            streams = Streams(self.run(Streams(streams.kept, None), scale=scale).kept, streams.dropped)
        else:
            streams = self.run(streams, scale=scale)
        out = join(streams, *where)
        self.sbp_state.watch(out)
        return out

    def sbp_positions(self) -> Positions | None:
        return self.sbp_state.positions(self, self.sbp_index)

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)

    def sbp_scale(self) -> Scales:
        state, index = self.sbp_state, self.sbp_index
        return state.gradient_scale(self, index), state.pointwise_scale(self, index)

    def run(self, x: Streams, prefix_only: bool = False, scale: Scales = (1.0, 1.0)) -> Streams:
        """forward, of streams. scale: of the gradient that enters the two branches at kept tokens."""
        state = self.sbp_state
        branches = partial(  # all of the pass is read here: when a block runs again it may not be the last one any more
            self._branches,
            read=state.prefix if prefix_only else None,
            key=state.running.key if state.settings.mhsa_drop == "head" and x.dropped is not None else None,
            scale=scale,
        )
        if state.recomputes(self) != "block":
            return branches(*x)
        if recompute.has_dropout(self):
            return recompute.block(branches, *x, random=True)
        # Drawn outside, as a captured graph cannot set its generator back.
        scales = tuple(_drop_path_scale(one, x.kept) for one in (self.drop_path1, self.drop_path2))
        return recompute.block(partial(branches, scales=scales), *x, random=False)

    def _branches(
        self,
        kept: Tensor,
        dropped: Tensor | None,
        read: int | None,
        key: Tensor | None,
        scale: Scales,
        scales: tuple[Tensor | None, Tensor | None] | None = None,
        again: bool = False,
    ) -> Streams:
        """read: how many of the kept tokens are wanted, None for all. again: the values of dropped ones are not.

        key: the random number that some heads are drawn by; None where all run. scale: of the gradient that enters
        the branches at kept tokens but prefix tokens. scales: the drop paths' decisions; None where they are still to
        be made.

        The kept stream runs to its end first: what draws random numbers for it, such as dropout, then draws the
        same ones whether or not the dropped stream follows.
        """
        again = again and not self.sbp_state.passes_input
        if self.sbp_state.settings.mhsa_drop == "qkv" and (again or read is not None):
            dropped = None
        if key is None:
            branch, dropped_branch = _attend(self, Streams(kept, dropped), read)
            branch = rescale_gradient(branch, scale[0], self.sbp_state.prefix)
        else:
            branch, dropped_branch = _attend_with_some_heads(self, Streams(kept, dropped), read, key)
        scale1 = _drop_path_scale(self.drop_path1, kept) if scales is None else scales[0]
        kept = _add(kept[:, :read], branch, scale1)
        passes_input = dropped is not None and self.sbp_state.passes_input
        mlp, dropped_mlp = self.sbp_mlp(passes_input)
        # What is rescaled is for the weights.
        within = rescale_gradient(kept, 1 / scale[1], self.sbp_state.prefix) if passes_input else kept
        branch = rescale_gradient(mlp(within), scale[1], self.sbp_state.prefix)
        scale2 = _drop_path_scale(self.drop_path2, kept) if scales is None else scales[1]
        kept = _add(kept, branch, scale2)
        if dropped is None or read is not None or (again and key is None):
            return Streams(kept, None)
        dropped = _add(dropped, dropped_branch(), scale1)
        return Streams(kept, _add(dropped, dropped_mlp(dropped), scale2))

    def sbp_linear(self, layer: nn.Module, *before: nn.Module, scale: Tensor | None = None) -> Function:
        return recompute.linear(layer, *before, cheap=self.sbp_state.recomputes(self) == "cheap", scale=scale)

    def sbp_mlp(self, passes_input: bool) -> tuple[Function, Function]:
        """Norm, MLP and layer scale: of kept tokens; of dropped ones, without gradient or with that of the input."""
        mlp = self.mlp
        gamma = getattr(self.ls2, "gamma", None)
        if type(mlp) is not Mlp:
            return _without_gradient(lambda tokens: self.ls2(mlp(self.norm2(tokens))))
        into: Any = mlp.fc1
        out_of: Any = mlp.fc2
        if passes_input:
            into, out_of, gamma = recompute.weights(into), recompute.weights(out_of, gamma), None
        up = self.sbp_linear(into, self.norm2)
        down = self.sbp_linear(out_of, mlp.act, mlp.drop1, mlp.norm, scale=gamma)
        run = _without_gradient(lambda tokens: mlp.drop2(down(up(tokens))))
        if not passes_input:
            return run
        return run[0], lambda tokens: input_gradient.branch(tokens, self.norm2, into, mlp.act, out_of)


class SBPBlocks(nn.Sequential):
    """The container of a transformer's blocks: splits before the first SBP block, joins after the last.

    timm also calls the blocks one by one (checkpointing, forward_intermediates); each then splits for itself.
    """

    def forward(self, x: Any) -> Tensor:
        """x: tokens (B, N, C), and between SBP blocks the streams of them.

        Returns (B, N, C); of a model whose loss reads prefix tokens only the kept ones, or those alone.
        """
        where = [block.sbp_positions() if isinstance(block, SBPBlock) else None for block in self]
        state = next((block.sbp_state for block in self if isinstance(block, SBPBlock)), None)
        if state is None or not any(where):
            return super().forward(x)
        shape = state.running.shape
        current: Positions | None = None
        for block, wanted in zip(self, where, strict=True):
            if wanted is not current:
                if current is not None:
                    x = join(x, *current)
                if wanted is not None:
                    x = split_tokens(x, wanted)
                    x = Streams(x.kept, None) if shape.skips_dropped else x
                current = wanted
            last = shape.prefix_only and current is not None and block is self[-1]
            x = block(x, prefix_only=True) if last else block(x)
        if current is not None:
            x = x.kept if shape.prefix_only else join(x, *current)
        state.watch(x)
        return x


def split_tokens(x: Tensor, where: Positions) -> Streams:
    """Tokens (B, N, C) to streams (B, P + K, C) and (B, D, C)."""
    tokens = where.keep.shape[-1] + where.drop.shape[-1]
    if x.shape[1] != tokens:
        raise ValueError(f"an SBP block got {x.shape[1]} tokens, but its mask is for {tokens}")
    return split(x, *where)


# -- attention branches: norm, attention, layer scale of both streams


def _attend(block: SBPBlock, x: Streams, read: int | None) -> Branch:
    """qkv: kept queries see kept keys and values; dropped queries see all, without gradient.

    query: kept queries see all keys and values, with gradient; dropped queries give none.
    qkv_exact: every query sees all keys and values; those of dropped tokens give no gradient.
    """
    attn, method = block.attn, block.sbp_state.settings.mhsa_drop
    to_qkv = block.sbp_linear(attn.qkv, block.norm1)
    project = _projection(block)
    q, k, v = _heads(attn, to_qkv(x.kept))
    dropped = x.dropped
    if dropped is not None:
        with nullcontext() if method == "query" else torch.no_grad():
            q_dropped, k_dropped, v_dropped = _heads(attn, to_qkv(dropped))
        with torch.no_grad() if method == "qkv" else nullcontext():
            all_k, all_v = torch.cat([k, k_dropped], 2), torch.cat([v, v_dropped], 2)
        if method != "qkv":
            q = q[:, :, :read].clone()  # what is saved must not be a view that keeps the other two alive
            k, v = all_k, all_v

    def dropped_branch() -> Tensor:
        assert dropped is not None
        with torch.no_grad():
            return project(_attention(attn, q_dropped, all_k, all_v), dropped)

    return project(_attention(attn, q[:, :, :read], k, v), x.kept[:, :read]), dropped_branch


def _attend_with_some_heads(block: SBPBlock, x: Streams, read: int | None, key: Tensor) -> Branch:
    """head: some heads run with gradient at all tokens, the others without; the projection's bias keeps its own."""
    attn, state, index = block.attn, block.sbp_state, block.sbp_index
    assert index is not None and x.dropped is not None  # only "qkv" skips it
    count = kept_heads(attn.num_heads, state.keep_ratios[index])
    order = torch.argsort(masks.hashed_scores(key, attn.num_heads, stream=1 + index))
    tokens = block.norm1(torch.cat([x.kept, x.dropped], 1))  # (B, P + K + D, C)
    weight = attn.qkv.weight.unflatten(0, (3, attn.num_heads, -1))  # (3, h, d, C)
    bias = None if attn.qkv.bias is None else attn.qkv.bias.unflatten(0, (3, attn.num_heads, -1))
    proj = attn.proj.weight.unflatten(1, (attn.num_heads, -1))  # (C, h, d)

    def run(tokens: Tensor, heads: Tensor) -> Tensor:
        w = weight.index_select(1, heads).flatten(0, 2)
        b = None if bias is None else bias.index_select(1, heads).flatten()
        qkv = F.linear(tokens, w, b).unflatten(2, (3, len(heads), -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = _attention(attn, attn.q_norm(q[:, :, :read]), attn.k_norm(k), v).transpose(1, 2).flatten(2)
        return F.linear(out, proj.index_select(1, heads).flatten(1))

    out = rescale_gradient(run(tokens, order[:count]), attn.num_heads / count if state.settings.rescale else 1.0)
    if count < attn.num_heads:
        with torch.no_grad():
            rest = run(tokens, order[count:])
        out = out + rest
    if attn.proj.bias is not None:
        out = out + attn.proj.bias.to(out.dtype)
    out = block.ls1(attn.proj_drop(out))
    kept = x.kept.shape[1]
    return out[:, :kept], lambda: out[:, kept:]


def kept_heads(num_heads: int, keep_ratio: float) -> int:
    """How many heads run with gradient under mhsa_drop="head"."""
    return max(1, round(keep_ratio * num_heads))


def _heads(attn: Any, qkv: Tensor) -> QKV:
    """(B, n, 3 h d) to q, k and v, each (B, h, n, d)."""
    q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _attention(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attn.attn_drop.p if attn.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _projection(block: SBPBlock) -> Callable[[Tensor, Tensor], Tensor]:
    """The function from attention output (B, h, n, d) and its tokens (B, n, C) to the branch (B, n, C)."""
    attn, scale = block.attn, getattr(block.ls1, "gamma", None)
    if getattr(attn, "gate", None) is None:
        project = block.sbp_linear(attn.proj, attn.norm, scale=scale)
        return lambda out, tokens: attn.proj_drop(project(out.transpose(1, 2).flatten(2)))
    gate = block.sbp_linear(attn.gate, block.norm1)
    gated = block.sbp_linear(attn.proj, scale=scale)

    def project_gated(out: Tensor, tokens: Tensor) -> Tensor:
        return attn.proj_drop(gated(attn.norm(out.transpose(1, 2).flatten(2)) * gate(tokens).sigmoid()))

    return project_gated


# -- small parts


def _without_gradient(run: Function) -> tuple[Function, Function]:
    """A function, and the same without gradient."""
    return run, torch.no_grad()(run)


def _drop_path_scale(drop_path: Any, x: Tensor) -> Tensor | None:
    """One decision for all tokens of an image, kept or dropped: (B, 1, 1), zero or 1 / (1 - drop_path).

    What timm's `DropPath` multiplies with, without a pass over the tokens.
    """
    if type(drop_path) is not DropPath:
        return None if isinstance(drop_path, nn.Identity) else drop_path(x.new_ones(len(x), 1, 1))
    if drop_path.drop_prob == 0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty(len(x), 1, 1).bernoulli_(keep)
    return scale.div_(keep) if keep > 0 and drop_path.scale_by_keep else scale


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else branch * scale)


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
