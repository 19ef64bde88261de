"""CUDA graphs of a micro batch: its forward and its backward pass are captured once, then replayed.

A replay asks the host for two launches instead of a thousand. Everything that changes from step to step is read from
memory that stays where it is: images and targets, the number of the mask's draw, and the state of the random number
generator, which torch gives to each replay. So a replay computes what the pass would compute anew.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sbp.recompute import draws_random
from sbp.settings import Settings
from sbp.training.runtime import distributed, wrapping

log = logging.getLogger(__name__)

WARM_UP = 3  # steps before a capture: they choose algorithms, compile, and make what lasts, such as averages

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """What `run()` returns, and a function that does its work again and leaves the results in the same tensors."""


class CudaRecorder:
    """CUDA graphs that share their memory: they have to be replayed in the order in which they were recorded."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        state = generator.get_state()
        torch._C._cuda_clearCublasWorkspaces()  # the capture's stream gets its own, of 32 MiB and more
        try:
            # Other threads, such as the loader's that pins memory, may ask the device for what a capture must not.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            self._leave(stream, generator, state)
            raise
        torch._C._cuda_clearCublasWorkspaces()  # the next capture takes the same memory for them
        return result, graph.replay

    def _leave(self, stream: torch.cuda.Stream, generator: torch.Generator, state: Tensor) -> None:
        """Out of a capture that failed. torch stays in it: in its stream, its memory, and its random numbers, of which
        each further one would raise."""
        torch.cuda.set_stream(stream)
        with suppress(RuntimeError):  # torch has left the memory already
            torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
            torch._C._cuda_releasePool(stream.device_index, self._pool)
        fresh = torch.Generator(stream.device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh)


class Pass:
    """One micro batch, run as its functions say.

    forward: of the inputs to the loss to back-propagate, and the figures to report, (1 + P,), without gradient.
    backward: of that loss.
    """

    def __init__(self, forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[[Tensor], None]) -> None:
        self._forward, self._backward = forward, backward
        self._inputs: tuple = ()
        self._loss: Tensor | None = None

    def take(self, inputs: tuple) -> None:
        """What the next forward pass is given. It need not live on where it comes from."""
        self._inputs = inputs

    def forward(self) -> Tensor:
        """The figures."""
        inputs, self._inputs = self._inputs, ()
        self._loss, figures = self._forward(*inputs)
        return figures

    def backward(self) -> None:
        loss, self._loss = self._loss, None
        assert loss is not None
        self._backward(loss)

    def forget(self) -> None:
        """What a forward pass has saved for a backward pass that does not come."""
        self._loss = None


class CapturedPass:
    """The same, replayed. Gradients are where the capture left them: set anew, or added to, as it then was.

    inputs: of the capture, which later ones are copied into.
    """

    def __init__(self, eager: Pass, recorder: Recorder, parameters: Sequence[nn.Parameter], inputs: tuple) -> None:
        self._inputs = inputs
        self._parameters = [p for p in parameters if p.requires_grad]
        before = [p.grad for p in self._parameters]

        def forward() -> Tensor:
            eager.take(inputs)
            return eager.forward()

        def backward() -> list[Tensor | None]:
            eager.backward()
            return [p.grad for p in self._parameters]

        try:
            self._figures, self._replay_forward = recorder.record(forward)
            self._gradients, self._replay_backward = recorder.record(backward)
        finally:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad

    def takes(self, inputs: tuple) -> bool:
        """Whether these inputs have the shapes and types of those that it was captured with."""
        return [(one.shape, one.dtype) for one in inputs] == [(one.shape, one.dtype) for one in self._inputs]

    def take(self, inputs: tuple) -> None:
        """What the next forward pass is given. It need not live on where it comes from."""
        for own, one in zip(self._inputs, inputs, strict=True):
            if own is not one:
                own.copy_(one)

    def forward(self) -> Tensor:
        """The figures, until the next forward pass."""
        self._replay_forward()
        return self._figures

    def backward(self) -> None:
        self._replay_backward()
        for p, grad in zip(self._parameters, self._gradients, strict=True):
            p.grad = grad


