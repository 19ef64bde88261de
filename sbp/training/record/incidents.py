"""What goes wrong in a run without ending it: unreadable images, and steps whose loss or gradient is not finite."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from sbp.training.record.checkpoint import Checkpoints
from sbp.training.record.files import lines, open_text, read_text, shown
from sbp.training.runtime import distributed

log = logging.getLogger(__name__)

CORRUPT_IMAGES = "corrupt_images.txt"
SKIPPED_STEPS = "skipped_steps.jsonl"
SMALLEST_SCALE = 1e-4  # 30 halvings of the first one; it doubles again after 2,000 good steps in a row
REMEDY = "What helps, from there with resume=FILE in another run_dir:"


class Incidents:
    """Counts them, lists them in the run's folder, and says when there are too many. The same on all processes.

    max_corrupt_images: of different ones, in the whole run. max_skipped_steps: in a row. amp, clip_grad: those of the
    run, so that what is already so is not advised.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: Checkpoints,
        max_corrupt_images: int,
        max_skipped_steps: int,
        amp: str = "off",
        clip_grad: float | None = None,
    ) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.amp, self.clip_grad = amp, clip_grad
        self.max_corrupt_images, self.max_skipped_steps = max_corrupt_images, max_skipped_steps
        self.corrupt_images: list[str] = []
        self.skipped_steps = self.skipped_in_a_row = self.overflowed_steps = 0

    def replaced(self, step: int, names: list[str]) -> None:
        """These images of this process could not be read, and others took their places. To be called by all together.

        Raises ValueError when they are too many.
        """
        everywhere = sorted({name for names in distributed.gathered(names) for name in names})
        new = [name for name in everywhere if name not in self.corrupt_images]
        if not new:
            return
        self.corrupt_images += new
        listed = self.folder / CORRUPT_IMAGES
        if distributed.is_main():
            _write(listed, lines(self.corrupt_images))
            for name in new:
                log.warning("cannot read %s; another image takes its place", shown(name))
        if len(self.corrupt_images) > self.max_corrupt_images:
            raise ValueError(
                f"{len(self.corrupt_images)} training images cannot be read by step {step + 1}, "
                f"data.max_corrupt_images={self.max_corrupt_images} are allowed; they are listed in {listed}"
            )

    def ran_out(self, step: int, names: list[str]) -> None:
        """Raises ValueError: some process found no readable images in the places of unreadable ones."""
        everywhere = [name for names in distributed.gathered(names) for name in names]
        raise ValueError(
            f"step {step + 1}: cannot read images, nor others in their places: {'; '.join(everywhere[:10])}. "
            f"Last good checkpoint: {self.checkpoints.newest() or 'none yet'}"
        )

    def step_skipped(self, step: int, value: float, images: list[str], what: str = "loss") -> None:
        """The loss of step number `step` was not finite in some process (here it was `value`), so it changed nothing.

        images: those of its global batch. what: "loss", or "gradient norm". Raises ValueError after too many such
        steps in a row.
        """
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        value = next(one for one in distributed.gathered(value) if not math.isfinite(one))
        listed = self.folder / SKIPPED_STEPS
        if distributed.is_main():
            line = {"step": step + 1, what.replace(" ", "_"): str(value), "images": images}
            _write(listed, json.dumps(line) + "\n", "a")
            log.warning("step %d left out: its %s is %s; its images are listed in %s", step + 1, what, value, listed)
        if self.skipped_in_a_row > self.max_skipped_steps:
            raise ValueError(
                f"the {what} is {value} in step {step + 1}; {self.skipped_in_a_row} steps in a row had to be left out "
                f"(max_skipped_steps={self.max_skipped_steps}). Their images ({images[0]}, ...) are in {listed}. "
                f"Last good checkpoint: {self.checkpoints.newest() or 'none yet'}. {REMEDY} {self._remedies()}"
            )

    def _remedies(self) -> str:
        """Settings that are not in force."""
        clip = "recipe.clip_grad=1" if self.clip_grad is None or self.clip_grad > 1 else "a lower recipe.clip_grad"
        precision = {"float16": ", amp=bfloat16", "bfloat16": ", amp=off"}.get(self.amp, "")
        return f"a lower recipe.lr, {clip}{precision}"

    def step_succeeded(self) -> None:
        """A step had a finite loss and gradient."""
        self.skipped_in_a_row = 0

    def step_overflowed(self, step: int, scale: float) -> None:
        """In float16 a step's gradient was not finite, which changed nothing but the loss scale, now `scale`.

        So the scale finds its place, in the first steps above all. Raises ValueError when that has happened so often
        that float16 cannot hold the gradients at any scale.
        """
        self.skipped_in_a_row = 0
        self.overflowed_steps += 1
        if distributed.is_main():
            log.info("step %d left out: its gradient overflows float16; the loss scale falls to %g", step + 1, scale)
        if scale < SMALLEST_SCALE:
            raise ValueError(
                f"the gradients stay infinite in float16: by step {step + 1} the loss scale has fallen to {scale:.1e}. "
                f"Last good checkpoint: {self.checkpoints.newest() or 'none yet'}. "
                f"{REMEDY} amp=bfloat16, a lower recipe.lr"
            )

    def figures(self) -> dict[str, float]:
        """Those to log; none while nothing has gone wrong."""
        counts = {
            "corrupt_images": len(self.corrupt_images),
            "skipped_steps": self.skipped_steps,
            "overflowed_steps": self.overflowed_steps,
        }
        return {name: float(count) for name, count in counts.items() if count}

    def state_dict(self) -> dict[str, Any]:
        names = ("corrupt_images", "skipped_steps", "skipped_in_a_row", "overflowed_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def forget_after(self, step: int) -> None:
        """Leaves out of the list the steps behind number `step`, which are run again."""
        listed = self.folder / SKIPPED_STEPS
        if distributed.is_main() and listed.is_file():
            kept = [line for line in read_text(listed).splitlines() if _step_of(line) <= step]
            _write(listed, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """Of a line that a killed process has not finished, infinite."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with open_text(path, mode) as file:
            file.write(text)
    except OSError as error:
        log.warning("cannot write %s (%s)", path, error)
