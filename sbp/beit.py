"""SBP for timm's transformers that add a bias to the attention of two tokens: BEiT, BEiT v2 and relpos ViTs.

The bias (1, h, N, N) comes from a table or a small MLP. Kept and dropped queries take their rows of it, and the columns
of the keys that they see; its parameters get the gradient of kept queries.
"""

from functools import partial
from typing import Any

from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from sbp.backbone import Backbone, blocks_of, only, require
from sbp.functional import Streams
from sbp.loops import LoopBlock, LoopState
from sbp.settings import Settings
from sbp.tokens import MLPS, check_heads, published

SUPPORTED = "timm's BEiT, BEiT v2 and relpos ViTs (a bias on attention)"


def find(model: nn.Module) -> Backbone | None:
    """The transformer in `model`, or None. Raises ValueError where SBP cannot train it."""
    found: Any = only(model, (beit.Beit, relpos.VisionTransformerRelPos))
    if found is None:
        return None
    name, transformer = found
    layers = blocks_of(name, transformer)
    is_beit = isinstance(transformer, beit.Beit)
    shared = transformer.rel_pos_bias if is_beit else transformer.shared_rel_pos
    for layer, block in layers.items():
        require(layer, block, *((beit.Block,) if is_beit else (relpos.RelPosBlock, relpos.ResPostRelPosBlock)))
        require(f"{layer}.attn", block.attn, beit.Attention if is_beit else relpos.RelPosAttention)
        require(f"{layer}.mlp", block.mlp, *MLPS)
    biased = shared is not None or any(_table(block.attn) is not None for block in layers.values())
    kind: Any = beit.Beit if is_beit else relpos.VisionTransformerRelPos
    return Backbone(
        layers=layers,
        published=published([*layers]),
        hooks=[(transformer, "enter_model"), (transformer.patch_embed, "enter_patch_embed")],
        state=partial(_state, layers, biased, kind=kind, prefix=int(transformer.cls_token is not None)),
    )


def _table(attn: Any) -> Any:
    """What holds the parameters of a block's own bias, or None."""
    return attn.relative_position_bias_table if isinstance(attn, beit.Attention) else attn.rel_pos


def _state(
    blocks: dict[str, nn.Module],
    biased: bool,
    names: list[str],
    keep_ratios: list[float],
    settings: Settings,
    **kwargs: Any,
) -> LoopState:
    check_heads(blocks, names, settings)
    if biased and settings.mask_per != "batch":
        raise ValueError(
            f"mask_per={settings.mask_per!r} would make the bias on attention (heads, tokens, tokens) another one for "
            "each image, which takes more memory than SBP saves: this backbone takes mask_per='batch'"
        )
    return LoopState(names, keep_ratios, settings, blocks=[*blocks], **kwargs)


class SBPBeitBlock(LoopBlock, beit.Block):
    """timm's BEiT `Block`, which in training back-propagates its two branches through kept tokens only."""

    def forward(  # type: ignore[override]
        self, x: Tensor | Streams, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor | Streams:
        """x: tokens (B, N, C) or the streams of them. shared_rel_pos_bias: (h, N, N)."""
        plain = partial(super().forward, x, shared_rel_pos_bias)  # type: ignore[arg-type]
        return self.sbp_forward(x, plain, bias=None if shared_rel_pos_bias is None else shared_rel_pos_bias[None])

    def sbp_bias(self, shared: Tensor | None) -> Tensor | None:
        if self.attn.relative_position_bias_table is None:
            return shared
        own = self.attn._get_rel_pos_bias()
        return own if shared is None else own + shared


class RelPosBlock(LoopBlock):
    """What SBP blocks share, with the norms in front of the branches or behind them."""

    def forward(  # type: ignore[override]
        self, x: Tensor | Streams, shared_rel_pos: Tensor | None = None
    ) -> Tensor | Streams:
        """x: tokens (B, N, C) or the streams of them. shared_rel_pos: (1, h, N, N)."""
        plain = partial(super().forward, x, shared_rel_pos)  # type: ignore[arg-type]
        return self.sbp_forward(x, plain, bias=shared_rel_pos)

    def sbp_bias(self, shared: Tensor | None) -> Tensor | None:
        return shared if self.attn.rel_pos is None else self.attn.rel_pos.get_bias()


class SBPRelPosBlock(RelPosBlock, relpos.RelPosBlock):
    """timm's `RelPosBlock`, which in training back-propagates its two branches through kept tokens only."""


class SBPResPostRelPosBlock(RelPosBlock, relpos.ResPostRelPosBlock):
    """timm's `ResPostRelPosBlock`, likewise."""

    sbp_post_norm = True


SBP_CLASSES = {
    beit.Block: SBPBeitBlock,
    relpos.RelPosBlock: SBPRelPosBlock,
    relpos.ResPostRelPosBlock: SBPResPostRelPosBlock,
}
