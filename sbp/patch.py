"""Turns a timm model into its SBP form and back, in place, by swapping the classes of its layers."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sbp import beit, convnext, eva, hiera, masks, swin, vit
from sbp.backbone import Backbone
from sbp.refusals import why_not
from sbp.settings import Settings, check_integer
from sbp.state import State, states

FAMILIES = (vit, eva, beit, swin, hiera, convnext)
_PLAIN_CLASS = {sbp: plain for family in FAMILIES for plain, sbp in family.SBP_CLASSES.items()}
_WRAPPERS = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    *,
    keep_ratio: float | Sequence[float] = 0.5,
    mask: str = "grid",
    mhsa_drop: str = "qkv",
    layers: Sequence[str] | str | None = None,
    seed: int = 0,
    rank: int | None = None,
    evaluation: str = "exact",
    recompute: str = "none",
    mask_per: str = "batch",
    rescale: bool = False,
    dropped: str = "none",
    exact_recompute: str | None = None,
) -> Model:
    """Makes a timm backbone back-propagate through a kept subset of positions; returns the same model.

    ViT, DeiT, EVA, EVA-02, DINOv3, BEiT, Swin, Hiera and ConvNeXt: see `supports` and docs/supported.md.

    Call it before DDP or FSDP, torch.compile, the optimizer and EMA. Names, identity and values of the
    parameters stay. In evaluation mode and under `torch.no_grad` the model is timm's own, bit for bit. In
    training, forward hooks on a transformer's SBP blocks see pairs of kept and dropped tokens, those on their parts
    (attention, MLP, layer scale, drop path) do not run, those on norms and activations of SBP layers see one part of
    the positions at a time, and where the loss reads the class token alone, those on the last norm see only that.

    keep_ratio: share of positions with gradient, in (0, 1]; one number, or one for each SBP layer in the
        order of the network (their kept sets are then nested).
    mask: "grid" (regular diagonals; the paper's best) or "random".
    mhsa_drop: what attention drops ("head" in no Swin nor Hiera), as in section "Drop Method on MHSA" of the talk:
        "qkv": kept queries see kept keys and values only. With class-token pooling this equals dropping the
        tokens at the first SBP block, and their computation is skipped.
        "query": kept queries see all keys and values, with gradient.
        "head": max(1, round(keep_ratio * heads)) random heads run with gradient at all positions.
        "qkv_exact": as "qkv", but all keys and values are seen, without gradient at dropped positions; the
        forward pass equals the plain model's (not in the paper).
    layers: None for the published choice (the last two thirds of a ViT's blocks; of a ConvNeXt stages 1 and 2
        with the first 6 of 9 or 21 of 27 blocks of stage 3, else two thirds, and the downsampling between; likewise of
        networks that are like these, Swin and Hiera being like a ConvNeXt), "all", or qualified names.
    seed, rank: masks are a pure function of (seed, rank, number of the draw). rank: by default that of
        torch.distributed when a mask is drawn, so that each process draws its own masks.
    evaluation: "exact", or "published": evaluate with masks and partial attention, as the authors' code does.
    recompute: what every block of the network, SBP or not, computes again in the backward pass rather than save:
        "none".
        "cheap": norms and activation functions, which costs no matrix product. torch.compile makes this choice by
        itself. Linear layers are then read rather than called: forward hooks on them do not run, and those on norms and
        activations get outputs without gradient. Read are, always, those in front of a layer scale, and those that
        mhsa_drop="head" or dropped="input" splits up.
        "block": whole blocks (activation checkpointing), of an SBP block only the kept part.
        keep_ratio=1 with "cheap" or "block" is exact training with less memory. Hooks on what is computed again run
        again. Neither goes with `torch.func.functional_call`, whose parameters are gone in the backward pass.
    mask_per: what has a mask of its own; all keep the same number of positions (not in the paper, but for "batch"):
        "batch": all images of a forward pass have one mask.
        "half": the second half of the images keeps what the first half drops, at a ratio of 0.5 exactly so; at lower
        ones they share nothing, at higher ones as little as possible.
        "sample": each image, a pure function of (seed, rank, number of the draw, place in the batch).
        The heads of mhsa_drop="head" stay those of the batch. BEiT, relpos ViTs and Swin take "batch" alone, as their
        bias on attention would be another one for each image. Maps of a ConvNeXt have to be multiples of the mask grid.
    rescale: in the backward pass, multiply the gradient that enters a branch at a kept position by N / K (N positions
        of the grid, K of them kept; for the heads of "head" by all heads / kept ones), so that of each branch alone the
        weight gradient is an unbiased estimate of the exact one. That of prefix tokens, always kept, stays. What passes
        through several SBP branches or downsampling layers is multiplied in each of them.
    dropped: the gradient of dropped positions (not in the paper):
        "none".
        "input": exact for the input of every pointwise branch (a ConvNeXt's blocks and downsampling, the MLPs of a
        ViT), but for a rounding to few bits; weights have theirs from kept positions, times N / K, so that it is an
        unbiased estimate of the exact one. A dropped position then saves 3 C bytes instead of nothing, and costs half
        of the backward pass of a kept one. Of ViTs and ConvNeXt v1, with GELU, SiLU or ReLU and without dropout; a
        ViT needs a `mhsa_drop` under which the loss depends on dropped tokens.
        "neighbours": that of a branch's input is the mean of the kept positions' in the 3 x 3 cells of the mask around;
        weights as with "none". It saves nothing more than "none", and costs next to nothing. Of ConvNeXt v1 and v2.
    exact_recompute: `recompute` within `disabled`, where backpropagation is exact and would else save more; None for
        the same. The backward pass has to run within it, too.

    Raises ValueError for a model or a setting that is not supported, and for a model that is already patched.
    """
    _refuse_wrapped(model)
    exact_recompute = recompute if exact_recompute is None else exact_recompute
    settings = Settings(mask, mhsa_drop, evaluation, recompute, mask_per, rescale, dropped, exact_recompute)
    seed = check_integer("seed", seed, below=2**32)
    rank = None if rank is None else check_integer("rank", rank, below=2**32)
    backbone, sbp_classes = _find(model)
    if backbone.mhsa_drops and mhsa_drop not in backbone.mhsa_drops:
        raise ValueError(f"mhsa_drop must be one of {', '.join(backbone.mhsa_drops)} for this model, got {mhsa_drop!r}")
    names = _choose_layers(backbone, layers)
    for name in names if dropped == "input" else []:
        _check_input_gradient(name, backbone.layers[name], sbp_classes)
    for name in names if dropped == "neighbours" else []:
        kind = type(backbone.layers[name])
        if not hasattr(sbp_classes[kind], "sbp_patch"):
            raise ValueError(f"dropped='neighbours' is for the maps of a ConvNeXt, and {name} is a {kind.__name__}")

    state = backbone.state(names, _keep_ratios(keep_ratio, names), settings, seed=seed, rank=rank)
    state.members = [backbone.layers[name] for name in names]
    for name, layer in backbone.layers.items():
        if name in names or (recompute, exact_recompute) != ("none", "none"):
            layer.__class__ = sbp_classes[type(layer)]
            vars(layer).update(sbp_state=state, sbp_index=names.index(name) if name in names else None)
    for container in backbone.containers:
        container.__class__ = sbp_classes[type(container)]
    for module, hook in backbone.hooks:
        module.register_forward_pre_hook(getattr(state, hook))
    return model


@dataclass(frozen=True)
class Support:
    """Whether `apply` takes a model. True as a bool where it does.

    layers: the names of all layers that can be SBP, in the order of the network; published: those of the default.
    mhsa_drops: the choices of `mhsa_drop`; none where there is no attention.
    reason: why there are none, and what would work instead; empty where there are.
    """

    layers: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    mhsa_drops: tuple[str, ...] = ()
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def supports(model: nn.Module) -> Support:
    """Whether `apply` takes this model, and if not, why not and what would work instead. Changes nothing."""
    try:
        _refuse_wrapped(model)
        backbone, _ = _find(model)
    except ValueError as error:
        return Support(reason=str(error))
    return Support(tuple(backbone.layers), tuple(backbone.published), backbone.mhsa_drops)


def remove(model: Model) -> Model:
    """The plain timm model again, in place; returns it.

    Raises ValueError, and changes nothing, when the model is not patched, or is sharded by FSDP2.
    """
    own = states(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("call sbp.remove before the model is sharded")
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) in own:
                del module._forward_pre_hooks[key]
        if type(module) in _PLAIN_CLASS:
            module.__class__ = _PLAIN_CLASS[type(module)]
            module.__dict__.pop("sbp_state", None)
            module.__dict__.pop("sbp_index", None)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Exact backpropagation inside: every position has its gradient. Takes the model wrapped or not.

    What was applied with `exact_recompute` needs the backward pass inside, too.
    """
    with _set(states(model), enabled=False):
        yield


@contextmanager
def fixed_mask(model: nn.Module, keep: Tensor) -> Iterator[None]:
    """Every SBP layer uses this mask inside, for all images, whatever its keep ratio and `mask_per`.

    Takes the model wrapped or not.

    keep: bool (H, W), True where the gradient is kept, on the model's mask grid: the tokens of a ViT; the
    map of the last SBP stage of a ConvNeXt; the smallest window of a Swin, which it tiles; the mask units of a Hiera.
    Raises ValueError for another dtype or number of dimensions, or a
    mask that keeps nothing; the forward pass raises it for another shape.
    """
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.ndim != 2:
        kind = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"keep must be a bool tensor (H, W), got {kind}")
    if not keep.any():
        raise ValueError("keep has no True: a mask keeps at least one position")
    with _set(states(model), fixed=(keep.detach().cpu().clone(), int(keep.sum()))):
        yield