class Graphs:
    """Which passes of a training loop are captured, and when.

    eager: the pass as it runs without. parameters, buffers: of the model. A pass that sets gradients and one that adds
    to them are two; `kind` is whatever else makes a pass another one, such as exact backpropagation. Each kind is
    captured anew after WARM_UP steps of its own. A capture that fails is logged once, `failure` tells why, and the
    eager pass serves from then on.
    """

    def __init__(
        self,
        eager: Pass,
        parameters: Sequence[nn.Parameter],
        recorder: Callable[[], Recorder] = CudaRecorder,
        buffers: Sequence[Tensor] = (),
    ) -> None:
        self.eager, self.parameters, self.new_recorder = eager, list(parameters), recorder
        self.buffers = list(buffers)
        self.failure: str | None = None
        self.kind: Any = None
        self._warm_steps = 0
        self.release()

    def release(self) -> None:
        """Gives back the memory of what was captured; the next step captures again."""
        self._captured: dict[bool, CapturedPass] = {}
        self._recorder: Recorder | None = None

    @property
    def captured(self) -> bool:
        return bool(self._captured)

    def begin_step(self, kind: Any) -> None:
        if kind != self.kind:
            self.release()
            self.kind, self._warm_steps = kind, 0
        self._warm_steps += 1

    def pass_for(self, inputs: tuple, adds: bool) -> Pass | CapturedPass:
        """How to run a micro batch with these inputs.

        inputs: a capture keeps them, and copies later ones into them. adds: it adds to the gradients that there are;
        else there must be none.
        """
        if self.failure is not None or self._warm_steps <= WARM_UP:
            return self.eager
        if adds not in self._captured:
            with torch.random.fork_rng([one.device for one in inputs[:1] if one.is_cuda]):
                self._capture(inputs, adds)
        captured = self._captured.get(adds)
        return captured if captured is not None and captured.takes(inputs) else self.eager

    def _capture(self, inputs: tuple, adds: bool) -> None:
        if self._recorder is None:
            self._recorder = self.new_recorder()
        try:
            self._captured[adds] = CapturedPass(self.eager, self._recorder, self.parameters, inputs)
            return
        except Exception as error:  # whatever CUDA, the compiler or a user's layer raises there
            reason, place = _cause(error)
        # Only now, as the error's frames hold all that the pass has saved.
        self.release()
        self._forget()
        self.eager.take(inputs)
        before = [one.clone() for one in self.buffers]
        culprit = ", ".join(obstacles(self.eager.forward)) or place  # a whole forward pass, which batch norms count
        for one, value in zip(self.buffers, before, strict=True):
            one.copy_(value)
        self._forget()
        self.failure = f"could not be captured ({reason}); at {culprit}"
        log.warning("cuda_graph    %s. The run goes on without", self.failure)

    def _forget(self) -> None:
        self.eager.forget()
        gc.collect()


def reason_against(model: nn.Module, device: torch.device, *, same_shapes: bool) -> str | None:
    """Why the passes of this model cannot be captured; None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not same_shapes:
        return "the images have other sizes in each step"
    if wrapping.is_sharded(model):
        return "parallel=fsdp gathers the weights in each pass"
    if distributed.world_size() > 1 and any(True for _ in model.buffers()):
        return "the model has buffers, such as those of batch norms, which processes exchange in each pass"
    if any(isinstance(one, RotaryEmbeddingDinoV3) and _is_made_anew(one) for one in model.modules()):
        return "the rotary embedding is made on the CPU in each pass; ++backbone.kwargs.dynamic_img_size=false keeps it"
    blocks = [module for module in model.modules() if "sbp_state" in vars(module)]
    settings: list[Settings] = [block.sbp_state.settings for block in blocks]  # type: ignore[union-attr, misc]
    if any((one.recompute, one.exact_recompute) != ("none", "none") for one in settings) and draws_random(*blocks):
        return "dropout, or a part that may be random, runs again in the backward pass, which no replay can set back"
    return None


def _is_made_anew(embedding: RotaryEmbeddingDinoV3) -> bool:
    """In each pass, on the host."""
    return embedding.pos_embed_cached is None or embedding.aug_active


class _Obstacles(TorchDispatchMode):
    """Notes the operators that a CUDA graph cannot contain."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.name().partition(".")[0]
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
        masked = name == "aten::index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in _WAITING or masked or (name in _COPYING and len(devices) > 1):
            self.found.append(name)
        return result


_WAITING = {  # their results, or the shapes of them, are on the host
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::lift_fresh",  # a tensor made from Python's numbers
}  # fmt: skip
_COPYING = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}


def obstacles(run: Callable[[], Any]) -> list[str]:
    """The operators in `run()` that wait for the device, copy between devices or make tensors of Python's numbers."""
    with _Obstacles() as mode:
        try:
            run()
        except Exception as error:
            log.debug("while looking for what cannot be captured: %s", error)
    return list(dict.fromkeys(mode.found))


def _cause(error: BaseException) -> tuple[str, str]:
    """What was raised first, in a line, and where: what made a capture invalid comes before what noticed it."""
    while error.__context__ is not None:
        error = error.__context__
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return reason, "an unknown place" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
