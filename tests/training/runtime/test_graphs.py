"""Captured passes: the loop's logic against a stand-in that calls again, what a capture must not meet, and CUDA."""

import gc
import json
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sbp
from sbp.training.engine import setup, trainer
from sbp.training.runtime import graphs
from sbp.training.runtime.graphs import WARM_UP, CapturedPass, CudaRecorder, Graphs, Pass, obstacles
from tests.conftest import cuda_only, images, small_convnext, small_eva, small_vit
from tests.training import runs
from tests.training.again import Again
from tests.training.comparing import assert_equal

RANDOM = {
    "sbp": {"mask": "random"},
    "backbone": {"drop_path": 0.2},
    "recipe": {"epochs": 3, "mixup": 0.8, "random_erasing": 0.5, "ema_decay": 0.9, "clip_grad": 1.0},
}


def use(monkeypatch, recorder):
    """In place of CUDA graphs."""
    monkeypatch.setattr(
        trainer, "Graphs", lambda eager, weights, _, buffers: Graphs(eager, weights, lambda: recorder(weights), buffers)
    )


@pytest.fixture
def recorder(device, monkeypatch):
    """CUDA graphs on CUDA, else the stand-in, which the framework then takes for them."""
    Again.recorded = Again.replayed = 0
    if device.type != "cuda":
        use(monkeypatch, Again)
        monkeypatch.setattr(graphs, "reason_against", lambda *_, **__: None)
    return Again


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backbone", "amp", "micro_batch_size"),
    [
        ("vit", "float16", 4),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [("vit", "off", 16), ("vit", "bfloat16", 4)]),
        *(pytest.param("convnext", amp, 4, marks=pytest.mark.long) for amp in ("bfloat16", "float16")),
        pytest.param("convnext", "off", 16, marks=pytest.mark.long),
    ],
)
def test_a_replayed_run_is_the_eager_one(tmp_path, device, recorder, backbone, amp, micro_batch_size):
    config = runs.configured(
        backbone,
        **RANDOM,
        device=device.type,
        deterministic=True,
        amp=amp,
        micro_batch_size=micro_batch_size,
        log_every_steps=1,
        probe={"every_steps": 5},
    )
    ends = []
    for cuda_graph in (False, "auto"):
        config.cuda_graph = cuda_graph
        ends.append(runs.run(config, tmp_path / str(cuda_graph)))
    for key in ("state_dict", "state_dict_ema", "optimizer", "scaler", "step"):
        assert_equal(ends[0][key], ends[1][key], key)
    if device.type != "cuda":
        kinds = 1 if micro_batch_size == 16 else 2
        assert recorder.recorded == 2 * kinds  # forward and backward pass
        assert recorder.replayed == 2 * (12 - WARM_UP) * (16 // micro_batch_size)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"exact_epochs": 2}, marks=pytest.mark.long),
        {"exact_epochs": 2, "exact_recompute": "block"},
        {"keep_ratio": 0.25, "keep_ratio_end": 0.75},
        *(pytest.param({key: True}, marks=pytest.mark.long) for key in ("fixed_mask", "hold_mask")),
    ],
    ids=str,
)
def test_what_changes_from_step_to_step_changes_in_replays(tmp_path, device, recorder, settings):
    config = runs.configured(**RANDOM | {"sbp": settings | {"mask": "random"}}, device=device.type, micro_batch_size=8)
    config.deterministic = True
    ends = []
    for cuda_graph in (False, "auto"):
        config.cuda_graph = cuda_graph
        ends.append(runs.run(config, tmp_path / str(cuda_graph)))
    assert_equal(ends[0]["state_dict"], ends[1]["state_dict"])
    if device.type != "cuda":  # where steps change after 4 of them: one is replayed, then all is captured anew
        kinds = 3 if "keep_ratio_end" in settings else 2 if "exact_epochs" in settings else 1
        assert recorder.recorded == 4 * kinds


