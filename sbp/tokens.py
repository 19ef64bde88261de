"""Transformer blocks on two streams of tokens, whatever the family: kept tokens with gradient, dropped ones without.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from sbp import recompute
from sbp.attention import attend, attend_with_some_heads
from sbp.functional import Streams, rescale_gradient, split
from sbp.masks import Positions
from sbp.recompute import Function
from sbp.state import State

MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)  # position-wise


class TokenBlock(nn.Module):
    """The part of an SBP block that is the same for all families; it stands before timm's block among the bases.

    sbp_index: which SBP layer it is; None for one that keeps all tokens and only recomputes.
    """

    sbp_compiled_method = "run"
    sbp_state: State
    sbp_index: int | None
    norm1: Any  # timm's own, of whichever family
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def sbp_positions(self) -> Positions | None:
        return self.sbp_state.positions(self, self.sbp_index)

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)

    def sbp_scale(self) -> float:
        return self.sbp_state.gradient_scale(self, self.sbp_index)

    def run(self, x: Streams, prefix_only: bool = False, scale: float = 1.0) -> Streams:
        """forward, of streams. scale: of the gradient that enters the branches at kept tokens."""
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
        scales = tuple(drop_path_scale(one, x.kept) for one in (self.drop_path1, self.drop_path2))
        return recompute.block(partial(branches, scales=scales), *x, random=False)

    def _branches(
        self,
        kept: Tensor,
        dropped: Tensor | None,
        read: int | None,
        key: Tensor | None,
        scale: float,
        scales: tuple[Tensor | None, Tensor | None] | None = None,
        again: bool = False,
    ) -> Streams:
        """read: how many of the kept tokens are wanted, None for all. again: the values of dropped ones are not.

        key: the random number that some heads are drawn by; None where all run. scale: of the gradient that enters at
        kept tokens but prefix tokens. scales: the drop paths' decisions; None where they are still to be made.

        The kept stream runs to its end first: what draws random numbers for it, such as dropout, then draws the
        same ones whether or not the dropped stream follows.
        """
        if self.sbp_state.settings.mhsa_drop == "qkv" and (again or read is not None):
            dropped = None
        if key is None:
            branch, dropped_branch = attend(self, Streams(kept, dropped), read)
            branch = rescale_gradient(branch, scale, self.sbp_state.prefix)
        else:
            branch, dropped_branch = attend_with_some_heads(self, Streams(kept, dropped), read, key)
        scale1 = drop_path_scale(self.drop_path1, kept) if scales is None else scales[0]
        kept = _add(kept[:, :read], branch, scale1)
        mlp = self.sbp_mlp()
        branch = rescale_gradient(mlp(kept), scale, self.sbp_state.prefix)
        scale2 = drop_path_scale(self.drop_path2, kept) if scales is None else scales[1]
        kept = _add(kept, branch, scale2)
        if dropped is None or read is not None or (again and key is None):
            return Streams(kept, None)
        dropped = _add(dropped, dropped_branch(), scale1)
        with torch.no_grad():
            branch = mlp(dropped)
        return Streams(kept, _add(dropped, branch, scale2))

    def sbp_linear(self, layer: nn.Module, *before: nn.Module, scale: Tensor | None = None) -> Function:
        return recompute.linear(layer, *before, cheap=self.sbp_state.recomputes(self) == "cheap", scale=scale)

    def sbp_mlp(self) -> Function:
        """Norm, MLP and layer scale."""
        mlp = self.mlp
        if type(mlp) is not Mlp:
            return lambda tokens: self.ls2(mlp(self.norm2(tokens)))
        up = self.sbp_linear(mlp.fc1, self.norm2)
        down = self.sbp_linear(mlp.fc2, mlp.act, mlp.drop1, mlp.norm, scale=getattr(self.ls2, "gamma", None))
        return lambda tokens: mlp.drop2(down(up(tokens)))


def split_tokens(x: Tensor, where: Positions) -> Streams:
    """Tokens (B, N, C) to streams (B, P + K, C) and (B, D, C)."""
    tokens = where.keep.shape[-1] + where.drop.shape[-1]
    if x.shape[1] != tokens:
        raise ValueError(f"an SBP block got {x.shape[1]} tokens, but its mask is for {tokens}")
    return split(x, *where)


def drop_path_scale(drop_path: Any, x: Tensor) -> Tensor | None:
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
