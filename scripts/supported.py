"""Writes docs/supported.md, every timm architecture by module, which takes minutes: python -m scripts.supported"""

from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timm
import torch

import sbp
from sbp.refusals import REASONS
from sbp.training.record.files import write_text
from sbp.training.record.table import markdown

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"

HEAD = """# What `sbp.apply` takes

`python -m scripts.supported` writes this page: it builds all {all} architectures of timm {timm} without weights
and asks `sbp.supports` about each. It takes **{taken}** of them. Of one model:

```python
print(sbp.supports(timm.create_model("resnet50")).reason)
```
"""


def refusals_of(module: str) -> dict[str, str]:
    """Each architecture of one of timm's modules, with why it is refused; empty where it is supported."""
    found = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            model = timm.create_model(name)
        found[name] = sbp.supports(model).reason
    return found


def page(refused: dict[str, dict[str, str]]) -> str:
    """refused: of each timm module, what `refusals_of` says."""
    taken, left = [["timm's module", "architectures", "supported", "not"]], []
    for module, reasons in refused.items():
        names = defaultdict(list)
        for name, reason in reasons.items():
            names[reason.partition(", for which")[0]].append(name)
        count = len(names.pop("", ()))
        if count:
            others = [f"{', '.join(f'`{one}`' for one in some)}: {reason}" for reason, some in names.items()]
            taken.append([f"`{module}`", str(len(reasons)), str(count), "; ".join(others)])
        else:
            left.append((module, len(reasons)))
    by_reason = defaultdict(list)
    for module, count in left:
        by_reason[REASONS[module]].append(f"`{module}` {count}")
    total, supported = sum(map(len, refused.values())), sum(int(row[2]) for row in taken[1:])
    parts = [
        HEAD.format(all=total, taken=supported, timm=timm.__version__),
        markdown(taken),
        "## What it does not take",
    ]
    rows = [["why", "timm's modules, with their architectures"]]
    rows += [[reason, ", ".join(modules)] for reason, modules in by_reason.items()]
    return "\n\n".join(part.strip() for part in [*parts, markdown(rows)]) + "\n"


def main() -> None:
    modules = timm.list_modules()
    with ProcessPoolExecutor(2) as pool:
        write_text(PAGE, page(dict(zip(modules, pool.map(refusals_of, modules), strict=True))))


if __name__ == "__main__":
    main()