def test_a_capture_that_fails_is_named_and_the_run_goes_on(tmp_path, device, recorder, monkeypatch, caplog):
    class Fails(Again):
        def record(self, run):
            run()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    use(monkeypatch, Fails)
    real = nn.CrossEntropyLoss.forward

    def reads_back(self, x, y):
        assert float(x.detach().sum()) == float(x.detach().sum())
        return real(self, x, y)

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", reads_back)
    config = runs.configured(backbone={"drop_path": 0.2})
    with caplog.at_level(logging.WARNING):
        end = runs.run(config, tmp_path / "fails")
    (message,) = [record.getMessage() for record in caplog.records if "cuda_graph" in record.getMessage()]
    wanted = "could not be captured (RuntimeError: operation not permitted when stream is capturing); at aten::_local"
    assert wanted in message and json.loads((tmp_path / "fails" / "summary.json").read_text())["cuda_graph"] in message
    config.cuda_graph = False
    assert_equal(end["state_dict"], runs.run(config, tmp_path / "eager")["state_dict"])


@pytest.mark.parametrize("which", [1, 2], ids=["forward", "backward"])
def test_a_capture_that_fails_leaves_nothing_in_memory(which):
    """Neither what the pass has saved, nor what the search for the culprit has."""
    weight, average, saved = nn.Parameter(torch.ones(3)), torch.zeros(()), []

    class Saved:
        pass

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.saved = Saved()
            saved.append(weakref.ref(ctx.saved))
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def forward(x):
        average.add_(1)
        return Square.apply(x * weight).sum(), x.sum()[None]

    class Fails(Again):
        def record(self, run):
            found = super().record(run)
            if Again.recorded == before + which:
                raise RuntimeError("not possible while capturing") from ValueError("a buffer")
            return found

    before = Again.recorded
    eager = Pass(forward, lambda loss: loss.backward())
    some = Graphs(eager, [weight], lambda: Fails([weight]), [average])
    gc.disable()
    try:
        for _ in range(WARM_UP + 1):
            some.begin_step(None)
            assert some.pass_for((torch.ones(2, 3),), adds=False) is eager
        assert len(saved) == 2 and not any(one() is not None for one in saved)
        assert average == 1  # of the capture, of which CUDA computes nothing
    finally:
        gc.enable()
    assert some.failure is not None and "not possible while capturing" in some.failure


@pytest.mark.gpu
def test_after_a_capture_that_fails_the_run_is_the_eager_one(tmp_path, device, recorder, monkeypatch, caplog):
    """Drop path, masks and mixup go on drawing: torch leaves the generator in the middle of such a capture."""
    if cuda_only(device, "the stand-in captures whatever there is"):
        real = nn.CrossEntropyLoss.forward
        monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda self, x, y: real(self, x, y) + 0 * float(x.sum()))
    config = runs.configured(**RANDOM | {"recipe": {"epochs": 3}}, device=device.type, deterministic=True)
    with caplog.at_level(logging.WARNING):
        end = runs.run(config, tmp_path / "fails")
    messages = [record.getMessage() for record in caplog.records if "cuda_graph" in record.getMessage()]
    if device.type == "cuda":
        assert len(messages) == 1 and "at aten::_local_scalar_dense" in messages[0]
    config.cuda_graph = False
    assert_equal(end["state_dict"], runs.run(config, tmp_path / "eager")["state_dict"])


def test_nothing_of_earlier_passes_lives_on_when_capturing(tmp_path, recorder, monkeypatch):
    """A node that adds up a gradient remembers the stream where it was made; in a capture's, it makes that invalid."""
    models, alive = [], []
    build = setup.build_trainer

    @torch.enable_grad()
    def nodes():
        return {name: p.expand_as(p).grad_fn.next_functions[0][0] for name, p in models[0].named_parameters()}

    def mark(*_):
        for node in nodes().values():
            node.metadata["seen"] = True

    def building(*given):
        trainer = build(*given)
        models.append(trainer.model)
        trainer.model.register_forward_hook(mark)
        return trainer

    class Looks(Again):
        def record(self, run):
            alive.append([name for name, node in nodes().items() if "seen" in node.metadata])
            return super().record(run)

    monkeypatch.setattr(setup, "build_trainer", building)
    use(monkeypatch, Looks)
    config = runs.configured(**RANDOM, micro_batch_size=8, log_every_steps=1, probe={"every_steps": 1})
    runs.run(config, tmp_path / "run")
    forward, backward = alive[::2], alive[1::2]
    assert len(alive) == 4 and not any(forward) and all(backward)


