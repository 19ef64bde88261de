"""SBP for timm's plain vision transformers (ViT, DeiT): `Block` with `Attention`.

Shapes: B images, N tokens (P prefix tokens, then the H x W grid), K kept and D dropped ones, C channels,
h heads of d channels. A prefix token (class, register) is always kept.

The tokens are split once, in front of the first SBP block, into a kept and a dropped stream; every block runs
on both, and they are joined once after the last SBP block. No block gathers or scatters.
"""

from functools import partial
from typing import Any

from timm.layers import Attention, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sbp import input_gradient
from sbp.backbone import Backbone, blocks_of, is_own, only, require
from sbp.functional import Streams, join
from sbp.masks import Positions
from sbp.settings import Settings
from sbp.tokens import MLPS, TokenBlock, TokenState, check_heads, never_rises, published, split_tokens

SUPPORTED = "timm's ViT and DeiT (`Block` with `Attention` and a position-wise MLP)"


def find(model: nn.Module) -> Backbone | None:
    """The vision transformer in `model`, or None. Raises ValueError where SBP cannot train it."""
    transformer = only(model, VisionTransformer)
    if transformer is None:
        return None
    name, vit = transformer
    layers = blocks_of(name, vit)
    for layer, block in layers.items():
        require(layer, block, Block, ResPostBlock)
        require(f"{layer}.attn", block.attn, Attention)
        require(f"{layer}.mlp", block.mlp, *MLPS)
        for scale in ("ls1", "ls2") if hasattr(block, "ls1") else ():
            require(f"{layer}.{scale}", getattr(block, scale), LayerScale, nn.Identity)
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError("patch_drop_rate must be 0: SBP masks a whole grid of tokens")
    return Backbone(
        layers=layers,
        published=published([*layers]),
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
    ratios = dict(zip(names, keep_ratios, strict=True))
    no_way_back = _reads_prefix_only(vit) and never_rises(ratios.get(name, 1.0) for name in blocks)
    if settings.dropped == "input" and settings.mhsa_drop in ("qkv", "qkv_exact") and no_way_back:
        raise ValueError(
            f"dropped='input' changes nothing here: with {settings.mhsa_drop} and a class token no gradient reaches "
            "dropped tokens"
        )
    check_heads(blocks, names, settings)
    return ViTState(names, keep_ratios, settings, **kwargs)


class ViTState(TokenState):
    """Knows which token the loss will read."""

    def enter_model(self, model: Any, args: tuple) -> None:
        """Forward pre-hook of the transformer: unlike forward_features, forward reads pooled tokens only."""
        self.prefix_only = _reads_prefix_only(model)
        self.skips_dropped = self.prefix_only and self.settings.mhsa_drop == "qkv" and self.never_regrows(model.blocks)


class ViTBlock(TokenBlock):
    """What SBP blocks share, with the norms in front of the branches or behind them."""

    sbp_state: ViTState

    @classmethod
    def sbp_input_obstacle(cls, block: Any) -> str | None:
        """What of timm's block stands against dropped="input"; None where nothing does."""
        mlp = block.mlp
        parts = (mlp.drop1, mlp.norm, mlp.drop2) if type(mlp) is Mlp else (mlp,)
        obstacle = input_gradient.obstacle(block.norm2, getattr(mlp, "act", None), *parts)
        return "norms behind the branches" if cls.sbp_post_norm else obstacle

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


class SBPBlock(ViTBlock, Block):  # type: ignore[misc]
    """timm's `Block`, which in training back-propagates its two branches through kept tokens only."""


class SBPResPostBlock(ViTBlock, ResPostBlock):  # type: ignore[misc]
    """timm's `ResPostBlock`, likewise."""

    sbp_post_norm = True


class SBPBlocks(nn.Sequential):
    """The container of a transformer's blocks: splits before the first SBP block, joins after the last.

    timm also calls the blocks one by one (checkpointing, forward_intermediates); each then splits for itself.
    """

    def forward(self, x: Any) -> Tensor:
        """x: tokens (B, N, C), and between SBP blocks the streams of them.

        Returns (B, N, C); of a model whose loss reads prefix tokens only the kept ones, or those alone.
        """
        where = [block.sbp_positions() if isinstance(block, ViTBlock) else None for block in self]
        state = next((block.sbp_state for block in self if isinstance(block, ViTBlock)), None)
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


# -- small parts


def _reads_prefix_only(model: Any) -> bool:
    """Whether the head of this transformer reads the class (and distillation) token and nothing else."""
    return (
        any(is_own(model, kind) for kind in (VisionTransformer, VisionTransformerDistilled))
        and model.attn_pool is None
        and model.global_pool == "token"
        and model.num_prefix_tokens > 0
    )


SBP_CLASSES = {Block: SBPBlock, ResPostBlock: SBPResPostBlock, nn.Sequential: SBPBlocks}
