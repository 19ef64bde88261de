"""What is known of GPUs: gpus.json holds their data sheets, a file of `sbp plan calibrate` a measured one."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sbp.training.record.files import read_text

USABLE = 0.93  # of the memory: the rest is the CUDA context's, the libraries', and lost between allocations
SHEETS = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Gpu:
    """tensor_tflops: dense products in bfloat16 and float16; of float32 without tensor cores vector_tflops.

    bandwidth: of the memory, in GB/s. memory_gib: what a process can have of it. sms, clock_ghz: its multiprocessors,
    and how fast they run. launch_us: what the host needs for a kernel in eager mode, which is the CPU's, not the GPU's.
    """

    name: str
    tensor_tflops: float
    vector_tflops: float
    bandwidth: float
    memory_gib: float
    sms: int
    clock_ghz: float
    launch_us: float
    bfloat16: bool
    source: str

    @property
    def pace(self) -> float:
        """What bounds kernels with little to do at once: multiprocessors, as often as their clock ticks."""
        return self.sms * self.clock_ghz


def names() -> list[str]:
    return list(json.loads(read_text(SHEETS))["gpus"])


def find(name: str) -> Gpu:
    """The GPU of this name, or that of a file that was calibrated. Raises ValueError for neither."""
    sheets = json.loads(read_text(SHEETS))
    if name in sheets["gpus"]:
        return Gpu(name=name, **{"launch_us": sheets["launch_us"]} | sheets["gpus"][name])
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"gpu must be one of {', '.join(sheets['gpus'])}, or a file that `sbp plan calibrate` wrote, got {name!r}"
        )
    try:
        values = json.loads(read_text(path))["gpu"]
        return Gpu(**{field.name: values[field.name] for field in fields(Gpu)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"gpu={name}: not a file that `sbp plan calibrate` wrote ({error})") from None


def matching(device_name: str, memory_gib: float) -> Gpu | None:
    """The GPU whose data sheet is that of a CUDA device of this name; None where there is none."""
    words = device_name.lower().replace("-", " ").split()
    for name in names():
        model = name.split("-")[0].removeprefix("rtx")
        if model in words:
            gpu = find(name)
            if abs(gpu.memory_gib - memory_gib) < 0.2 * memory_gib:
                return replace(gpu, memory_gib=memory_gib)
    return None