@contextmanager
def hold_mask(model: nn.Module) -> Iterator[None]:
    """One mask for all forward passes inside, such as the micro batches of an optimizer step.

    Takes the model wrapped or not. The draw advances by one on leaving; inside another one this changes nothing.
    """
    own = [state for state in states(model) if not state.held]
    for state in own:
        state.current = None  # what is held is drawn inside
    try:
        with _set(own, held=True):
            yield
    finally:
        for state in own:
            state.draw.add_(1)


def set_draw(model: nn.Module, draw: int) -> None:
    """The next forward pass draws mask number `draw`, whatever came before; the ones after it count on.

    Raises ValueError for a number that is no integer, or negative.
    """
    draw = check_integer("draw", draw)
    for state in states(model):
        state.set_draw(draw)


def set_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[float]) -> None:
    """From the next forward pass on, this share of positions has gradient: a number, or a list, as `apply` takes it.

    To be called between steps, not between a forward pass and its backward pass. Takes the model wrapped or not. The
    masks' draws go on. Another number of kept positions is another shape: compiled code is compiled anew, and a CUDA
    graph has to be captured anew. No part of `mask_state`: set it again when a run goes on. `keep_ratio_at` says what
    an epoch keeps. Raises ValueError, and changes nothing, for a ratio or a number of them that `apply` refuses.
    """
    own = states(model)
    found = [_keep_ratios(keep_ratio, state.layers) for state in own]
    for state, ratios in zip(own, found, strict=True):
        state.set_keep_ratios(ratios)


