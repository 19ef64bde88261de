"""What becomes of a step's kernels: weights cast together, or groups of kernels that a compiler makes one of."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from sbp.training.benchmark.launches import BLOCKS, CHUNK, TENSORS
from sbp.training.plan.operators import PASSES, Kernel

FUSED = "fused"
FUSIBLE = ("elementwise", "broadcast", "permuted", "cat", "move", "norm", "norm_backward", "norm_weights", "sum")


def cast_together(kernels: Sequence[Kernel]) -> list[Kernel]:
    """With one call a pass that casts all weights, and one that casts their gradients back."""
    rest = [kernel for kernel in kernels if not kernel.cast]
    for part in PASSES:
        casts = [kernel for kernel in kernels if kernel.cast and kernel.part == part]
        if casts:
            read, written = sum(one.read for one in casts), sum(one.written for one in casts)
            elements = read / (4 if part == "forward" else 2)
            launches = max(-(-len(casts) // TENSORS), round(elements / CHUNK / BLOCKS), 1)
            rest.append(Kernel("_foreach_copy_", "elementwise", part, 0.0, read, written, launches))
    return rest


@dataclass
class _Group:
    members: list[int] = field(default_factory=list)


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """As torch.compile runs them: each group of element-wise kernels, and of norms and sums beside them, is one kernel.

    A group takes in what reads its results, unless a matrix product or convolution lies between; of those each has a
    level below it. It reads once what comes from elsewhere, and writes what is read elsewhere. Sums over positions end
    a group, and so do the passes.
    """
    groups: list[_Group] = []
    group_of: dict[int, int] = {}  # kernel -> group
    level_of: dict[int, int] = {}  # storage -> how many kernels that are not fused lie before it
    made_by: dict[int, int] = {}  # storage -> kernel
    readers: dict[int, set[int]] = defaultdict(set)  # storage -> kernels
    result: list[Kernel] = []
    for i, kernel in enumerate(kernels):
        level = max((level_of.get(number, 0) for number, _ in kernel.inputs), default=0)
        for number, _ in kernel.inputs:
            readers[number].add(i)
        if kernel.kind not in FUSIBLE or kernel.part not in PASSES:
            result.append(kernel)
            level += 1
        else:
            group_of[i] = _choose(i, kernel, kernels, groups, group_of, level_of, made_by, level)
            groups[group_of[i]].members.append(i)
        for number, _ in kernel.outputs:
            level_of[number], made_by[number] = level, i
    return result + [_as_one([kernels[i] for i in one.members], set(one.members), readers) for one in groups]


def _choose(
    i: int,
    kernel: Kernel,
    kernels: Sequence[Kernel],
    groups: list[_Group],
    group_of: dict[int, int],
    level_of: dict[int, int],
    made_by: dict[int, int],
    level: int,
) -> int:
    """The group of a kernel that makes one of its inputs at the same level, else a new one."""
    for number, _ in kernel.inputs:
        maker = made_by.get(number)
        if maker is None or maker not in group_of or level_of[number] != level or _over_positions(kernel):
            continue
        if kernels[maker].part == kernel.part and not _over_positions(kernels[maker]):
            return group_of[maker]
    groups.append(_Group())
    return len(groups) - 1


def _over_positions(kernel: Kernel) -> bool:
    """Such as gradients of biases: other results than those that work along the channels."""
    return kernel.kind == "norm_weights" or (kernel.kind == "sum" and kernel.columns > 1)


def _as_one(members: Sequence[Kernel], numbers: set[int], readers: dict[int, set[int]]) -> Kernel:
    inside: set[int] = set()
    read: dict[int, float] = {}
    written: dict[int, float] = {}
    for kernel in members:
        for number, size in kernel.inputs:
            if number not in inside:
                read[number] = max(read.get(number, 0.0), size)
        for number, size in kernel.outputs:
            inside.add(number)
            if not readers[number] or readers[number] - numbers:
                written[number] = max(written.get(number, 0.0), size)
    first = members[0]
    return replace(first, kind=FUSED, read=sum(read.values()), written=sum(written.values()), launches=1)


def launches(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.count * kernel.launches for kernel in kernels)
