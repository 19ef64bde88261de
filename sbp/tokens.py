"""Transformer blocks on two streams of tokens, whatever the family: kept tokens with gradient, dropped ones without.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from sbp import input_gradient, recompute
from sbp.attention import NOWHERE, Branch, Places, attend, attend_with_some_heads, heads_are_separate
from sbp.functional import Streams, rescale_gradient, split
from sbp.masks import Positions
from sbp.recompute import Function, is_plain, scaled
from sbp.settings import Settings
from sbp.state import Grid, LayerMap, Shape, State

Scales = tuple[float, float]  # of the attention's branch and of the MLP's

MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)  # position-wise
NOTHING = nn.Identity()


class TokenBlock(nn.Module):
    """The part of an SBP block that is the same for all families; it stands before timm's block among the bases.

    sbp_index: which SBP layer it is; None for one that keeps all tokens and only recomputes.
    """

    sbp_compiled_method = "run"
    sbp_post_norm = False  # whether the norms stand behind attention and MLP, rather than in front
    sbp_state: State
    sbp_index: int | None
    norm1: Any  # timm's own, of whichever family
    attn: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    drop_path2: Any

    def sbp_positions(self) -> Positions | None:
        return self.sbp_state.positions(self, self.sbp_index)

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)

    def sbp_scale(self) -> Scales:
        state, index = self.sbp_state, self.sbp_index
        return state.gradient_scale(self, index), state.pointwise_scale(self, index)

    def sbp_bias(self, shared: Tensor | None) -> Tensor | None:
        """What is added to the attention of any two tokens, (1, h, N, N). shared: what the network gives all blocks."""
        return shared

    def sbp_before(self, branch: int) -> tuple[nn.Module, ...]:
        """The norm in front of branch 1 (attention) or 2 (MLP)."""
        return () if self.sbp_post_norm else (getattr(self, f"norm{branch}"),)

    def sbp_after(self, branch: int, x: Tensor) -> Tensor:
        """x, after the norm behind branch 1 or 2."""
        return getattr(self, f"norm{branch}")(x) if self.sbp_post_norm else x

    def sbp_attend(self, x: Streams, read: int | None, places: Places) -> Branch:
        return attend(self, x, read, places)

    def sbp_layer_scale(self, branch: int) -> Tensor | None:
        """(C,), of branch 1 (attention) or 2 (MLP), or None."""
        if hasattr(self, f"gamma_{branch}"):
            return getattr(self, f"gamma_{branch}")
        return getattr(getattr(self, f"ls{branch}", None), "gamma", None)

    def run(
        self, x: Streams, prefix_only: bool = False, scale: Scales = (1.0, 1.0), places: Places = NOWHERE
    ) -> Streams:
        """forward, of streams. scale: of the gradient that enters the two branches at kept tokens."""
        state = self.sbp_state
        branches = partial(  # all of the pass is read here: when a block runs again it may not be the last one any more
            self._branches,
            read=state.prefix if prefix_only else None,
            key=state.running.key if state.settings.mhsa_drop == "head" and x.dropped is not None else None,
            scale=scale,
            places=places,
        )
        if state.recomputes(self) != "block":
            return branches(*x)
        random = recompute.draws_random(self)
        if not random:  # drawn outside, as a captured graph cannot set its generator back
            scales = tuple(drop_path_scale(one, x.kept) for one in (self.drop_path1, self.drop_path2))
            branches = partial(branches, scales=scales)
        if self.sbp_reads_dropped_again():
            return recompute.block(branches, *x, random=random)
        return recompute.block(branches, x.kept, random=random, once=[x.dropped])

    def sbp_reads_dropped_again(self) -> bool:
        """Whether the kept tokens' backward pass, or what dropped ones pass on, needs the dropped tokens."""
        return self.sbp_state.settings.mhsa_drop != "qkv" or self.sbp_state.passes_input

    def _branches(
        self,
        kept: Tensor,
        dropped: Tensor | None,
        read: int | None,
        key: Tensor | None,
        scale: Scales,
        places: Places,
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
        if self.sbp_state.settings.mhsa_drop == "qkv" and read is not None:
            dropped = None
        if key is None:
            branch, dropped_branch = self.sbp_attend(Streams(kept, dropped), read, places)
            branch = rescale_gradient(branch, scale[0], self.sbp_state.prefix)
        else:
            branch, dropped_branch = attend_with_some_heads(self, Streams(kept, dropped), read, key, places)
        scale1 = drop_path_scale(self.drop_path1, kept) if scales is None else scales[0]
        kept = add(kept[:, :read], branch, scale1)
        passes_input = dropped is not None and self.sbp_state.passes_input
        mlp, dropped_mlp = self.sbp_mlp_passing_input() if passes_input else (self.sbp_mlp(), None)
        # What is rescaled is for the weights.
        within = rescale_gradient(kept, 1 / scale[1], self.sbp_state.prefix) if passes_input else kept
        # Where dropped tokens are left out nothing needs it.
        mlp_scale = scale[1] if passes_input or not self.sbp_state.passes_input else scale[0]
        branch = rescale_gradient(mlp(within), mlp_scale, self.sbp_state.prefix)
        scale2 = drop_path_scale(self.drop_path2, kept) if scales is None else scales[1]
        kept = add(kept, branch, scale2)
        if dropped is None or read is not None or (again and key is None):
            return Streams(kept, None)
        dropped = add(dropped, dropped_branch(), scale1)
        with torch.no_grad() if dropped_mlp is None else nullcontext():
            branch = (dropped_mlp or mlp)(dropped)
        return Streams(kept, add(dropped, branch, scale2))

    def sbp_reads(self, *layers: nn.Module) -> bool:
        """Whether the weights of these layers are read, rather than the layers called."""
        return self.sbp_state.recomputes(self) == "cheap" and all(is_plain(layer) for layer in layers)

    def sbp_linear(self, layer: Any, *before: Function, **options: Any) -> Function:
        """options: of `recompute.linear`."""
        return recompute.linear(layer, *before, cheap=self.sbp_state.recomputes(self) == "cheap", **options)

    def sbp_mlp(self) -> Function:
        """Norm, MLP and layer scale."""
        mlp, scale, before = self.mlp, self.sbp_layer_scale(2), self.sbp_before(2)
        if type(mlp) is Mlp:
            up = self.sbp_linear(mlp.fc1, *before)
            down = self.sbp_linear(mlp.fc2, mlp.act, mlp.drop1, mlp.norm, scale=scale)
            return lambda tokens: self.sbp_after(2, mlp.drop2(down(up(tokens))))
        gated = Gated.of(mlp)
        if not self.sbp_reads(*gated.layers):
            norm = before[0] if before else nn.Identity()
            return lambda tokens: self.sbp_after(2, scaled(mlp(norm(tokens)), scale))
        *into, out = gated.layers
        weight, bias = recompute.stacked(*into)
        up = self.sbp_linear(into[0], *before, *gated.before, weight=weight, bias=bias)
        down = self.sbp_linear(out, gated.gate, *gated.after, scale=scale, reads=[*mlp.act.parameters()])
        return lambda tokens: self.sbp_after(2, gated.end(down(up(tokens))))

    def sbp_mlp_passing_input(self) -> tuple[Function, Function]:
        """The same of kept tokens; and of dropped ones, with the gradient of their input. Of an `Mlp` behind a norm."""
        mlp = self.mlp
        first, second = recompute.weights(mlp.fc1), recompute.weights(mlp.fc2, self.sbp_layer_scale(2))
        up, down = self.sbp_linear(first, self.norm2), self.sbp_linear(second, mlp.act)
        return (
            lambda tokens: down(up(tokens)),
            lambda tokens: input_gradient.branch(tokens, self.norm2, first, mlp.act, second),
        )


class Gated(NamedTuple):
    """An MLP whose hidden channels are a product of two halves.

    layers: those into the hidden channels (one for both halves, or two) and the one out of them. gate: from both
    halves, side by side, to their product. before, after, end: modules in front of the first layers, in front
    of the last one, and behind it.
    """

    layers: tuple[Any, ...]
    gate: Function
    before: tuple[nn.Module, ...] = ()
    after: tuple[nn.Module, ...] = ()
    end: nn.Module = NOTHING

    @classmethod
    def of(cls, mlp: Any) -> "Gated":
        def gate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return first * mlp.act(second) if getattr(mlp, "gate_last", False) else mlp.act(first) * second

        if type(mlp) is GluMlp:
            return cls((mlp.fc1, mlp.fc2), gate, after=(mlp.drop1, mlp.norm), end=mlp.drop2)
        if type(mlp) is SwiGLU:
            return cls((mlp.fc1_g, mlp.fc1_x, mlp.fc2), gate, after=(mlp.drop1, mlp.norm), end=mlp.drop2)
        drops = [getattr(mlp, name, NOTHING) for name in ("drop1", "drop2")]  # of an earlier timm it has none
        return cls((mlp.w0, mlp.w1, mlp.w2), gate, before=(mlp.norm,), after=(drops[0],), end=drops[1])


class TokenState(State):
    """Draws when the patch embedding receives images, and knows which token the loss will read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the next pass. On the instance from the start, as compiled code looks whether they are there.
        self.prefix_only = self.skips_dropped = self.hands_on = False

    def never_regrows(self, blocks: Iterable[nn.Module]) -> bool:
        """Whether no block sees a token again that one before it dropped."""

        def kept(block: nn.Module) -> float:
            index = getattr(block, "sbp_index", None)
            if index is None or not self.is_active(block):
                return 1.0
            return self.keep_ratios[index] if self.fixed is None else 0.5

        return never_rises(kept(block) for block in blocks)

    def enter_patch_embed(self, patch_embed: Any, args: tuple) -> None:
        """Forward pre-hook of the patch embedding. Images: (B, 3, height, width)."""
        (images,) = args
        reading = self.prefix_only, self.skips_dropped, self.hands_on
        self.prefix_only = self.skips_dropped = self.hands_on = False  # the next pass may come from elsewhere
        if self.is_idle:
            return
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


def never_rises(keep_ratios: Iterable[float]) -> bool:
    return all(after <= before for before, after in pairwise(keep_ratios))


def published(layers: Sequence[str]) -> list[str]:
    """The last two thirds of a transformer's blocks."""
    return list(layers)[len(layers) - round(len(layers) * 2 / 3) :]


def check_heads(blocks: dict[str, Any], names: list[str], settings: Settings) -> None:
    """Raises ValueError where mhsa_drop="head" is asked of attention that it cannot split."""
    for name in names if settings.mhsa_drop == "head" else []:
        if not heads_are_separate(blocks[name].attn):
            raise ValueError(f"mhsa_drop='head' needs heads that do not mix before the projection; see {name}.attn")


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
    if type(drop_path) is not DropPath or "forward" in drop_path.__dict__:
        return None if isinstance(drop_path, nn.Identity) else drop_path(x.new_ones(len(x), 1, 1))
    if drop_path.drop_prob == 0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty(len(x), 1, 1).bernoulli_(keep)
    return scale.div_(keep) if keep > 0 and drop_path.scale_by_keep else scale


def add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else branch * scale)


def _patch_size(patch_embed: Any) -> Grid:
    ratio = patch_embed.feat_ratio(as_scalar=False)
    return ratio if isinstance(ratio, tuple) else (ratio, ratio)