def test_inputs_of_another_shape_run_as_they_are(recorder):
    weight = nn.Parameter(torch.ones(3))
    eager = Pass(lambda x: ((x * weight).sum(), x.sum()[None]), lambda loss: loss.backward())
    some = Graphs(eager, [weight], lambda: Again([weight]))
    for _ in range(WARM_UP):
        some.begin_step(None)
        assert some.pass_for((torch.ones(2, 3),), adds=False) is eager
    some.begin_step(None)
    one = some.pass_for((torch.ones(2, 3),), adds=False)
    assert isinstance(one, CapturedPass) and some.pass_for((torch.ones(1, 3),), adds=False) is eager
    for value in (2.0, 3.0):
        weight.grad = None
        one.take((torch.full((2, 3), value),))
        assert one.forward() == 6 * value
        one.backward()
        assert torch.equal(weight.grad, torch.full((3,), 2 * value))
    some.release()
    assert not some.captured and isinstance(some.pass_for((torch.ones(1, 3),), adds=False), CapturedPass)


def test_reasons_against():
    model = small_vit()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert graphs.reason_against(model, cpu, same_shapes=True) == "the device is cpu"
    assert "other sizes" in graphs.reason_against(model, cuda, same_shapes=False)
    assert graphs.reason_against(model, cuda, same_shapes=True) is None
    dropout = sbp.apply(small_vit(proj_drop_rate=0.1), recompute="block")
    assert "dropout" in graphs.reason_against(dropout, cuda, same_shapes=True)
    sbp.remove(dropout)
    assert "dropout" in graphs.reason_against(sbp.apply(dropout, exact_recompute="cheap"), cuda, same_shapes=True)
    sbp.remove(dropout)
    assert graphs.reason_against(sbp.apply(dropout), cuda, same_shapes=True) is None
    dinov3 = "vit_small_patch16_dinov3"
    assert "dynamic_img_size=false" in graphs.reason_against(small_eva(dinov3), cuda, same_shapes=True)
    assert graphs.reason_against(small_eva(dinov3, dynamic_img_size=False), cuda, same_shapes=True) is None
    with pytest.raises(ValueError, match="cuda_graph=true is not possible here: the device is cpu"):
        config = runs.configured(cuda_graph=True, device="cpu")
        setup.build_trainer(config, setup.load_images(config, cpu).order, cpu)


