"""One training run, from its settings to its summary.

Steps are optimizer steps; each consumes one global batch of the sample stream (`data.py`). What a step draws is
derived from the seed and its number, so a run that is cut anywhere and resumed ends in the same weights.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sbp
from sbp.training import checkpoint, data, optim, probes
from sbp.training.config import TrainConfig, UserError, accumulation_steps, scaled_lr, to_dict
from sbp.training.distributed import Processes
from sbp.training.evaluation import evaluate
from sbp.training.model import apply_sbp, build_model
from sbp.training.tracking import Tracker

DTYPES = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(config: TrainConfig, folder: Path, processes: Processes) -> dict[str, Any]:
    """Trains, or goes on training, in `folder`; returns the summary, which `summary.json` holds too.

    Raises UserError for what is wrong with the settings or the data, before the first step.
    """
    trainer = Trainer(config, folder, processes)
    tracker = None
    if processes.is_first:
        print(trainer.describe(), flush=True)
        (folder / "run.json").write_text(json.dumps(trainer.provenance(), indent=2))
        tracker = Tracker(folder, config.logger, trainer.provenance(), trainer.run_id, trainer.step)
        trainer.run_id = tracker.run_id or trainer.run_id
    exit_code = 1
    try:
        summary = trainer.fit(tracker)
        exit_code = 0
    finally:
        if tracker is not None:
            tracker.finish(exit_code)
    return summary


class Trainer:
    """The state of a run: model, optimizer, and how far it has come."""

    def __init__(self, config: TrainConfig, folder: Path, processes: Processes) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        recipe, device = config.recipe, processes.device
        if config.threads:
            torch.set_num_threads(config.threads)
        self.micro, self.accumulation = accumulation_steps(
            config.global_batch_size, config.micro_batch_size, processes.world_size
        )
        if (recipe.mixup or recipe.cutmix) and self.micro % 2:
            raise UserError(f"mixup pairs images: micro_batch_size must be even, it is {self.micro}")
        self.train_images = data.open_images(config.data, training=True)
        self.val_images = data.open_images(config.data, training=False)
        self.epoch_images = len(self.train_images)  # type: ignore[arg-type]
        self.steps = recipe.epochs * self.epoch_images // config.global_batch_size
        if not self.steps:
            raise UserError(
                f"global_batch_size={config.global_batch_size} is more than {recipe.epochs} epochs of "
                f"{self.epoch_images} images"
            )

        data.seed_everything(config.seed)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = build_model(config.backbone, config.data.num_classes, config.data.image_size)
        if config.sbp.enabled:
            apply_sbp(self.model, config.sbp, config.seed)
        self.model.to(device, memory_format=self.memory_format)
        self.lr = scaled_lr(recipe, config.global_batch_size)
        self.optimizer = optim.build_optimizer(self.model, recipe, self.lr)
        self.schedule = optim.build_schedule(self.optimizer, recipe, self.steps)
        self.loss, self.mixup = optim.build_loss(recipe, config.data.num_classes)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.ema = optim.build_ema(self.model, recipe)

        self.step = 0  # optimizer steps whose images are consumed
        self.updates = 0  # those that changed the weights: a gradient scaler skips some
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # since the epoch began
        self.loss_count = 0
        self.cosine_sum, self.cosine_count = 0.0, 0
        self.run_id: str | None = None
        self._resume()
        self.wrapped = self._wrap()

    # -- the run

    def fit(self, tracker: Tracker | None) -> dict[str, Any]:
        config = self.config
        self.saved_bytes = self._probe_saved_bytes()
        self.memory = probes.PeakMemory(self.processes.device)
        stop = min(self.steps, config.stop_after_steps or self.steps)
        batches = self._batches(stop)
        values: dict[str, float] = {}
        while self.step < stop:
            epoch = self.epoch()
            last = min(stop, self._first_step_of(epoch + 1))
            seconds = self._train_until(last, batches, tracker)
            if self.step == self.steps or self.step >= self._first_step_of(epoch + 1):
                values = self._end_of_epoch(epoch, seconds)
                self._record(values, tracker)
                every = config.checkpoint.every_epochs
                if every and (epoch + 1) % every == 0 and self.step < stop:
                    self._save()
        self._save()
        if self.step < self.steps:
            return {"finished": False, "step": self.step, "steps": self.steps}
        return self._summarise(values, tracker)

    def epoch(self) -> int:
        """The epoch that the next step begins in, counted from 0."""
        return self.step * self.config.global_batch_size // self.epoch_images

    def _first_step_of(self, epoch: int) -> int:
        return min(self.steps, math.ceil(epoch * self.epoch_images / self.config.global_batch_size))

    def _train_until(self, last: int, batches: Iterator, tracker: Tracker | None) -> dict[str, float]:
        """Optimizer steps up to `last`; returns the seconds spent in them, and of those the ones waiting for data."""
        seconds = {"total": 0.0, "wait": 0.0, "images": 0.0}
        images = self.config.global_batch_size
        first = self.processes.is_first
        bar = tqdm(
            total=(last - self.step) * images,
            desc=f"epoch {self.epoch() + 1}/{self.config.recipe.epochs}",
            unit="img",
            disable=not (first and sys.stderr.isatty()),
            leave=False,
        )
        with bar:
            while self.step < last:
                start = perf_counter()
                seconds["wait"] += self._optimizer_step(batches)
                seconds["total"] += perf_counter() - start
                seconds["images"] += images
                bar.set_postfix_str(f"waiting for data {seconds['wait'] / seconds['total']:.0%}", refresh=False)
                bar.update(images)
                every = self.config.checkpoint.every_steps
                if every and self.step % every == 0 and self.step < last:
                    self._save()
                every = self.config.probe.every_steps
                if every and self.config.sbp.enabled and self.step % every == 0:
                    self._probe_cosine(tracker)
            start = perf_counter()
            self.loss_sum.item()  # waits for the device
            seconds["total"] += perf_counter() - start
        return seconds

    def _optimizer_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step on one global batch; returns the seconds that it waited for data."""
        waited = 0.0
        self.wrapped.train()
        for micro_step in range(self.accumulation):
            start = perf_counter()
            images, labels = next(batches)
            waited += perf_counter() - start
            images = images.to(self.processes.device, non_blocking=True, memory_format=self.memory_format)
            labels = labels.to(self.processes.device, non_blocking=True)
            data.seed_step(self.config.seed, self.step, micro_step, self.processes.rank)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            if self.config.sbp.enabled:
                held = self.config.sbp.hold_mask
                sbp.set_draw(self.model, self.step if held else self.step * self.accumulation + micro_step)
            with self._reducing(micro_step == self.accumulation - 1):
                with self.autocast():
                    loss = self.loss(self.wrapped(images), labels)
                self.scaler.scale(loss / self.accumulation).backward()
            self.loss_sum += loss.detach()
            self.loss_count += 1
        self._update()
        self.step += 1
        return waited

    def _update(self) -> None:
        """Changes the weights once, unless the scaler finds a gradient that is not finite."""
        self.schedule.step_update(self.updates)
        if self.config.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.recipe.clip_grad)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() >= scale:
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.model, step=self.updates)

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.amp]
        return torch.autocast(self.processes.device.type, dtype, enabled=self.config.amp != "off")

    def _reducing(self, last: bool) -> Any:
        wait = isinstance(self.wrapped, DistributedDataParallel) and not last
        return self.wrapped.no_sync() if wait else nullcontext()

    def _wrap(self) -> nn.Module:
        model: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.processes.world_size == 1:
            return model
        on_gpu = self.processes.device.type == "cuda"
        return DistributedDataParallel(model, device_ids=[self.processes.device] if on_gpu else None)

    def _batches(self, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        stream = data.SampleStream(
            self.epoch_images,
            seed=self.config.seed,
            first=self.step,
            last=stop,
            micro=self.micro,
            accumulation=self.accumulation,
            rank=self.processes.rank,
            world=self.processes.world_size,
        )
        config = self.config
        return iter(data.train_loader(self.train_images, config.data, config.recipe, stream, self.processes.device))

    # -- what is measured

    def _end_of_epoch(self, epoch: int, seconds: dict[str, float]) -> dict[str, float]:
        sums = self.processes.sum(torch.stack([self.loss_sum, torch.full_like(self.loss_sum, self.loss_count)]))
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        values = {
            "epoch": epoch + 1,
            "train/loss": float(sums[0] / sums[1]),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": seconds["images"] / seconds["total"],
            "data_wait_share": seconds["wait"] / seconds["total"],
            "saved_bytes_per_image": self.saved_bytes,
            "effective_keep_ratio": sbp.effective_keep_ratio(self.model) if self.config.sbp.enabled else 1.0,
        }
        for name, value in self.memory.read().items():
            values[name] = self.processes.maximum(value)
        with self.memory.excluded():
            for suffix, model in (("", self.model), ("_ema", self.ema and self.ema.module)):
                if model is not None:
                    found = self._evaluate(model)
                    values |= {f"val/{name}{suffix}": found[name] for name in ("top1", "top5", "loss")}
        return values

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        loader = data.eval_loader(
            self.val_images,
            self.config.data,
            max(self.micro, 64),
            self.processes.device,
            self.processes.rank,
            self.processes.world_size,
        )
        return evaluate(model, loader, self.processes, self.autocast, self.memory_format)

    def _probe_saved_bytes(self) -> float:
        images, _ = self._probe_batch(4)
        return probes.saved_bytes_per_image(self.model, images, self.autocast)

    def _probe_cosine(self, tracker: Tracker | None) -> None:
        if tracker is None:
            return
        images, labels = self._probe_batch(self.config.probe.images)
        loss = nn.CrossEntropyLoss(label_smoothing=self.config.recipe.label_smoothing)
        with self.memory.excluded():
            values = probes.gradient_cosine(self.model, images, labels, loss)
        self.cosine_sum += values["gradient_cosine/total"]
        self.cosine_count += 1
        tracker.log(self.step, values)

    def _probe_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images of the training set, as evaluation sees them."""
        images = data.TransformedDataset(self.train_images, data.eval_transform(self.config.data))
        samples = [images[i % len(images)] for i in range(count)]
        stacked = torch.stack([image for image, _ in samples])
        stacked = stacked.to(self.processes.device, memory_format=self.memory_format)
        return stacked, torch.tensor([label for _, label in samples], device=self.processes.device)

    def _record(self, values: dict[str, float], tracker: Tracker | None) -> None:
        if tracker is None:
            return
        tracker.log(self.step, values)
        ema = f" (EMA {values['val/top1_ema']:.2f})" if "val/top1_ema" in values else ""
        print(
            f"epoch {values['epoch']}/{self.config.recipe.epochs}  loss {values['train/loss']:.4f}  "
            f"top1 {values['val/top1']:.2f} %{ema}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:.0f} images/s  waiting for data {values['data_wait_share']:.0%}",
            flush=True,
        )

    def _summarise(self, values: dict[str, float], tracker: Tracker | None) -> dict[str, Any]:
        summary = {
            "finished": True,
            "step": self.step,
            "keep_ratio": self.config.sbp.keep_ratio if self.config.sbp.enabled else None,
            "gradient_cosine": self.cosine_sum / self.cosine_count if self.cosine_count else None,
            **values,
            **{key: value for key, value in self.provenance().items() if key != "config"},
        }
        if tracker is not None:
            tracker.summarise(summary)
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=2))
        return summary

    def describe(self) -> str:
        """The run in a few lines, as the console shows it."""
        config, world = self.config, self.processes.world_size
        lines = [
            f"{config.backbone.name}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters, "
            f"{self.processes.device}, amp {config.amp}",
            "no SBP"
            if not config.sbp.enabled
            else f"SBP: keep_ratio {config.sbp.keep_ratio}, mask {config.sbp.mask}, mhsa_drop {config.sbp.mhsa_drop}",
            f"data: {self.epoch_images} training and {len(self.val_images)} validation images; "  # type: ignore[arg-type]
            f"evaluation: {data.describe_preprocessing(config.data)}",
            f"global batch {config.global_batch_size} = {world} processes x {self.micro} images x "
            f"{self.accumulation} accumulated; lr {config.recipe.lr:g} -> {self.lr:g}; {self.steps} steps",
        ]
        if self.step:
            lines.append(f"resuming at step {self.step} of {self.steps}")
        return "\n".join(lines)

    def provenance(self) -> dict[str, Any]:
        """What is needed to repeat the run."""
        return {
            "config": to_dict(self.config),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "global_batch_size": self.config.global_batch_size,
            "world_size": self.processes.world_size,
            "micro_batch_size": self.micro,
            "accumulation": self.accumulation,
            "scaled_lr": self.lr,
            "steps": self.steps,
            "seed": self.config.seed,
            "device": _device_name(self.processes.device),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
            "commit": _commit(),
        }

    # -- checkpoints

    def _save(self) -> None:
        """Writes a checkpoint; all processes hold the same state, so the first one's serves all."""
        if self.processes.is_first:
            content = {
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "updates": self.updates,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
                "cosine_sum": self.cosine_sum,
                "cosine_count": self.cosine_count,
                "run_id": self.run_id,
                "config": to_dict(self.config),
            }
            if self.ema is not None:
                content["state_dict_ema"] = self.ema.module.state_dict()
            checkpoint.save(self.folder / "checkpoints", self.step, content, self.config.checkpoint.keep)
        self.processes.wait()

    def _resume(self) -> None:
        resume = self.config.resume
        if resume is None:
            return
        if resume == "auto":
            content = checkpoint.load_latest(self.folder / "checkpoints")
        else:
            content = checkpoint.load(Path(resume))
        if content is None:
            return
        source = f"the checkpoint that resume={resume} found"
        missing = {"optimizer", "scaler", "step", "updates"} - content.keys()
        if missing:
            raise UserError(f"{source} cannot be resumed from: it has no {', '.join(sorted(missing))}")
        checkpoint.load_weights(self.model, content["state_dict"], source)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            weights = content.get("state_dict_ema")
            if weights is None:
                raise UserError(f"{source} has no averaged weights, but recipe.ema_decay asks for them")
            checkpoint.load_weights(self.ema.module, weights, source)
        self.step, self.updates = content["step"], content["updates"]
        self.loss_sum = content["loss_sum"].to(self.processes.device)
        self.loss_count = content["loss_count"]
        self.cosine_sum, self.cosine_count = content["cosine_sum"], content["cosine_count"]
        self.run_id = content["run_id"]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of the code that runs, marked when files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
