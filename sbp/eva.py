"""SBP for timm's EVA, EVA-02, DINOv3 and its other transformers with rotary embeddings: `EvaBlock`.

Only attention mixes tokens. The rotary embedding turns each query and key by its own token's angle, so that kept and
dropped tokens take their rows of it.
"""

from functools import partial
from typing import Any

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from sbp.backbone import Backbone, blocks_of, only, require
from sbp.functional import Streams
from sbp.loops import LoopBlock, LoopState
from sbp.settings import Settings
from sbp.tokens import MLPS, check_heads, published

SUPPORTED = "timm's EVA, EVA-02 and DINOv3 (`EvaBlock`)"


def find(model: nn.Module) -> Backbone | None:
    """The EVA in `model`, or None. Raises ValueError where SBP cannot train it."""
    transformer = only(model, Eva)
    if transformer is None:
        return None
    name, eva = transformer
    layers = blocks_of(name, eva)
    for layer, block in layers.items():
        require(layer, block, EvaBlock, EvaBlockPostNorm)
        require(f"{layer}.attn", block.attn, EvaAttention, AttentionRope)
        require(f"{layer}.mlp", block.mlp, *MLPS)
    if eva.patch_drop is not None:
        raise ValueError("patch_drop_rate must be 0: SBP masks a whole grid of tokens")
    return Backbone(
        layers=layers,
        published=published([*layers]),
        hooks=[(eva, "enter_model"), (eva.patch_embed, "enter_patch_embed")],
        state=partial(_state, layers, prefix=eva.num_prefix_tokens),
    )


def _state(
    blocks: dict[str, nn.Module], names: list[str], keep_ratios: list[float], settings: Settings, **kwargs: Any
) -> LoopState:
    check_heads(blocks, names, settings)
    return LoopState(names, keep_ratios, settings, blocks=[*blocks], kind=Eva, **kwargs)


class RopeBlock(LoopBlock):
    """What SBP blocks share, with the norms in front of the branches or behind them."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Streams,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | Streams:
        """x: tokens (B, N, C) or the streams of them. rope: (H * W, 2 d) or, for each head, (h, H * W, 2 d)."""
        plain = partial(super().forward, x, rope, attn_mask, is_causal)
        return self.sbp_forward(x, plain, attn_mask is not None or is_causal, rope=rope)


class SBPEvaBlock(RopeBlock, EvaBlock):  # type: ignore[misc]
    """timm's `EvaBlock`, which in training back-propagates its two branches through kept tokens only."""


class SBPEvaBlockPostNorm(RopeBlock, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's `EvaBlockPostNorm`, likewise."""

    sbp_post_norm = True


SBP_CLASSES = {EvaBlock: SBPEvaBlock, EvaBlockPostNorm: SBPEvaBlockPostNorm}