def mask_state(model: nn.Module) -> dict[str, int | None]:
    """What the masks to come depend on: {"seed", "rank", "draw"}. Reads `draw` from the model's device.

    rank: None where it is that of torch.distributed, so that all processes may load what one has saved.
    """
    state = _one_state(model)
    return {"seed": state.seed, "rank": state.own_rank, "draw": int(state.draw)}


def load_mask_state(model: nn.Module, saved: dict[str, int | None]) -> None:
    """Continues the masks where `mask_state` read them. Raises ValueError for what it does not return."""
    state = _one_state(model)
    if saved.keys() != {"seed", "rank", "draw"}:
        raise ValueError(f"saved must have seed, rank and draw, got {', '.join(map(str, saved)) or 'nothing'}")
    rank = None if saved["rank"] is None else check_integer("rank", saved["rank"], below=2**32)
    seed, draw = check_integer("seed", saved["seed"], below=2**32), check_integer("draw", saved["draw"])
    state.set_draw(draw)
    state.seed, state.own_rank = seed, rank


def effective_keep_ratio(model: nn.Module) -> float:
    """The share of positions kept in the last training forward pass, prefix tokens aside, mean over SBP layers.

    The requested ratio as the grid allows it. Raises RuntimeError before the first such pass.
    """
    return fmean(state.keep_ratio(i) for state in states(model) for i in range(len(state.layers)))


