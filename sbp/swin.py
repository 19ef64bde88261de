"""SBP for timm's Swin v1 and v2: blocks of attention in windows, and the patch merging between stages.

Shapes: maps (B, H, W, C); W_n windows of w_h x w_w positions, K of which are kept and D dropped; h heads of d channels.

The mask is one of a window's positions, and tiles the map: each window, shifted or not, then has each residue once, and
so the same number of kept positions. The mask grid is the smallest window of the network, which has to divide the
others. All parts but attention are position-wise. A block splits its map window by window, and joins it at its end.

A map that is no multiple of its windows is padded below and at its right, as timm does for attention, so that these
windows keep as many positions as all others, padding among them. timm shifts the map before it pads it: the first rows
and columns of a shifted map, which stand behind its last ones then, have another part of the mask than elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn

from sbp import masks, recompute
from sbp.attention import Branch, Places, attend
from sbp.backbone import Backbone, of_one_network, only, require
from sbp.functional import Streams, join, kept_gradient, rescale_gradient, split
from sbp.masks import Positions
from sbp.settings import Settings
from sbp.state import Grid, LayerMap, Shape, State
from sbp.tokens import MLPS, TokenBlock

SUPPORTED = "timm's Swin v1 and v2 (`SwinTransformerBlock`, `SwinTransformerV2Block`)"


def find(model: nn.Module) -> Backbone | None:
    """The Swin in `model`, or None. Raises ValueError where SBP cannot train it."""
    for kind in (v1.SwinTransformer, v2.SwinTransformerV2):
        only(model, kind)  # of several it says what to do
    kinds = v1.SwinTransformerStage, v2.SwinTransformerV2Stage
    stages: dict[str, Any] = {name: stage for name, stage in model.named_modules() if isinstance(stage, kinds)}
    if not stages:
        return None
    of_one_network([*stages])
    layers: dict[str, nn.Module] = {}
    stage_of: dict[str, int] = {}
    published: list[str] = []
    for index, (own, stage) in enumerate(stages.items()):
        before = {} if isinstance(stage.downsample, nn.Identity) else {f"{own}.downsample": stage.downsample}
        blocks = {f"{own}.blocks.{i}": block for i, block in enumerate(stage.blocks)}
        for layer, block in blocks.items():
            require(layer, block, v1.SwinTransformerBlock, v2.SwinTransformerV2Block)
            require(f"{layer}.attn", block.attn, v1.WindowAttention, v2.WindowAttention)
            require(f"{layer}.mlp", block.mlp, *MLPS)
        for layer, merging in before.items():
            require(layer, merging, v1.PatchMerging, v2.PatchMerging)
        layers |= before | blocks
        stage_of |= dict.fromkeys(before | blocks, index)
        depth = len(blocks) if index < 2 else round(len(blocks) * 2 / 3)
        published += [*before, *list(blocks)[:depth]] if index < 3 else []

    network = list(stages.values())

    def state(names: list[str], keep_ratios: list[float], settings: Settings, **kwargs: Any) -> SwinState:
        if settings.mask_per != "batch":
            raise ValueError(
                f"mask_per={settings.mask_per!r} would make the bias on attention another one for each image, which "
                "takes more memory than SBP saves: a Swin takes mask_per='batch'"
            )
        own = [stage_of[name] for name in names]
        made = SwinState(names, keep_ratios, settings, stages=own, network=network, **kwargs)
        made.grid_and_windows()
        return made

    return Backbone(
        layers=layers,
        published=published,
        hooks=[(network[0], "enter_first_stage")],
        state=state,
        mhsa_drops=("qkv", "query", "qkv_exact"),
    )


class SwinState(State):
    """Draws when the first stage receives its map.

    stages: of each SBP layer, the index of its stage. network: the stages. Each layer's map is its window.
    """

    def __init__(self, *args: Any, stages: list[int], network: list[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages = stages
        self.network = network

    def enter_first_stage(self, stage: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the first stage. Its input: (B, H, W, C)."""
        if self.is_idle:
            return
        (x,) = args
        grid, windows = self.grid_and_windows()
        self.begin(Shape(grid, tuple(LayerMap(*window) for window in windows), len(x)), x.device)

    def grid_and_windows(self) -> tuple[Grid, list[Grid]]:
        """The mask's grid, and the windows of the SBP layers, which it tiles. Raises ValueError where it does not."""
        of_stages: list[Grid] = [tuple(one.blocks[0].window_size) for one in self.network]
        windows = [of_stages[index] for index in self.stages]
        grid = min(height for height, _ in windows), min(width for _, width in windows)
        if not all(_fits(window, grid) for window in windows):
            found = ", ".join(f"{name}: {window}" for name, window in zip(self.layers, windows, strict=True))
            raise ValueError(
                f"the windows of SBP layers must be multiples of the smallest one, got {found}: leave the stages of "
                "other windows out of `layers`, or take another window_size or img_size"
            )
        return grid, windows

    def _enlarged(self, mask: Tensor, count: int, layer_map: LayerMap) -> Positions | None:
        """The positions within a window, which the mask tiles."""
        if count == mask.numel():
            return None
        down, across = layer_map.height // mask.shape[0], layer_map.width // mask.shape[1]
        return masks.positions(mask.repeat(down, across), count * down * across)


