"""SBP for timm's ConvNeXt v1 and v2: blocks and the downsampling layers between stages.

Shapes: maps (B, C, H, W); N = H * W positions of which K are kept. Position-wise layers see positions (B, N, C),
whichever form the block's own layers take them in.

The depthwise convolution needs the whole map in every block and keeps its full gradient; norm, both pointwise
layers, activation, response norm and layer scale are SBP. The mask is drawn at the resolution of the last SBP
stage and enlarged for the earlier ones, so that the same image regions are kept throughout (Fang et al., 2022).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    GlobalResponseNormMlp,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    RmsNorm,
    RmsNorm2d,
    SimpleNorm,
    SimpleNorm2d,
)
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from sbp import input_gradient, neighbours, recompute
from sbp.backbone import Backbone, of_one_network, only, require
from sbp.functional import Streams, join, kept_gradient, rescale_gradient, split
from sbp.masks import Positions
from sbp.neighbours import Neighbourhood, neighbourhood
from sbp.recompute import Function
from sbp.state import LayerMap, Pass, Shape, State

SUPPORTED = "timm's ConvNeXt v1 and v2 (`ConvNeXtBlock` with a norm over channels)"


def find(model: nn.Module) -> Backbone | None:
    """The ConvNeXt in `model`, or None. Raises ValueError where SBP cannot train it."""
    only(model, ConvNeXt)  # of several it says what to do
    stages = {name: stage for name, stage in model.named_modules() if isinstance(stage, ConvNeXtStage)}
    if not stages:
        return None
    of_one_network([*stages])
    layers: dict[str, nn.Module] = {}
    stage_of: dict[str, int] = {}
    published: list[str] = []
    for index, (stage_name, stage) in enumerate(stages.items()):
        blocks = {f"{stage_name}.blocks.{i}": block for i, block in enumerate(stage.blocks)}
        before = _downsampling(f"{stage_name}.downsample", stage.downsample)
        for name, block in blocks.items():
            if type(block) is not ConvNeXtBlock or type(block.norm) not in _NORMS:
                raise ValueError(
                    f"{name} is a {type(block).__name__} with {type(block.norm).__name__}; SBP knows {SUPPORTED}"
                )
            require(name, block, ConvNeXtBlock)
            require(f"{name}.mlp", block.mlp, Mlp, GlobalResponseNormMlp)
        layers |= before | blocks
        stage_of |= dict.fromkeys(before | blocks, index)
        published += [*before, *list(blocks)[: _published_depth(index, len(blocks))]] if index < 3 else []
    strides = [_stride(stage) for stage in stages.values()]

    def state(names: list[str], *args: Any, **kwargs: Any) -> ConvNeXtState:
        return ConvNeXtState(names, *args, strides=strides, stages=[stage_of[name] for name in names], **kwargs)

    first_stage = next(iter(stages.values()))
    return Backbone(layers, published, [(first_stage, "enter_first_stage")], state, mhsa_drops=())


def _downsampling(name: str, layer: Any) -> dict[str, nn.Module]:
    """The layer by its name, where it can be SBP: not that of a dilated network, whose patches overlap."""
    if isinstance(layer, nn.Identity):
        return {}
    norm, conv = layer if isinstance(layer, nn.Sequential) and len(layer) == 2 else (None, None)
    if type(norm) not in _NORMS or not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{name} is not a norm over channels and a convolution; SBP knows {SUPPORTED}")
    is_patchwise = conv.kernel_size == conv.stride and conv.padding == (0, 0) and conv.dilation == (1, 1)
    return {name: layer} if is_patchwise else {}


def _published_depth(stage: int, depth: int) -> int:
    """How many blocks of a stage are SBP: all in the first two, then 6 of 9, 21 of 27, two thirds of others."""
    if stage < 2:
        return depth
    return 21 if depth == 27 else round(depth * 2 / 3)


def _stride(stage: Any) -> int:
    return 1 if isinstance(stage.downsample, nn.Identity) else stage.downsample[1].stride[0]


class ConvNeXtState(State):
    """Draws when the first stage receives its map.

    strides: of each stage's downsampling. stages: of each SBP layer, the index of its stage.
    """

    def __init__(self, *args: Any, strides: Sequence[int], stages: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strides = strides
        self.stages = stages

    def enter_first_stage(self, stage: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the first stage. Its input: (B, C, H, W)."""
        if self.is_idle:
            return
        (x,) = args
        height, width = x.shape[-2:]
        sizes, totals, total = [], [], 1
        for stride in self.strides:
            height, width, total = height // stride, width // stride, total * stride
            sizes.append((height, width))
            totals.append(total)
        last = max(self.stages)
        if not all(sizes[last]):
            raise ValueError(f"a map of {tuple(x.shape[-2:])} is too small for the SBP stages of this ConvNeXt")
        maps = tuple(LayerMap(*sizes[stage], totals[last] // totals[stage]) for stage in self.stages)
        self.begin(Shape(sizes[last], maps, len(x)), x.device)

        if self.settings.dropped == "neighbours" and self.current is not None and not self.current.around:
            self.current.around = list(self._neighbourhoods(self.current))

    def _neighbourhoods(self, current: Pass) -> Iterator[Neighbourhood | None]:
        """Of each SBP layer; those of layers on the same map are one."""
        known: dict[Any, Neighbourhood] = {}
        layers: Any = self.members
        for layer, where, on in zip(layers, current.positions, current.shape.maps, strict=True):
            if where is None:
                yield None
                continue
            size = layer.sbp_patch
            if (id(where), size) not in known:
                pixels = where if size == 1 else patches_of(where, on.width, size)
                known[id(where), size] = neighbourhood(pixels, LayerMap(*(size * one for one in on)))
            yield known[id(where), size]

    def around(self, where: Positions | None, index: int | None) -> Neighbourhood | None:
        """What SBP layer `index` lends gradients by in this pass, if it does."""
        lends = self.settings.dropped == "neighbours" and where is not None
        return self.running.around[index] if lends else None  # type: ignore[index]

    def split(
        self,
        x: Tensor,
        where: Positions,
        around: Neighbourhood | None,
        scale: float,
        patches: tuple[int, int] | None = None,
    ) -> Streams:
        """The streams that enter the branch of an SBP layer, of x (B, N, C).

        where: what it keeps of N, or of patches: so many in a row, and their side.
        """
        if around is not None:
            return neighbours.split(x, around)
        streams = split(x, *(where if patches is None else patches_of(where, *patches)))
        if self.passes_input:  # the scale is for the weights alone
            return Streams(rescale_gradient(streams.kept, 1 / scale), streams.dropped)
        return streams


class SBPConvNeXtBlock(ConvNeXtBlock):
    """timm's `ConvNeXtBlock`, whose pointwise part is trained through kept positions only.

    sbp_index: which SBP layer it is; None for one that keeps all positions and only recomputes.
    """

    sbp_compiled_method = "run"
    sbp_patch = 1  # the side of what it reads for each of its positions
    sbp_state: ConvNeXtState
    sbp_index: int | None
    mlp: Any  # with timm's own attributes, which torch's types do not know

    @classmethod
    def sbp_input_obstacle(cls, block: Any) -> str | None:
        """What of timm's block stands against dropped="input"; None where nothing does."""
        mlp = block.mlp
        parts = (mlp.grn,) if hasattr(mlp, "grn") else (mlp.drop1, mlp.norm, mlp.drop2)
        return input_gradient.obstacle(block.norm, mlp.act, *parts)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W)."""
        where = self.sbp_state.positions(self, self.sbp_index)
        compiled = self.training and "run" in vars(self)
        if where is None and self.sbp_state.recomputes(self) == "none" and not compiled:
            return super().forward(x)
        out = self.run(x, where, self.sbp_state.pointwise_scale(self, self.sbp_index))
        self.sbp_state.watch(out)
        return out

    def run(self, x: Tensor, where: Positions | None, scale: float) -> Tensor:
        """forward, with these positions or all. scale: of the gradient that enters the branch at kept positions."""
        shortcut = self.shortcut(x)
        # All of the pass is read here: when the branch runs again it may not be the last one any more.
        pointwise = partial(self._pointwise, where, self.sbp_state.around(where, self.sbp_index), scale)
        if self.sbp_state.recomputes(self) == "block":
            streams = recompute.block(pointwise, recompute.lowered(x), random=recompute.draws_random(self))
        else:
            streams = pointwise(x)
        y = _joined(streams, where, scale)  # (B, N, C)
        return self.drop_path(y.transpose(1, 2).unflatten(2, shortcut.shape[-2:])) + shortcut

    def extra_repr(self) -> str:
        return self.sbp_state.describe(self.sbp_index)

    def _pointwise(
        self, where: Positions | None, around: Neighbourhood | None, scale: float, x: Tensor, again: bool = False
    ) -> Streams:
        """The branch, from the block's input (B, C, H, W); again: without the values of dropped positions."""
        y = self.conv_dw(x).flatten(2).transpose(1, 2)
        streams = Streams(y, None) if where is None else self.sbp_state.split(y, where, around, scale)
        mlp, linear = self.mlp, partial(recompute.linear, cheap=self.sbp_state.recomputes(self) == "cheap")
        if where is not None and self.sbp_state.passes_input:
            assert streams.dropped is not None
            first, second = recompute.weights(mlp.fc1), recompute.weights(mlp.fc2, self.gamma)
            kept = linear(first, partial(_normed, self.norm), reads=[*self.norm.parameters()])(streams.kept)
            kept = linear(second, mlp.act)(kept)
            return Streams(kept, input_gradient.branch(streams.dropped, self.norm, first, mlp.act, second))
        first, second = (self._on_positions(one) for one in (mlp.fc1, mlp.fc2))
        up = linear(first, partial(_normed, self.norm), reads=[*self.norm.parameters()])
        down = partial(linear, second, scale=self.gamma)
        if hasattr(mlp, "grn"):
            return self._respond(streams, up, down)
        if again:
            streams = Streams(streams.kept, None)
        to_output = down(mlp.act, mlp.drop1, mlp.norm)
        return kept_gradient(lambda positions: mlp.drop2(to_output(up(positions))), streams)

    def _on_positions(self, layer: Any) -> Any:
        """What is called on positions (B, n, C) in place of a layer: of an adapter around a convolution a function."""
        if not self.use_conv_mlp or isinstance(layer, nn.Conv2d):
            return layer
        return lambda x: layer(x.transpose(1, 2).unsqueeze(-1)).flatten(2).transpose(1, 2)

    def _respond(self, x: Streams, up: Function, down: Callable[..., Function]) -> Streams:
        """The MLP of v2: response norm pools over both streams, with gradient through the kept one."""
        mlp = self.mlp
        hidden = kept_gradient(lambda positions: mlp.drop1(mlp.act(up(positions))), x)
        norms = kept_gradient(lambda positions: positions.norm(p=2, dim=1, keepdim=True), hidden)  # (B, 1, 4 C)
        whole = torch.stack([one for one in norms if one is not None]).norm(p=2, dim=0)
        response = whole / (whole.mean(dim=-1, keepdim=True) + mlp.grn.eps)
        weight, bias = mlp.grn.weight, mlp.grn.bias

        def respond(positions: Tensor) -> Tensor:
            return positions + torch.addcmul(bias, weight, positions * response)

        to_output = down(respond, reads=[response, weight, bias])
        return kept_gradient(lambda positions: mlp.drop2(to_output(positions)), hidden)


class SBPDownsample(nn.Sequential):
    """A norm and a convolution whose patches do not overlap: kept output positions can be computed alone."""

    sbp_state: ConvNeXtState
    sbp_index: int | None

    @property
    def sbp_patch(self) -> int:
        """As of a block."""
        conv: Any = self[1]
        return conv.kernel_size[0]

    @classmethod
    def sbp_input_obstacle(cls, layers: Any) -> str | None:
        """As of a block."""
        return input_gradient.obstacle(layers[0])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) to (B, C', H // s, W // s)."""
        where = self.sbp_state.positions(self, self.sbp_index)
        again = self.sbp_state.recomputes(self)
        norm: Any = self[0]
        conv: Any = self[1]
        if where is None and again == "none":
            return super().forward(x)
        size, scale = self.sbp_patch, self.sbp_state.pointwise_scale(self, self.sbp_index)
        height, width = x.shape[-2] // size, x.shape[-1] // size
        x = x[..., : height * size, : width * size].flatten(2).transpose(1, 2)  # (B, H * W, C), whole patches
        if where is None:
            everywhere = torch.arange(height * width, device=x.device)
            streams = Streams(x.index_select(1, patch_pixels(everywhere, width, size)), None)
        else:
            around = self.sbp_state.around(where, self.sbp_index)
            streams = self.sbp_state.split(x, where, around, scale, patches=(width, size))
        weights = recompute.weights(conv, weight=conv.weight.permute(0, 2, 3, 1).flatten(1))  # (C', s * s * C)
        to_output = recompute.linear(
            weights,
            partial(_normed, norm),  # (B, n * s * s, C)
            lambda pixels: pixels.reshape(len(pixels), -1, size * size * pixels.shape[-1]),
            reads=[*norm.parameters()],
            cheap=again != "none",
        )
        if where is not None and self.sbp_state.passes_input:
            assert streams.dropped is not None
            streams = Streams(to_output(streams.kept), input_gradient.branch(streams.dropped, norm, weights))
        else:
            streams = kept_gradient(to_output, streams)
        y = _joined(streams, where, scale)
        out = y.transpose(1, 2).unflatten(2, (height, width))
        self.sbp_state.watch(out)
        return out


def _joined(streams: Streams, where: Positions | None, scale: float) -> Tensor:
    """The branch of all positions, (B, N, C), from that of kept and dropped ones."""
    if where is None:
        return streams.kept
    return join(Streams(rescale_gradient(streams.kept, scale), streams.dropped), *where)


def _normed(norm: nn.Module, positions: Tensor) -> Tensor:
    """A norm over the channels of positions (B, n, C), whichever form it takes them in."""
    if type(norm) in (LayerNorm, RmsNorm, SimpleNorm):
        return norm(positions)
    return norm(positions.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def patches_of(where: Positions, patches_per_row: int, size: int) -> Positions:
    """The pixels of patches, each as whole."""
    return Positions(*(patch_pixels(patches, patches_per_row, size) for patches in where))


def patch_pixels(patches: Tensor, patches_per_row: int, size: int) -> Tensor:
    """Flat indices (..., n * size * size) of the pixels of patches (..., n), patch by patch, row by row within one."""
    width = patches_per_row * size
    first = patches // patches_per_row * (size * width) + patches % patches_per_row * size
    side = torch.arange(size, device=patches.device)
    return (first[..., None] + (side[:, None] * width + side).flatten()).flatten(-2)


SBP_CLASSES = {ConvNeXtBlock: SBPConvNeXtBlock, nn.Sequential: SBPDownsample}
_NORMS = (LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d)
