"""The peak CUDA memory of one training step, forecast on a machine without a GPU.

One optimizer step runs on fake tensors: they have shapes and dtypes, but no memory. Every storage that the step
allocates and frees is written down, and the largest sum is the peak. The fake tensors are the CPU's, as autograd runs
a backward pass on CUDA tensors only where there is a CUDA device; where CUDA casts or allocates otherwise, this module
says so (`CudaCasts`, `_workspace`).

Not in a forecast: the CUDA context, workspaces of cuBLAS and cuDNN, fragmentation, and what torch.compile saves. It is
to be compared with `torch.cuda.max_memory_allocated`.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sbp.settings import RECOMPUTE
from sbp.training.config.batches import plan_batches, scaled_lr
from sbp.training.config.rules import validate
from sbp.training.config.run import Config
from sbp.training.memory import detection
from sbp.training.models.build import build_model
from sbp.training.models.optim import FUSED, build_criterion, build_ema, build_mixup, build_optimizer
from sbp.training.runtime import distributed
from sbp.training.runtime.precision import autocast
from sbp.training.tasks.choice import task_of
from sbp.training.tasks.detection.detector import Detector

P = ParamSpec("P")
T = TypeVar("T")

PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")
KEEP_RATIOS = (1.0, 0.5, 0.25)

_CPU = torch.device("cpu")
_HOST = "host"  # what lies in the CPU's memory during a step on CUDA
_ROUNDING = 512  # bytes: CUDA's caching allocator rounds every allocation up to a multiple of this


@dataclass(frozen=True)
class Forecast:
    """Bytes of CUDA memory at the peak of one optimizer step, in parts that add up to it.

    weights: parameters and buffers.
    gradients: those of the parameters that exist at the peak.
    optimizer: its state, and the moving average of the weights.
    activations: saved for the backward pass, with the weights' copies in lower precision.
    temporaries: all else, such as gradients of activations.
    saved: not one of the parts: all that is saved when the forward pass ends, whenever the peak is.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    saved: int

    @property
    def peak(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


class CudaCasts(TorchFunctionMode):
    """Within autocast, what CUDA computes in float32 and the CPU would not; and answers that no fake tensor has."""

    # These see their inputs as float32, so that autograd may save a copy ...
    float32_inputs: frozenset[Callable] = frozenset({
        *(F.layer_norm, F.group_norm, F.cosine_similarity, F.softplus, F.cross_entropy, F.nll_loss, F.kl_div),
        *(F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.interpolate),
        *(torch.layer_norm, torch.group_norm, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp),
        *(torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal),
    })  # fmt: skip
    # ... and these read what they get and return float32.
    float32_result: frozenset[Callable] = frozenset({
        *(torch.sum, Tensor.sum, torch.norm, Tensor.norm, torch.linalg.vector_norm, torch.prod, Tensor.prod),
        *(torch.cumsum, Tensor.cumsum, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    })  # fmt: skip
    softmax: frozenset[Callable] = frozenset({F.softmax, torch.softmax, Tensor.softmax})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item:  # of the optimizer's step counter: any number will do
            return 1.0
        if func is F.scaled_dot_product_attention:  # CUDA's fused kernels save no mask, the CPU's takes no dropout
            kwargs = kwargs | {"dropout_p": 0.0}
        if torch.is_autocast_enabled("cpu"):
            if func in self.float32_inputs:
                args, kwargs = tree_map(_as_float32, (args, kwargs))
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
            if func in self.float32_result:
                kwargs = {"dtype": torch.float32} | kwargs
            if func in self.softmax:
                return _softmax(*args, **kwargs)
        return func(*args, **kwargs)


def _as_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _softmax(x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    """In float32; CUDA's kernel reads float16 itself and turns other dtypes into a copy."""
    return torch._softmax(x, dim, x.dtype == torch.float16) if x.dtype == torch.float16 else x.float().softmax(dim)


def _workspace(func: Any, args: tuple) -> int:
    """Bytes that CUDA's kernel for `func` allocates for itself, beside its results."""
    operator = func.overloadpacket
    if operator in (torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward):
        tensors = (arg for arg in args[:2] if isinstance(arg, Tensor))  # it works on contiguous copies
        return sum(x.numel() * x.itemsize for x in tensors if not x.is_contiguous())
    if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        batch, heads, tokens, channels = args[1].shape
        if args[1].dtype != torch.float32:  # flash attention sums the queries' gradient in float32
            return 4 * batch * heads * _round_up(tokens, 128) * _round_up(channels, 32)
    return 0


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Allocations(TorchDispatchMode):
    """Writes down every storage that is allocated and freed inside, and what each one is for."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []  # of each storage
        self.events: list[tuple[int, int]] = []  # number of a storage; its bytes, negative when it is freed
        self._alive: dict[int, tuple[int, int, weakref.ref]] = {}  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out)
        workspace = _workspace(func, args)
        if workspace:
            self._add(workspace)
            self._remove(len(self.kinds) - 1, workspace)
        return out

    def note(self, tensors: Any, kind: str | None = None) -> None:
        """Takes the storages of these tensors, in any container, as allocated; `kind` says what they are for."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._alive:
                number, size = self._add(storage.nbytes())
                freed = weakref.ref(storage, partial(self._freed, address))
                self._alive[address] = number, size, freed
            if kind is not None:
                self.kinds[self._alive[address][0]] = kind

    def rename_temporaries(self, kind: str) -> int:
        """What is alive and of no kind yet gets this one; returns its bytes."""
        found = [(number, size) for number, size, _ in self._alive.values() if self.kinds[number] == "temporaries"]
        for number, _ in found:
            self.kinds[number] = kind
        return sum(size for _, size in found)

    def peak(self) -> dict[str, int]:
        """Bytes of each part when their sum was largest."""
        parts = dict.fromkeys((*PARTS, _HOST), 0)
        largest, total, at_peak = 0, 0, dict(parts)
        for number, size in self.events:
            kind = self.kinds[number]
            parts[kind] += size
            total += size if kind != _HOST else 0
            if total > largest:
                largest, at_peak = total, dict(parts)
        return {part: at_peak[part] for part in PARTS}

    def _freed(self, address: int, _: weakref.ref) -> None:
        number, size, _ = self._alive.pop(address)
        self._remove(number, size)

    def _add(self, size: int) -> tuple[int, int]:
        number, size = len(self.kinds), _round_up(size, _ROUNDING)
        self.kinds.append("temporaries")
        self.events.append((number, size))
        return number, size

    def _remove(self, number: int, size: int) -> None:
        self.events.append((number, -_round_up(size, _ROUNDING)))


class Rules:
    """How a step is run: today's way. `forecast_paper.PaperRules` has the way of the paper's authors."""

    casts: type[CudaCasts] = CudaCasts
    foreach = True  # optimizers that are not fused update all parameters at once on CUDA, with copies of their state
    images_stay = False  # on the device until the step ends
    bytes_per_parameter = 0  # of whatever else is held throughout

    def build(self, config: Config) -> nn.Module:
        if config.task == "detection":
            return detection.build(config)
        data = config.data
        return build_model(config.backbone, config.sbp, data.num_classes, data.image_size, data.train_image_size)

    def begins(self, part: str) -> None:
        """Called as each part of the step begins: clipping, optimizer, average, batch, forward, backward."""

    def keeps_gradients(self, config: Config, micro_batch_size: int, world_size: int) -> bool:
        """Whether gradients are there already when a forward pass starts: those of the micro batch before, or DDP's."""
        return world_size > 1 or config.global_batch_size > micro_batch_size


TODAY = Rules()


def forecast(config: Config, micro_batch_size: int, *, world_size: int = 1, rules: Rules = TODAY) -> Forecast:
    """Simulates one of `world_size` processes from an optimizer update, that of the step before, up to the next.

    Raises ValueError for what a run with this config would raise it for, data sets aside.
    """
    _check(config, micro_batch_size)
    if config.sbp.exact_epochs:  # whose steps need most
        config = with_sbp(config, keep_ratio=1.0)
    recipe, criterion = config.recipe, _criterion(config)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    keeps_gradients = rules.keeps_gradients(config, micro_batch_size, world_size)
    with torch.device("meta"):
        model = rules.build(config)

    conditions = detection.Conditions() if config.task == "detection" else nullcontext()
    with _fake_cuda(rules.casts()) as allocations, conditions:
        _materialise(model, memory_format)
        if isinstance(model, Detector):
            detection.choose_as_many_as_there_may_be(model, config)
        allocations.note([*model.parameters(), *model.buffers()], "weights")
        ema = build_ema(model, recipe)
        if ema is not None:
            allocations.note([*ema.parameters(), *ema.buffers()], "optimizer")
        parameters = [p for p in model.parameters() if p.requires_grad]
        fused = rules.foreach and recipe.optimizer in FUSED
        optimizer = build_optimizer(model, recipe, scaled_lr(recipe, config.global_batch_size), fused=fused)
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = rules.foreach and not fused
        for p in parameters:
            p.grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(lambda p: allocations.note(p.grad, "gradients"))
        allocations.note([p.grad for p in parameters], "gradients")
        rules.begins("clipping")
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        rules.begins("optimizer")
        optimizer.step()  # makes its state, too
        _note_state(allocations, optimizer)
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        rules.begins("average")
        if ema is not None:
            ema.update(model, step=1)
        rules.begins("batch")
        held = torch.empty(rules.bytes_per_parameter * sum(p.numel() for p in parameters), dtype=torch.uint8)
        allocations.note(held, "gradients")

        model.train()
        images, targets = _batch(config, micro_batch_size)
        images = images.to(memory_format=memory_format)  # type: ignore[call-overload]
        rules.begins("forward")
        with autocast(config.amp, _CPU):
            loss = criterion(model, images, targets)
        if not rules.images_stay:
            del images, targets
        saved = allocations.rename_temporaries("activations")
        # `loss.backward()`, within the modes above: called by that name it would leave the casts, which whatever is
        # recomputed in the backward pass needs as well.
        rules.begins("backward")
        one = torch.ones_like(loss)
        _engine_run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return Forecast(**allocations.peak(), saved=saved)


def largest_micro_batch(config: Config, gib: float, *, world_size: int = 1, rules: Rules = TODAY) -> int:
    """The largest micro batch size whose forecast is at most `gib` GiB; 0 when not even the smallest one fits.

    The forecast is nearly affine in the batch size: each try is where the line through the last ones meets `gib`.
    """
    if not gib > 0:
        raise ValueError(f"memory_gib must be above 0, got {gib}")
    budget = gib * 2**30
    unit = 2 if _mixes(config) else 1  # images in pairs
    fits, too_many, n = 0, None, 8
    at_fits: float = 0
    while too_many is None or too_many - fits > 1:
        one = forecast(config, n * unit, world_size=world_size, rules=rules)
        if fits == 0:
            at_fits = one.weights + one.optimizer
        per_unit = max((one.peak - at_fits) / (n - fits), 1)
        if one.peak <= budget:
            fits, at_fits = n, one.peak
        else:
            too_many = n
        n = max(fits + 1, fits + int((budget - at_fits) / per_unit))
        n = n if too_many is None else min(n, too_many - 1)
    return fits * unit


def keep_ratio_table(
    config: Config, micro_batch_size: int, *, world_size: int = 1, rules: Rules = TODAY
) -> dict[str, dict[float, Forecast]]:
    """For each way of recomputing the forecasts of the keep-ratios; at ratio 1 backpropagation is exact."""
    return {
        mode: {
            ratio: forecast(
                with_sbp(config, enabled=True, keep_ratio=ratio, recompute=mode),
                micro_batch_size,
                world_size=world_size,
                rules=rules,
            )
            for ratio in KEEP_RATIOS
        }
        for mode in (RECOMPUTE if rules is TODAY else ("none",))
    }


def advice(config: Config, micro_batch_size: int, available: int, *, world_size: int = 1) -> str:
    """Lines that name the settings with which a step fits into `available` bytes, by forecast."""

    def needed(config: Config, micro_batch_size: int = micro_batch_size) -> int:
        return forecast(config, micro_batch_size, world_size=world_size).peak

    lines = [f"forecast: {needed(config) / 2**20:.1f} MiB at the peak; available: {available / 2**20:.1f} MiB"]
    options: list[tuple[str, int]] = []
    enable, sbp = "" if config.sbp.enabled else "sbp.enabled=true ", config.sbp
    exact = {} if sbp.enabled else {"keep_ratio": 1.0}
    for mode in RECOMPUTE[RECOMPUTE.index(sbp.recompute) + 1 :]:
        keys = "".join(f"sbp.{key}={value} " for key, value in exact.items())
        changed = with_sbp(config, enabled=True, recompute=mode, **exact)
        options.append((f"{enable}{keys}sbp.recompute={mode}", needed(changed)))
    largest = max(sbp.keep_ratio) if isinstance(sbp.keep_ratio, list) else sbp.keep_ratio
    for ratio in KEEP_RATIOS[1:]:
        if not sbp.enabled or ratio < largest:
            changed = with_sbp(config, enabled=True, keep_ratio=ratio)
            options.append((f"{enable}sbp.keep_ratio={ratio}", needed(changed)))
    share = config.global_batch_size // world_size
    unit = 2 if _mixes(config) else 1
    for smaller in sorted((n for n in range(unit, micro_batch_size, unit) if share % n == 0), reverse=True):
        options.append((f"micro_batch_size={smaller} (same global_batch_size)", needed(config, smaller)))
        if options[-1][1] <= available:
            break
    fitting = [f"  {keys:<50} {size / 2**20:.1f} MiB" for keys, size in options if size <= available]
    return "\n".join(
        [*lines, "these would have fitted:" if fitting else "no single change would have fitted", *fitting]
    )


def advised(run: Callable[Concatenate[Config, P], T]) -> Callable[Concatenate[Config, P], T]:
    """A training run that ends with advice, as a ValueError, where it would end with an out-of-memory error of CUDA."""

    @wraps(run)
    def advising(config: Config, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(config, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            world_size = distributed.world_size()
            plan = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
            try:
                lines = advice(config, plan.micro_batch_size, available_memory(), world_size=world_size)
            except ValueError as reason:
                lines = f"no forecast of what would have fitted: {reason}"
            raise ValueError(f"out of memory with micro_batch_size={plan.micro_batch_size}\n{lines}") from error

    return advising


def available_memory() -> int:
    """Bytes of CUDA memory that this process has or could have now."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def with_sbp(config: Config, **changes: Any) -> Config:
    """The config with these keys of its group `sbp`."""
    return replace(config, sbp=replace(config.sbp, **changes))


def _check(config: Config, micro_batch_size: int) -> None:
    no_images = replace(config.data, source=task_of(config).generated)  # a forecast reads none
    validate(replace(config, data=no_images, micro_batch_size=micro_batch_size))
    build_mixup(config.recipe, config.data.num_classes, micro_batch_size)


def _batch(config: Config, size: int) -> tuple[Tensor, Any]:
    """The images and targets of a micro batch."""
    data, side = config.data, config.data.size_in_training
    if config.task == "detection":
        return detection.batch(config, size)
    labels = torch.empty(size, data.num_classes) if _mixes(config) else torch.empty(size).long()
    return torch.empty(size, 3, side, side), labels


def _criterion(config: Config) -> Callable[[Any, Tensor, Any], Tensor]:
    """The loss of a model on images and targets."""
    if config.task == "detection":
        return detection.loss
    criterion = build_criterion(config.recipe)
    return lambda model, images, labels: criterion(model(images), labels)


def _mixes(config: Config) -> bool:
    return bool(config.recipe.mixup or config.recipe.cutmix)


def _materialise(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Gives a model on the meta device fake memory."""

    def fake(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, memory_format=memory_format if t.ndim == 4 else None)

    model._apply(fake)
    for module in model.modules():
        state = vars(module).get("sbp_state")
        if state is not None:
            state.draw = torch.zeros((), dtype=torch.int64)


def _note_state(allocations: Allocations, optimizer: Optimizer) -> None:
    for tensor in tree_leaves(list(optimizer.state.values())):
        if isinstance(tensor, Tensor):
            allocations.note(tensor, "optimizer" if tensor.ndim else _HOST)  # step counters stay in CPU memory


@contextmanager
def _fake_cuda(casts: CudaCasts) -> Iterator[Allocations]:
    """What is made inside is fake and written down."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy, for the EMA
        with _FakeMode(), casts, Allocations() as allocations:
            try:
                yield allocations
            except DataDependentOutputException as error:
                raise ValueError(
                    "no forecast for this size of training images: it cuts mask blocks at the border, and how many "
                    "pixels are kept then differs from step to step; take a multiple of 32"
                ) from error


class _FakeMode(FakeTensorMode):
    """A deep copy of a fake tensor, such as the moving average's, belongs to the same mode."""

    def __deepcopy__(self, memo: dict) -> "_FakeMode":
        return self