def _fits(size: Grid, window: Grid) -> bool:
    return size[0] % window[0] == 0 and size[1] % window[1] == 0


def in_shifted_window(index: Tensor, window: Grid, shift: Grid) -> Tensor:
    """Where positions of the tiled mask, flat indices within a window, stand in windows that are shifted by `shift`."""
    rows, columns = (index // window[1] - shift[0]) % window[0], (index % window[1] - shift[1]) % window[1]
    return rows * window[1] + columns


def padded_size(size: Grid, window: Grid) -> Grid:
    """The least size of whole windows that a map of `size` fits into."""
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def padded(x: Tensor, size: Grid) -> Tensor:
    """A map (B, H, W, C) with zeros below and at its right, (B, *size, C)."""
    down, across = size[0] - x.shape[1], size[1] - x.shape[2]
    return nn.functional.pad(x, (0, 0, 0, across, 0, down)) if down or across else x


def on_map(index: Tensor, window: Grid, shift: Grid, size: Grid) -> Tensor:
    """Flat indices (W_n * n,) on a padded map, window by window, of positions (n,) within each shifted window.

    size: of the map before it is padded to whole windows; padding stays where it is when the map is shifted.
    """
    height, width = padded_size(size, window)
    rows = torch.arange(0, height, window[0], device=index.device)[:, None, None] + index // window[1]
    columns = torch.arange(0, width, window[1], device=index.device)[None, :, None] + index % window[1]
    return (_unshifted(rows, shift[0], size[0]) * width + _unshifted(columns, shift[1], size[1])).flatten()


def _unshifted(place: Tensor, shift: int, side: int) -> Tensor:
    return torch.where(place < side, (place + shift) % side, place)


def is_real(index: Tensor, size: Grid, width: int) -> Tensor:
    """Which flat indices (n,) on a padded map of this width are no padding of a map of `size`: bool (n,)."""
    return (index // width < size[0]) & (index % width < size[1])


class WindowBlock(TokenBlock):
    """What the SBP blocks of both versions share."""

    sbp_state: SwinState
    window_size: Grid
    shift_size: Grid
    attn_mask: Any
    get_attn_mask: Any

    def sbp_forward(self, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """x: (B, H, W, C). plain: timm's forward pass."""
        where, (height, width) = self.sbp_positions(), x.shape[1:3]
        size, window, shift = (height, width), self.window_size, self.shift_size
        if where is None:
            compiled = "run" in vars(self)
            if not self.training or not (self.sbp_state.recomputes(self) != "none" or compiled):
                return plain(x)
            everything = torch.arange(window[0] * window[1], device=x.device)
            flat = Positions(on_map(everything, window, shift, size), everything[:0])
            within = None
        else:
            within = Positions(*(in_shifted_window(index, window, shift) for index in where))
            flat = Positions(*(on_map(index, window, shift, size) for index in within))
        whole = padded_size(size, window)
        x = padded(x, whole)
        streams = split(x.flatten(1, 2), *flat)
        mask = self.get_attn_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        real = None if whole == size else Streams(*(is_real(index, size, whole[1]) for index in flat))
        if where is None:
            streams = Streams(streams.kept, None)
        streams = self.run(streams, scale=self.sbp_scale(), places=Places(within, bias=mask, real=real))
        out = join(streams, *flat).view(x.shape)[:, :height, :width]
        self.sbp_state.watch(out)
        return out

    def sbp_attend(self, x: Streams, read: int | None, places: Places) -> Branch:
        """x: streams (B, W_n * n, C), whose windows are images to attention."""
        area = self.window_size[0] * self.window_size[1]
        kept = area if places.where is None else len(places.where.keep)
        real = places.real

        def windows(x: Tensor, count: int) -> Tensor:
            return x.reshape(-1, count, x.shape[-1])

        def flags(real: Tensor, count: int) -> Tensor:
            return windows(real.expand(len(x.kept), -1)[..., None], count)

        streams = Streams(windows(x.kept, kept), None if x.dropped is None else windows(x.dropped, area - kept))
        if real is not None:
            of_dropped = None if x.dropped is None or real.dropped is None else flags(real.dropped, area - kept)
            real = Streams(flags(real.kept, kept), of_dropped)
        branch, dropped_branch = attend(self, streams, read, Places(places.where, None, places.bias, real))
        return branch.reshape(x.kept.shape), lambda: dropped_branch().reshape(len(x.kept), -1, x.kept.shape[-1])

    def sbp_bias(self, shared: Tensor | None) -> Tensor:
        """(1, h, w_h * w_w, w_h * w_w), or of each window where these are shifted. shared: timm's mask of those."""
        own = self.sbp_table()
        return own if shared is None else own + shared[:, None]

    def sbp_table(self) -> Tensor:
        """The bias by relative places, (1, h, w_h * w_w, w_h * w_w)."""
        raise NotImplementedError


class SBPSwinBlock(WindowBlock, v1.SwinTransformerBlock):
    """timm's `SwinTransformerBlock`, which in training back-propagates its two branches through kept positions only."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C)."""
        return self.sbp_forward(x, super().forward)

    def sbp_table(self) -> Tensor:
        return self.attn._get_rel_pos_bias()


class SBPSwinV2Block(WindowBlock, v2.SwinTransformerV2Block):
    """timm's `SwinTransformerV2Block`, which in training back-propagates its branches through kept positions only."""

    sbp_post_norm = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C)."""
        return self.sbp_forward(x, super().forward)

    def sbp_table(self) -> Tensor:
        attn, area = self.attn, self.window_size[0] * self.window_size[1]
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        bias = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias)[None]


class Merging(nn.Module):
    """Patch merging: norm and linear layer on 2 x 2 positions, of which kept output positions can be computed alone."""

    sbp_state: SwinState
    sbp_index: int | None
    sbp_norm_first: bool
    norm: Any
    reduction: Any

    def sbp_forward(self, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """x: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C')."""
        state = self.sbp_state
        where, again = state.positions(self, self.sbp_index), state.recomputes(self)
        if where is None and again == "none":
            return plain(x)
        size = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        window = (1, 1) if where is None else self.sbp_window()
        height, width = padded_size(size, window)
        x = padded(x, (2 * height, 2 * width))
        x = x.unflatten(2, (width, 2)).unflatten(1, (height, 2))  # (B, H / 2, 2, W / 2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # (B, H / 2 * W / 2, 4 C)
        linear = partial(recompute.linear, self.reduction, cheap=again != "none")
        norm = self.norm
        reduce = linear(norm) if self.sbp_norm_first else linear()
        to_output = reduce if self.sbp_norm_first else lambda positions: norm(reduce(positions))
        if where is None:
            return to_output(x).unflatten(1, (height, width))
        flat = Positions(*(on_map(index, window, (0, 0), size) for index in where))
        kept, dropped = kept_gradient(to_output, split(x, *flat))
        scale = state.gradient_scale(self, self.sbp_index)
        out = join(Streams(rescale_gradient(kept, scale), dropped), *flat).unflatten(1, (height, width))
        out = out[:, : size[0], : size[1]]
        state.watch(out)
        return out

    def sbp_window(self) -> Grid:
        """The window of the blocks behind it."""
        assert self.sbp_index is not None
        return self.sbp_state.running.shape.maps[self.sbp_index][:2]

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)


class SBPMerging(Merging, v1.PatchMerging):
    """timm's `PatchMerging` of Swin v1."""

    sbp_norm_first = True

    def forward(self, x: Tensor) -> Tensor:
        return self.sbp_forward(x, super().forward)


class SBPMergingV2(Merging, v2.PatchMerging):
    """timm's `PatchMerging` of Swin v2."""

    sbp_norm_first = False

    def forward(self, x: Tensor) -> Tensor:
        return self.sbp_forward(x, super().forward)


SBP_CLASSES = {
    v1.SwinTransformerBlock: SBPSwinBlock,
    v2.SwinTransformerV2Block: SBPSwinV2Block,
    v1.PatchMerging: SBPMerging,
    v2.PatchMerging: SBPMergingV2,
}
