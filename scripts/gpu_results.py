"""Produces the figures that need a GPU, slice by slice: python -m scripts.gpu_results [--minutes 8.5] [NAME ...]

The tests marked gpu come first; what they print is in gpu-tests.txt. What fails stops nothing else, but is left to do.
--check is something else, of 6 minutes at most: the tests, and whether SBP saves as much time as this
project claims; its exit code is 0 only where each of LIMITS was measured and kept.

Needs torch, torchvision and timm alone, with what pip installs for them (numpy, Pillow, PyYAML, tqdm and so on), and
the tests pytest. With --cifar10 or --photographs the study's runs come before the compiled arms; they need Hydra, too:
without a network, `PYTHONPATH=FOLDER` after `pip install --target FOLDER hydra-core` elsewhere. Their records are in
study/ of the device's folder, beside those of no other device, and go to results/ by hand. What is in the folder
of this device already is skipped, so that the command can be given again until it has nothing left to do: then its
exit code is 0, else 3. An interrupted slice leaves nothing behind.
"""

import argparse
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from sbp.training.benchmark import report as benchmark_report
from sbp.training.runtime import distributed, environment
from scripts.gpu.check import CHECK_MINUTES, LEFT, check
from scripts.gpu.networks import NETWORKS
from scripts.gpu.slices import COMPILED, COMPILED_GRAPH, TESTS, Slice, do, slices
from scripts.reproduction.settings import SCALES

ROOT = Path(__file__).parents[1]


def study(options: argparse.Namespace, folder: Path, deadline: float) -> list[str]:
    """Goes on with the study's runs, as long as there is time; returns what is not done, SCALE or SCALE SETTING."""
    wanted: dict[str, tuple[str, list[str]]] = {}  # the folder of the images, and what scripts/study.py is given
    for one in SCALES["gpu"].settings if options.photographs else ():
        if one.gradients_only:  # in a moment, and no other shows it
            wanted[f"gpu {one.name}"] = options.photographs, ["scale=gpu", f"setting={one.name}"]
    if options.cifar10:  # as many runs beside one another as the scales say
        wanted |= {scale: (options.cifar10, [f"scale={scale}"]) for scale in ("cifar10_gpu", "fine_tuning")}
        for one in SCALES["gpu"].settings:
            if not one.gradients_only:
                jobs = f"jobs={3 if options.device == 'cuda' else 2}"  # small networks share it
                wanted[f"gpu {one.name}"] = options.cifar10, ["scale=gpu", f"setting={one.name}", jobs]
    left = list(wanted)
    if left and find_spec("hydra") is None:
        print("the study's runs are left: Hydra is not installed")
        return left
    for name, (root, given) in wanted.items():
        if (minutes := (deadline - perf_counter()) / 60) < 1:
            break
        common = [f"data_root={Path(root).resolve()}", f"minutes={minutes - 0.5:.1f}", f"device={options.device}"]
        common += [f"results={folder.resolve() / 'study'}", f"run_dir=outputs/study-{folder.name}"]
        command = [sys.executable, "scripts/study.py", *given, *common]
        if subprocess.run(command, cwd=ROOT, check=False).returncode == 0:
            left.remove(name)
    return left


def report(folder: Path, listed: list[Slice]) -> None:
    """One table and figure for each network, over all of its slices that are done; prints the tables."""
    done = [path for piece in listed if (path := folder / f"{piece.name}.json").is_file()]
    for name in NETWORKS:
        results = [json.loads(path.read_text()) for path in done if path.name.startswith(f"{name}-")]
        if results:
            merged = benchmark_report.merged(results)
            benchmark_report.write_report(merged, folder, name)
            print(f"\n{folder / name}.md\n{benchmark_report.table(merged)}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="slices to run; all of them by default")
    parser.add_argument("--minutes", type=float, help=f"stop before they are over (8.5; --check: {CHECK_MINUTES:g})")
    parser.add_argument("--check", action="store_true", help="run the tests and measure what is claimed, nothing else")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="default: results/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the command itself")
    parser.add_argument("--cifar10", help="a folder with train/CLASS and test/CLASS, for the study's runs")
    parser.add_argument("--photographs", help="a folder with val/CLASS of ImageNet's 1,000 classes, for the study's")
    parser.add_argument("--release", help="the folder of the authors' release, for an arm with their model")
    options = parser.parse_args(arguments)
    minutes = options.minutes or (CHECK_MINUTES if options.check else 8.5)
    deadline = perf_counter() + 60 * minutes

    try:
        device = environment.device_name(distributed.pick_device(options.device))
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder = options.out / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ("-small" if options.small else ""))
    if options.check:
        if options.names or options.device != "cuda":
            parser.error("--check takes no slices, and CUDA alone")
        return check(folder, options.device, options.small, deadline)
    listed = slices(options.device, options.small, options.release)
    unknown = set(options.names) - {piece.name for piece in listed}
    if unknown:
        parser.error(f"no slice {', '.join(sorted(unknown))}; there are {', '.join(piece.name for piece in listed)}")

    left = [piece for piece in listed if not options.names or piece.name in options.names]
    left = [piece for piece in left if not (folder / f"{piece.name}.json").is_file()]
    tests = [piece for piece in left if piece.name == TESTS]
    compiled = [piece for piece in left if piece.name.partition("-")[2] in COMPILED | COMPILED_GRAPH]
    eager = [piece for piece in left if piece not in tests + compiled]
    tests = do(tests, folder, deadline)
    eager = do(eager, folder, deadline)
    settings = [] if options.names or options.small else study(options, folder, deadline)
    compiled = do(compiled, folder, deadline)
    report(folder, listed)
    still = [f"{piece.name} ({piece.seconds:.0f} s)" for piece in tests + eager + compiled]
    still += [f"the study's {name}" for name in settings]
    print(f"\nleft: {', '.join(still)}" if still else f"\nnothing is left to do: {folder}")
    return LEFT if still else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
