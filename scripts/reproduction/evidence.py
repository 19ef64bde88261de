"""What lies in the folder of a setting's results, and what it says of a claim."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import nan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sbp.training.record.status import read_json
from scripts.reproduction.arms import ARMS, NULLS, PARTIAL, exists
from scripts.reproduction.claims import Claim, arms_of, asks_of, gradients_of
from scripts.reproduction.settings import Setting
from scripts.reproduction.verdicts import NOT_RUN, Cost, Difference, combined, difference, needs_more, not_dominated

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Finding:
    """One line of a claim's verdict. what: who against whom, in words. why: what decides, if not the difference."""

    what: str
    measure: str
    found: Difference
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Evidence:
    """folder: of `setting` in the results of a scale."""

    setting: Setting
    folder: Path

    @cached_property
    def training(self) -> dict[str, dict[str, Any]]:
        """Records of trained arms, by arm."""
        return self._records("training")

    @cached_property
    def gradients(self) -> dict[str, dict[str, Any]]:
        """Records of gradient similarities, by arm, and under "nulls"."""
        return self._records("gradients")

    @cached_property
    def costs(self) -> dict[str, Any]:
        return read_json(self.folder / "costs.json")

    @cached_property
    def published(self) -> dict[str, Any]:
        """Of the evaluation with partial attention."""
        return self._records("published").get("sbp", {})

    def _records(self, kind: str) -> dict[str, dict[str, Any]]:
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / kind).glob("*.json"))}

    def trained(self, arm: str, figure: str) -> BySeed:
        """A figure of an arm's runs after the last epoch."""
        record = self.published if arm in PARTIAL else self.training.get(ARMS[arm].same_as or arm, {})
        return {run["seed"]: run[figure] for run in record.get("runs", [])}

    def cosines(self, method: str, stages: tuple[str, ...] = ("middle", "late"), figure: str = "cosine") -> BySeed:
        """Mean over the checkpoints of these stages of plain training; ("own",): on weights trained with SBP."""
        name = "own" if stages == ("own",) else "nulls" if method in NULLS else method
        runs = [run for run in self.gradients.get(name, {}).get("runs", []) if run["stage"] in stages]
        runs = [run for run in runs if method in run["found"]]
        return {
            seed: fmean(run["found"][method][figure] for run in runs if run["seed"] == seed)
            for seed in sorted({run["seed"] for run in runs})
        }

    def layers(self, method: str) -> dict[str, float]:
        """The cosine of each layer at the end of training, mean over the seeds."""
        record = self.gradients.get("nulls" if method in NULLS else method, {})
        late = [run["found"][method]["per_layer"] for run in record.get("runs", []) if run["stage"] == "late"]
        return {name: fmean(one[name] for one in late) for name in (late[0] if late else {})}

    def cost(self, arm: str) -> Cost | None:
        """Of a whole training; None where it was not measured."""
        record = self.training.get(ARMS[arm].same_as or arm) if arm in ARMS else None
        if record is None:
            return None
        shares = ARMS[arm].parts or {arm: 1.0}
        found = {part: self.costs.get("arms", {}).get(part) for part in shares}
        if None in found.values():
            return None
        memory = max(one.get("peak_allocated", one["memory"]) for one in found.values())
        step_ms = sum(share * found[part]["step_ms"] for part, share in shares.items())
        return Cost(memory, step_ms / 1000 * self._steps(record))

    def step_ms(self, arm: str) -> float | None:
        """Of one training step, mean over a run; None where it was not measured."""
        cost = self.cost(arm)
        return None if cost is None else 1000 * cost.time / self._steps(self.training[ARMS[arm].same_as or arm])

    def _steps(self, record: dict[str, Any]) -> int:
        return record["epochs"] * record["steps_per_epoch"]

    @property
    def on_cuda(self) -> bool:
        return any("peak_allocated" in one for one in self.costs.get("arms", {}).values())

    def provenance(self, claim: Claim) -> tuple[list[str], list[str]]:
        """The commits of a claim's runs, step times and gradients, and the devices of the runs."""
        arms = arms_of([claim], self.setting)
        runs = [self.training[name] for arm in arms if (name := ARMS[arm].same_as or arm) in self.training]
        commits = {commit for one in runs for commit in one.get("commits", [one["versions"]["commit"]])}
        costs, compared = self.costs.get("arms", {}), gradients_of([claim], self.setting)
        timed = {name for arm in arms for name in (ARMS[arm].parts or [arm])}
        commits |= {costs[name]["commit"] for name in timed & costs.keys()}
        commits |= {self.gradients[name]["versions"]["commit"] for name in compared if name in self.gradients}
        short = {commit[:7] + "-dirty" * commit.endswith("-dirty") for commit in commits}
        return sorted(short), sorted({device for one in runs for device in one.get("devices", [one["device"]])})

    def findings(self, claim: Claim) -> list[Finding]:
        """What decides the claim, in this setting; without what does not exist here."""
        found: list[Finding] = []
        if not asks_of(claim, self.setting):
            return found
        for one in claim.comparisons:
            if self.setting.gradients_only and one.measure != "cosine":
                continue
            if not (self._applies(one.better) and self._applies(one.worse)):
                continue
            what = f"{label(one.better)} against {label(one.worse)}"
            if one.measure == "cosine":
                gap = difference(self.cosines(one.better), self.cosines(one.worse))
            else:
                gap = difference(self.trained(one.worse, "val_loss"), self.trained(one.better, "val_loss"))
            found.append(Finding(what, one.measure, gap, gap.verdict))
        own = self.cost("sbp")
        for arm in [] if self.setting.gradients_only else claim.dominated_by:
            if not exists(arm, self.setting):
                continue
            gap = difference(self.trained(arm, "val_loss"), self.trained("sbp", "val_loss"))
            other = self.cost(arm)
            verdict, why = NOT_RUN, ""
            if own is not None and other is not None:
                verdict, why = not_dominated(gap, own, other), needs_more(own, other)
            found.append(Finding(f"not dominated by {label(arm)}", "val_loss", gap, verdict, why))
        return found

    def _applies(self, arm: str) -> bool:
        """Whether there can be such an arm, such a part of a batch or, of attention, such an evaluation."""
        return arm in NULLS or (self.setting.is_vit if arm in PARTIAL else exists(arm, self.setting))

    def verdict(self, claim: Claim) -> str:
        """ "" where the claim says nothing of such a setting."""
        findings = self.findings(claim)
        return combined([one.verdict for one in findings]) if findings else ""


def label(arm: str) -> str:
    return ARMS[arm].label if arm in ARMS else (NULLS | PARTIAL)[arm]


def standard_error(values: BySeed) -> float:
    """Of the mean; nan for fewer than two."""
    return stdev(values.values()) / sqrt(len(values)) if len(values) > 1 else nan