def _find(model: nn.Module) -> tuple[Backbone, dict[type, type]]:
    found: list[tuple[Backbone, dict[type, type]]] = []
    for family in FAMILIES:
        try:
            backbone = family.find(model)
        except ValueError:
            if found:  # what another family cannot train is a part of what this one can
                continue
            raise
        if backbone is not None:
            found.append((backbone, family.SBP_CLASSES))
    if not found:
        raise ValueError(why_not(model, " and ".join(family.SUPPORTED for family in FAMILIES)))
    own, *others = (_place(model, backbone) for backbone, _ in found)
    for place in others:  # within the first one, as a hybrid has it, or beside it
        if any(one != other for one, other in zip(own, place, strict=False)):
            names = f"{'.'.join(own)}, {'.'.join(place)}"
            raise ValueError(f"there are several backbones ({names}): call sbp.apply on each of them")
    _check_structure(*found[0])
    return found[0]


def _place(model: nn.Module, backbone: Backbone) -> list[str]:
    """The name of the backbone's network in the model, in parts: what the names of its layers and hooks share."""
    hooked = {module for module, _ in backbone.hooks}
    names = [*backbone.layers, *(name for name, module in model.named_modules() if module in hooked)]
    parts = zip(*(name.split(".") for name in names), strict=False)
    return [of_all[0] for of_all in takewhile(lambda of_all: len(set(of_all)) == 1, parts)]


def _check_structure(backbone: Backbone, sbp_classes: dict[type, Any]) -> None:
    name_of: dict[nn.Module, str] = {}
    for name, layer in backbone.layers.items():
        if (first := name_of.setdefault(layer, name)) != name:
            raise ValueError(f"{name} and {first} are the same module, which SBP knows once in a forward pass alone")
    for container in backbone.containers:
        if type(container) not in sbp_classes:
            known = " or ".join(kind.__name__ for kind in sbp_classes if issubclass(kind, nn.Sequential))
            raise ValueError(f"the blocks stand in a {type(container).__name__}, and SBP knows timm's {known}")


def _check_input_gradient(name: str, layer: nn.Module, sbp_classes: dict[type, Any]) -> None:
    find_obstacle = getattr(sbp_classes[type(layer)], "sbp_input_obstacle", lambda layer: f"a {type(layer).__name__}")
    obstacle = find_obstacle(layer)
    if obstacle is not None:
        raise ValueError(f"dropped='input' does not know {obstacle}, which {name} has")


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DataParallel):
            raise ValueError("SBP does not run in nn.DataParallel: take DistributedDataParallel, after sbp.apply")
        if isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod"):
            raise ValueError(f"call sbp.apply before the model is wrapped in {type(module).__name__}")
        if "sbp_state" in module.__dict__:
            raise ValueError("the model is already patched: call sbp.remove(model) first")


def _choose_layers(backbone: Backbone, layers: Sequence[str] | str | None) -> list[str]:
    if layers is None:
        return backbone.published
    if layers == "all":
        return list(backbone.layers)
    named = isinstance(layers, Collection) and not isinstance(layers, str)
    unknown = [name for name in layers if name not in backbone.layers] if named else [layers]
    if unknown or not layers:
        raise ValueError(
            f"layers must be None, 'all' or names of layers, got {unknown or layers}; "
            f"this model has {', '.join(backbone.layers)}"
        )
    return [name for name in backbone.layers if name in layers]


def _keep_ratios(keep_ratio: float | Sequence[float], names: list[str]) -> list[float]:
    if isinstance(keep_ratio, str) or not isinstance(keep_ratio, Sequence):
        return [masks.check_keep_ratio(keep_ratio)] * len(names)
    if len(keep_ratio) != len(names):
        raise ValueError(f"keep_ratio has {len(keep_ratio)} values for {len(names)} SBP layers: {', '.join(names)}")
    return [masks.check_keep_ratio(ratio) for ratio in keep_ratio]


def _one_state(model: nn.Module) -> State:
    own = states(model)
    if len(own) > 1:
        raise ValueError("the model holds several patched backbones: pass one of them")
    return own[0]


@contextmanager
def _set(own: list[State], **values: Any) -> Iterator[None]:
    """Sets attributes of the states, and sets them back."""
    before = [{name: getattr(state, name) for name in values} for state in own]
    for state in own:
        vars(state).update(values)
    try:
        yield
    finally:
        for state, old in zip(own, before, strict=True):
            vars(state).update(old)