class Seen(TorchDispatchMode):
    """The operators of a step, and the storages that they read without having made them."""

    def __init__(self):
        super().__init__()
        self.operators, self.made, self.foreign = [], set(), {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves
        for one in leaves((args, kwargs)):
            if isinstance(one, torch.Tensor) and (at := one.untyped_storage()._cdata) not in self.made:
                self.foreign[at] = one
        result = operator(*args, **(kwargs or {}))
        new = [one for one in leaves(result) if isinstance(one, torch.Tensor)]
        self.made |= {one.untyped_storage()._cdata for one in new} - set(self.foreign)
        self.keep = [*getattr(self, "keep", []), *new]  # lest an address is used again
        self.operators.append((operator.name(), [tuple(one.shape) for one in new]))
        return result


SETTINGS = {
    "vit": lambda: sbp.apply(small_vit(drop_path_rate=0.2)),
    "vit query": lambda: sbp.apply(small_vit(drop_path_rate=0.2), mhsa_drop="query", mask="random"),
    "vit head": lambda: sbp.apply(small_vit(), mhsa_drop="head"),
    "vit qkv_exact cheap": lambda: sbp.apply(small_vit(global_pool="avg"), mhsa_drop="qkv_exact", recompute="cheap"),
    "vit block": lambda: sbp.apply(small_vit(drop_path_rate=0.2), recompute="block"),
    "vit sample": lambda: sbp.apply(small_vit(), mask_per="sample", keep_ratio=0.3),
    "vit half, ratios": lambda: sbp.apply(small_vit(), mask_per="half", keep_ratio=[0.75, 0.5, 0.5, 0.3]),
    "vit query, input": lambda: sbp.apply(small_vit(), mhsa_drop="query", dropped="input"),
    "vit rescaled": lambda: sbp.apply(small_vit(), rescale=True),
    "dinov3": lambda: sbp.apply(small_eva("vit_small_patch16_dinov3", dynamic_img_size=False)),
    "convnext": lambda: sbp.apply(small_convnext(drop_path_rate=0.2)),
    "convnext random cheap": lambda: sbp.apply(small_convnext(), mask="random", recompute="cheap"),
    "convnext block": lambda: sbp.apply(small_convnext(drop_path_rate=0.2), recompute="block"),
    "convnext, input": lambda: sbp.apply(small_convnext(), dropped="input", recompute="cheap"),
    "convnext, neighbours": lambda: sbp.apply(small_convnext(), dropped="neighbours"),
    "convnext v2": lambda: sbp.apply(small_convnext(use_grn=True)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_warm_step_can_be_captured(name):
    """No copy between devices, no value read back, no tensor of Python's numbers; the same operators in each step.

    They read parameters, the declared input and the number of the draw, and nothing else that was there before.
    """
    model = SETTINGS[name]().float()
    x = images(64 if "convnext" in name else 32).float()

    def step():
        model.zero_grad()
        model(x).square().sum().backward()

    step()
    assert obstacles(step) == []
    seen = []
    for _ in range(2):
        with Seen() as mode:
            step()
        seen.append(mode)
    assert seen[0].operators == seen[1].operators
    (state,) = sbp.state.states(model)
    declared = [x, state.draw, *model.parameters(), *model.buffers()]
    allowed = {one.untyped_storage()._cdata for one in declared}
    assert {at: tuple(one.shape) for at, one in seen[1].foreign.items() if at not in allowed} == {}


def test_obstacles_are_found():
    x = torch.arange(4.0)
    assert obstacles(lambda: x[x > 1].sum().item()) == ["aten::index", "aten::_local_scalar_dense"]
    assert obstacles(lambda: x * torch.tensor(2.0)) == ["aten::lift_fresh"]
    assert obstacles(lambda: x.to("meta")) == ["aten::_to_copy"]


# -- anybody's own loop


@pytest.mark.gpu
def test_each_replay_of_a_users_own_graph_draws_a_mask(device):
    """torch.cuda.graph around a patched model; on the CPU the same step is called again."""
    model = sbp.apply(small_vit(), mask="random").to(device)
    x = images().to(device)
    (state,) = sbp.state.states(model)
    kept = torch.zeros(9, dtype=torch.int64, device=device)

    def step():
        model(x).square().sum().backward()
        kept.copy_(state.running.positions[0].keep)

    for _ in range(2):
        step()
    model.zero_grad()
    if device.type == "cuda":
        _, replay = CudaRecorder().record(step)
    else:
        replay = step
    expected = sbp.apply(small_vit(), mask="random")
    sbp.set_draw(expected, int(state.draw))
    found = []
    for _ in range(6):
        replay()
        expected(images())
        (other,) = sbp.state.states(expected)
        assert kept.cpu().equal(other.running.positions[0].keep)
        found.append(tuple(kept.tolist()))
    assert len(set(found)) > 1 and int(state.draw) == int(other.draw)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["make_graphed_callables", pytest.param("reduce-overhead", marks=pytest.mark.long)])
def test_each_call_of_a_graphed_callable_draws_a_mask(device, how):
    model = sbp.apply(small_vit(), mask="random").to(device)
    x = images().to(device)
    if how == "reduce-overhead":
        options = {"mode": how} if device.type == "cuda" else {"backend": "aot_eager"}
        call = torch.compile(model, **options)
    elif cuda_only(device, "torch makes graphed callables of CUDA's tensors alone"):
        call = torch.cuda.make_graphed_callables(nn.Sequential(model), (x,))  # which refuses modules with hooks
    else:
        call = model
    gradients = []
    for _ in range(6):
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append(model.blocks[-1].mlp.fc1.weight.grad.clone())
    assert any(not torch.equal(one, gradients[0]) for one in gradients[1:])
    (state,) = sbp.state.states(model)
    assert int(state.draw) >= 6
