"""The ways in which timm runs a network's blocks, and whoever checkpoints it."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import assert_same_gradients, gradients


def with_checkpoints(model: nn.Module) -> None:
    """timm's own."""
    model.set_grad_checkpointing()


def checkpointed_as_a_whole(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


def through_intermediates(**options: int) -> Callable[[nn.Module], None]:
    """Blocks one by one, with what is between them. options: of timm's forward_intermediates."""

    def prepare(model: nn.Module) -> None:
        model.forward_features = lambda x, **_: model.forward_intermediates(x, **options)[0]

    return prepare


def assert_same_gradients_by(paths: list[Callable[[nn.Module], None]], make: Callable[[], nn.Module], x: Tensor):
    """Each model that a path has prepared has the gradients of the model as it is."""
    expected = gradients(make(), x)
    for prepare in paths:
        model = make()
        prepare(model)
        assert_same_gradients(gradients(model, x), expected, tolerance=1e-13)
