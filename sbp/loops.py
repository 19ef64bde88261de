"""Transformers that call their blocks one by one, in a loop that hands on whatever a block returns (EVA, BEiT, ...).

The loop cannot split the tokens before the first SBP block and join them after the last. So a block returns streams
where the next one drops the same tokens, and whole tokens elsewhere. In passes that look at what is between the blocks
(forward_intermediates, forward_features, checkpointing), every block splits and joins for itself.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from sbp.attention import Places
from sbp.backbone import is_own
from sbp.functional import Streams, join
from sbp.masks import Positions
from sbp.tokens import TokenBlock, TokenState, split_tokens


class LoopState(TokenState):
    """Knows which block follows on which, and whether what is between them will be looked at.

    blocks: the names of all blocks in the order of the network. kind: timm's class of the network.
    """

    def __init__(
        self, names: Sequence[str], *args: Any, blocks: Sequence[str], kind: type[nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(names, *args, **kwargs)
        self.kind, self.depth = kind, len(blocks)
        self.last = self.layers.index(blocks[-1]) if blocks[-1] in self.layers else None
        follows = dict(pairwise(blocks))
        self.next = [self.layers.index(n) if (n := follows.get(name)) in self.layers else None for name in self.layers]

    def enter_model(self, model: Any, args: tuple) -> None:
        """Forward pre-hook of the network. Its own forward looks at nothing between the blocks."""
        if not self.has_own_loop(model):
            return
        self.hands_on = self.may_hand_on(model)
        if not is_own(model, self.kind):
            return
        pools = getattr(model, "attn_pool", None) is not None
        self.prefix_only = model.global_pool == "token" and model.num_prefix_tokens > 0 and not pools
        self.skips_dropped = self.prefix_only and self.settings.mhsa_drop == "qkv" and self.never_regrows(model.blocks)

    def has_own_loop(self, model: Any) -> bool:
        """Whether forward and forward_features of the network are timm's own."""
        return is_own(model, self.kind, ("forward", "forward_features"))

    def may_hand_on(self, model: Any) -> bool:
        """Not where the pass runs again, nor where the block to hand on to has been pruned."""
        return not model.grad_checkpointing and len(model.blocks) == self.depth

    def next_positions(self, index: int) -> Positions | None:
        """The positions of the block behind SBP layer `index`; None where it drops nothing, or gets whole tokens."""
        following = self.next[index]
        if following is None or not self.running.shape.hands_on:
            return None
        return self.positions(self.members[following], following)


class LoopBlock(TokenBlock):
    """An SBP block of such a network."""

    sbp_state: LoopState

    def sbp_forward(
        self, x: Any, plain: Callable[[], Tensor], masked: bool = False, rope: Tensor | None = None, bias: Any = None
    ) -> Any:
        """x: tokens (B, N, C), or the streams of them; returns tokens, or streams for the next block.

        plain: timm's forward pass. masked: with a mask of attention. rope, bias: as timm's loop gives them.
        """
        where, state = self.sbp_positions(), self.sbp_state
        if where is None:
            compiled = "run" in vars(self)
            if masked or not self.training or (state.recomputes(self) == "none" and not compiled):
                return plain()
            rows = None if rope is None else Streams(rope, None)
            return self.run(Streams(x, None), places=Places(None, rows, bias)).kept
        if masked:
            raise ValueError("SBP blocks take no attn_mask or is_causal in training")
        index = self.sbp_index
        assert index is not None
        shape = state.running.shape
        places = Places(where, rope_rows(rope, where, state.prefix), bias)
        streams = x if isinstance(x, Streams) else self.sbp_split(x, where)
        passed = streams.dropped
        if shape.skips_dropped:  # nothing reads dropped tokens
            streams = Streams(streams.kept, None)
        last = shape.prefix_only and shape.hands_on and index == state.last
        streams = self.run(streams, last, self.sbp_scale(), places)
        if last:
            state.watch(streams.kept)
            return streams.kept
        if shape.skips_dropped and passed is not None:
            streams = Streams(streams.kept, passed)
        if state.next_positions(index) is where:
            return streams
        out = self.sbp_join(streams, where)
        state.watch(out)
        return out

    def sbp_split(self, x: Tensor, where: Positions) -> Streams:
        return split_tokens(x, where)

    def sbp_join(self, streams: Streams, where: Positions) -> Tensor:
        return join(streams, *where)


def rope_rows(rope: Tensor | None, where: Positions, prefix: int) -> Streams | None:
    """The rows of a rope (H * W, 2 d) or (h, H * W, 2 d) for kept tokens but prefix tokens, and for dropped ones."""
    if rope is None:
        return None
    return Streams(*(_rows(rope, index) for index in (where.keep[..., prefix:] - prefix, where.drop - prefix)))


def _rows(rope: Tensor, index: Tensor) -> Tensor:
    rows = rope.index_select(-2, index.flatten())
    if index.ndim == 1:
        return rows
    rows = rows.unflatten(-2, index.shape)  # (B, n, 2 d) or (h, B, n, 2 d)
    return rows.unsqueeze(1) if rope.ndim == 2 else rows.transpose(0, 1)
