"""What the SBP layers of one model share: the settings, the mask state, and the masks of the current pass.

One `State` belongs to one patched model. A backbone family subclasses it with the hooks that tell it the size
of a forward pass (`vit.py`, `convnext.py`). It is no module and holds no buffer: state-dict keys stay timm's,
DDP broadcasts nothing, and a deep copy of the model gets a state of its own.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sbp import masks
from sbp.masks import Positions
from sbp.settings import Settings

Grid = tuple[int, int]  # height, width


class LayerMap(NamedTuple):
    """The map of positions that one SBP layer works on: height x width, factor times the mask grid."""

    height: int
    width: int
    factor: int = 1


class Shape(NamedTuple):
    """What a family's hook knows of a forward pass.

    grid: (H, W) of the mask. maps: the map of each SBP layer. images: how many, 1 where all have one mask.
    prefix_only: the loss will read nothing but prefix tokens. skips_dropped: nor will anything that it reads have read
    a dropped token. hands_on: the blocks hand their streams on to each other.
    """

    grid: Grid
    maps: tuple[LayerMap, ...]
    images: int
    prefix_only: bool = False
    skips_dropped: bool = False
    hands_on: bool = False


class Pass:
    """One forward pass: for each SBP layer its positions, or None where it keeps everything.

    key: the random number of the pass, int64 without dimensions.
    """

    def __init__(
        self, shape: Shape, positions: list[Positions | None], key: Tensor, fixed: tuple[Tensor, int] | None
    ) -> None:
        self.shape = shape
        self.fixed = fixed  # the mask that was set, rather than drawn
        self.positions = positions
        self.key = key
        self.around: list[Any] = []  # of each layer, what a family knows besides of its positions
        self.ran: set[int] = set()  # the SBP layers that ran with gradient
        self.backward: int | None = None  # the backward pass that has reached it


class State:
    """Settings and masks of a patched model. `layers` are the qualified names of its SBP layers, in order."""

    def __init__(
        self,
        layers: Sequence[str],
        keep_ratios: Sequence[float],
        settings: Settings,
        *,
        seed: int,
        rank: int | None,
        prefix: int = 0,
    ) -> None:
        self.layers = list(layers)
        self.keep_ratios = list(keep_ratios)
        self.settings = settings
        self.seed = seed
        self.own_rank = rank  # None for that of torch.distributed
        self.prefix = prefix
        self.members: list[nn.Module] = []  # the SBP layers themselves
        self.enabled = True
        self.held = False
        self.fixed: tuple[Tensor, int] | None = None  # a mask (H, W) and how many positions it keeps
        # The number of the next draw lives on the model's device, so that drawing never waits for it, and changes in
        # place, so that each replay of a captured graph draws a mask of its own.
        with torch.inference_mode(False):
            self.draw = torch.zeros((), dtype=torch.int64, device="cpu")
        self.current: Pass | None = None
        self._open: weakref.WeakSet[Pass] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # A copy takes part in no pass yet, and in no context that the original may be in.
        return vars(self) | {"current": None, "_open": None, "enabled": True, "held": False, "fixed": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, _open=weakref.WeakSet())

    @property
    def rank(self) -> int:
        """Of the process, which the masks depend on."""
        if self.own_rank is not None:
            return self.own_rank
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    # -- which passes are SBP passes

    @property
    def is_idle(self) -> bool:
        """Whether no SBP layer runs SBP now."""
        return not any(self.is_active(layer) for layer in self.members)

    def is_active(self, module: nn.Module) -> bool:
        """Whether `module` runs SBP now: in training with gradient, or in the authors' own evaluation."""
        if not self.enabled:
            return False
        active = torch.is_grad_enabled() if module.training else self.settings.evaluation == "published"
        if active and getattr(module, "_is_replica", False):
            raise RuntimeError("SBP does not run in nn.DataParallel: take DistributedDataParallel, on one GPU or more")
        return active

    @property
    def running(self) -> Pass:
        """The pass that an active SBP layer takes part in."""
        assert self.current is not None
        return self.current

    def recomputes(self, module: nn.Module) -> str:
        """What `module` computes again in the backward pass of now, which only training has."""
        if not (module.training and torch.is_grad_enabled()):
            return "none"
        return self.settings.recompute if self.enabled else self.settings.exact_recompute

    def positions(self, module: nn.Module, index: int | None) -> Positions | None:
        """The positions of SBP layer `index` in this pass; None where all have gradient."""
        if index is None or not self.is_active(module):
            return None
        if self.current is None:
            raise RuntimeError(f"{self.layers[index]} ran before the model drew a mask: call the model itself")
        if _in_backward():
            self._require_one_open_pass(index)
        elif not torch.compiler.is_compiling():
            self.current.ran.add(index)
        return self.current.positions[index]

    def keep_ratio(self, index: int) -> float:
        """The share of positions that SBP layer `index` kept in the last pass, prefix tokens aside."""
        if self.current is None:
            raise RuntimeError("no mask was drawn yet: the kept share is known after a training forward pass")
        where = self.current.positions[index]
        if where is None:
            return 1.0
        kept = where.keep.shape[-1] - self.prefix
        return kept / (kept + where.drop.shape[-1])

    def gradient_scale(self, module: nn.Module, index: int | None) -> float:
        """What multiplies the gradient that enters the branches of SBP layer `index` at kept positions."""
        if not self.settings.rescale or index is None or self.positions(module, index) is None:
            return 1.0
        return 1 / self.keep_ratio(index)

    @property
    def passes_input(self) -> bool:
        """Whether dropped positions pass on the gradient of a pointwise branch's input."""
        return self.settings.dropped == "input"

    def pointwise_scale(self, module: nn.Module, index: int | None) -> float:
        """The same of a branch that dropped positions pass on, too; the gradient that leaves it is divided again."""
        if not self.passes_input or index is None or self.positions(module, index) is None:
            return self.gradient_scale(module, index)
        return 1 / self.keep_ratio(index)

    def describe(self, index: int | None) -> str:
        """The settings of SBP layer `index` (None: of a layer that only recomputes), as its `repr` shows them."""
        settings: list[str] = []
        own = self.settings
        if index is not None:
            settings += [f"keep_ratio={self.keep_ratios[index]:g}", f"mask={own.mask}"]
            settings += [f"mask_per={own.mask_per}"] if own.mask_per != "batch" else []
            settings += ["rescale=True"] if own.rescale else []
            settings += [f"dropped={own.dropped}"] if own.dropped != "none" else []
        settings += [f"recompute={own.recompute}"] if own.recompute != "none" else []
        settings += [f"exact_recompute={own.exact_recompute}"] if own.exact_recompute != own.recompute else []
        return ", ".join(settings)

    # -- one forward pass

    def begin(self, shape: Shape, device: torch.device) -> None:
        """Draws the masks of a forward pass. Called by the family's hook in front of the first block."""
        if self.is_idle:
            return
        if _in_backward():  # a whole model is recomputed: its masks are those of its forward pass
            self._require_one_open_pass()
            return
        if self.settings.mask_per == "batch":  # not by _replace: torch 2.11 cannot compile what that makes
            shape = Shape(shape.grid, shape.maps, 1, *shape[3:])
        if self.draw.device != device:
            if torch.compiler.is_compiling():  # which no graph can do within the other
                self.draw = self.draw.to(device)
            else:
                with torch.inference_mode(False):  # what is made in that mode, training could not count on
                    self.draw = self.draw.to(device)
        before = self.current if self.held else None
        if before is not None and before.shape == shape and before.fixed is self.fixed:
            return
        key = masks.draw_key(self.seed, self.rank, self.draw)
        if not self.held:
            self.draw.add_(1)
        if self.fixed is not None:
            chosen = self._fixed_masks(shape.grid, device)
        else:
            chosen = self._drawn_masks(shape, key)
        known: dict[tuple[float, LayerMap], Positions | None] = {}
        for ratio, layer_map in zip(self.keep_ratios, shape.maps, strict=True):
            if (ratio, layer_map) not in known:
                known[ratio, layer_map] = self._enlarged(*chosen[ratio], layer_map)
        positions = [known[pair] for pair in zip(self.keep_ratios, shape.maps, strict=True)]
        self.current = Pass(shape, positions, key, self.fixed)

    def set_draw(self, draw: int | Tensor) -> None:
        """The next pass draws mask number `draw`."""
        self.draw.copy_(draw) if isinstance(draw, Tensor) else self.draw.fill_(draw)
        if self.held:
            self.current = None

    def set_keep_ratios(self, keep_ratios: list[float]) -> None:
        """Of the next pass on, one for each SBP layer."""
        if keep_ratios != self.keep_ratios:
            self.keep_ratios = keep_ratios
            if self.held:
                self.current = None

    def _drawn_masks(self, shape: Shape, key: Tensor) -> dict[float, tuple[Tensor, int]]:
        """For each ratio a mask on the grid, or one for each image, and how many positions it keeps."""
        height, width = shape.grid
        kind, per = self.settings.mask, self.settings.mask_per
        drawn = masks.nested_masks(kind, height, width, self.keep_ratios, key, per, shape.images)
        return {ratio: (mask, masks.kept_count(kind, height * width, ratio)) for ratio, mask in drawn.items()}

    def _fixed_masks(self, grid: Grid, device: torch.device) -> dict[float, tuple[Tensor, int]]:
        assert self.fixed is not None
        mask, count = self.fixed
        if mask.device != device:  # once
            mask, count = self.fixed = mask.to(device), count
        if tuple(mask.shape) != grid:
            raise ValueError(f"keep has shape {tuple(mask.shape)}, but the mask grid of this input is {grid}")
        return dict.fromkeys(self.keep_ratios, (mask, count))

    def _enlarged(self, mask: Tensor, count: int, layer_map: LayerMap) -> Positions | None:
        rows, columns = mask.shape[-2:]
        if count == rows * columns:
            return None
        height, width, factor = layer_map
        fine = masks.enlarge(mask, height, width, factor)
        if (height, width) == (rows * factor, columns * factor):
            count *= factor**2
        elif mask.ndim == 3:
            raise ValueError(
                f"mask_per={self.settings.mask_per!r} needs maps that are a multiple of the mask grid, as the images "
                f"would keep different numbers of positions: got a map of {height} x {width} and {factor} times a grid "
                f"of {rows} x {columns}; take another image size, or mask_per='batch'"
            )
        else:
            count = int(fine.sum())  # the border cuts blocks: only the mask itself knows
        return masks.positions(fine, count, self.prefix)

    # -- recomputation (activation checkpointing)

    def watch(self, output: Tensor) -> None:
        """Notes that the current pass awaits its backward pass, for as long as the graph of `output` lives."""
        current = self.current
        if current is None or not output.requires_grad or torch.compiler.is_compiling() or _in_backward():
            return
        current.backward = None
        self._open.add(current)
        output.register_hook(lambda _: setattr(current, "backward", torch._C._current_graph_task_id()))

    def _require_one_open_pass(self, index: int | None = None) -> None:
        running = torch._C._current_graph_task_id()
        waiting = [one for one in self._open if one.backward in (None, running)]
        if waiting != [self.current] or index not in {None, *self.running.ran}:
            raise RuntimeError(
                "SBP layers are recomputed in backward, but the masks of their forward pass are not at hand. "
                "Use non-reentrant checkpointing (use_reentrant=False), and either one forward pass for each "
                "backward pass or one mask for all of them (sbp.hold_mask). Where these are of images of several "
                "sizes, take sbp.apply(..., recompute='block') in place of checkpointing."
            )


def states(model: nn.Module) -> list[State]:
    """The states of all patched backbones within `model`, wrapped (DDP, torch.compile) or not.

    Raises ValueError when there is none.
    """
    found = {id(s): s for m in model.modules() if (s := m.__dict__.get("sbp_state")) is not None}
    if not found:
        raise ValueError("the model is not patched: call sbp.apply(model) first")
    return list(found.values())


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
