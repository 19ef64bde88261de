"""Forecasts the peak CUDA memory of one training step on a machine without a GPU, with fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sbp.state import State
from sbp.training.config import Config, scaled_lr
from sbp.training.loop import autocast
from sbp.training.models import build_model
from sbp.training.optim import build_criterion, build_ema, build_mixup, build_optimizer

CPU = torch.device("cpu")
ROUNDING = 512  # bytes; what CUDA's caching allocator rounds an allocation up to

# What CUDA's autocast computes in float32 and the CPU's does not. The first get a float32 copy of their inputs, which
# autograd saves; the second take the lower precision and return float32.
_FLOAT32_INPUTS = {
    *(F.layer_norm, F.group_norm, F.cross_entropy, F.cosine_similarity, F.softplus),
    *(torch.layer_norm, torch.group_norm, torch.rsqrt, torch.exp, torch.log, torch.pow, torch.reciprocal),
    *(Tensor.rsqrt, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.reciprocal),
}
_FLOAT32_RESULT = {torch.sum, Tensor.sum, Tensor.norm, torch.norm, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_LOG_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}


@dataclass(frozen=True)
class Forecast:
    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    saved: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries


class CudaCasts(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.item:
            return 1.0
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = kwargs | {"dropout_p": 0.0}
        if torch.is_autocast_enabled("cpu"):
            if func in _FLOAT32_INPUTS:
                up = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
                args, kwargs = tree_map(up, (args, kwargs))
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if func in _FLOAT32_RESULT | _SOFTMAX | _LOG_SOFTMAX:
                kwargs = {"dtype": torch.float32} | kwargs
        return func(*args, **kwargs)


class Allocations(TorchDispatchMode):
    """Records every storage that is allocated and freed."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.kinds = {}
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, tensors, kind=None):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                number, size = len(self.kinds), -(-storage.nbytes() // ROUNDING) * ROUNDING
                self.events.append((number, size))
                self.kinds[number] = "temporaries"
                self._live[key] = (number, size, weakref.ref(storage, lambda _, key=key: self._free(key)))
            if kind is not None:
                self.kinds[self._live[key][0]] = kind

    def _free(self, key):
        number, size, _ = self._live.pop(key)
        self.events.append((number, -size))

    def mark_live(self, kind):
        total = 0
        for number, size, _ in self._live.values():
            if self.kinds[number] == "temporaries":
                self.kinds[number] = kind
                total += size
        return total

    def at_peak(self):
        total, best, at = 0, 0, 0
        for i, (_, size) in enumerate(self.events):
            total += size
            if total > best:
                best, at = total, i
        parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "temporaries"), 0)
        for number, size in self.events[: at + 1]:
            parts[self.kinds[number]] += size
        return parts


def forecast(config: Config, micro_batch_size: int, world_size: int = 1) -> Forecast:
    recipe = config.recipe
    with torch.device("meta"):
        model = build_model(config.backbone, config.sbp, config.data.num_classes, config.data.image_size)
    criterion = build_criterion(recipe)
    mixup = build_mixup(recipe, config.data.num_classes, micro_batch_size)
    keep_gradients = world_size > 1 or config.global_batch_size > micro_batch_size * world_size
    with FakeTensorMode(), CudaCasts(), Allocations() as allocations:
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        for module in model.modules():
            state = vars(module).get("sbp_state")
            if state is not None:
                state.draw = torch.zeros((), dtype=torch.int64)
        allocations.note([*model.parameters(), *model.buffers()], "weights")
        ema = build_ema(model, recipe)
        if ema is not None:
            allocations.note([*ema.parameters(), *ema.buffers()], "optimizer")
        optimizer = build_optimizer(model, recipe, scaled_lr(recipe, config.global_batch_size))
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True
        for p in model.parameters():
            p.grad = torch.empty_like(p)
            allocations.note(p.grad, "gradients")
            p.register_post_accumulate_grad_hook(lambda p: allocations.note(p.grad, "gradients"))
        optimizer.step()
        allocations.note([v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)], "optimizer")
        optimizer.zero_grad(set_to_none=not keep_gradients)
        allocations.mark_live("temporaries")
        model.train()
        if mixup is not None:
            labels = torch.empty(micro_batch_size, config.data.num_classes)
        else:
            labels = torch.empty(micro_batch_size, dtype=torch.int64)

        def compute_loss():
            images = torch.empty(micro_batch_size, 3, config.data.image_size, config.data.image_size)
            with autocast(config.amp, CPU):
                return criterion(model(images), labels)

        loss = compute_loss()
        saved = allocations.mark_live("activations")
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model, step=1)
    return Forecast(**allocations.at_peak(), saved=saved)
