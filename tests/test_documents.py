"""The documents: links lead somewhere, paths exist, commands are taken, and the README's run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sbp.cli.main import COMMANDS
from tests.training.configs import composed

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> list[list[str]]:
    """What the code blocks tell a shell, without comments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            found += [words] if words else []
    return found


COMMANDS_TOLD = [(path, words) for path in DOCUMENTS for words in commands(path) if words]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, heading in links(path.read_text()):
        if target.startswith("http"):
            continue
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not heading or heading in headings(there), f"{target}#{heading}"


def links(text):
    """The file, "" for this one, and the heading, "" for none."""
    return [found for found in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text) if any(found)]


def headings(path):
    """As links name them."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_are_seen():
    text = "[a](docs/method.md#nothing) [b](nowhere.md) [c](#here) ![d](x.png)"
    assert links(text) == [("docs/method.md", "nothing"), ("nowhere.md", ""), ("", "here"), ("x.png", "")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(path):
    text = path.read_text() if path.name != "CHANGELOG.md" else ""
    for name in re.findall(r"`((?:sbp|scripts|configs|tests|docs|results)/[\w./*-]+)`", text):
        assert [*ROOT.glob(name.rstrip("/"))], name


@pytest.mark.parametrize(
    "words",
    [words for _, words in COMMANDS_TOLD if words[:2] == ["sbp", "train"] or words[0] == "torchrun"],
    ids=lambda words: " ".join(words)[:60],
)
def test_trainings_are_configs_that_exist(words):
    """With the same keys and choices; of a sweep, with the first values."""
    if words[0] == "torchrun":
        words = ["sbp", "train", *words[words.index("train.py") + 1 :]]
    overrides = [word for word in words[2:] if "=" in word and not word.startswith(("-", "hydra"))]
    first = [re.sub(r"^([^=]*)=([^\[{(']*?),.*", r"\1=\2", word) for word in overrides]
    if "..." in words or any("(" in word for word in first):
        pytest.skip("a part of a command, or a range that a sweeper takes")
    composed(*first)


def test_commands_exist():
    for path, words in COMMANDS_TOLD:
        if words[0] == "sbp":
            assert words[1] in COMMANDS or words[1] == "--help", (path.name, words)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif words[0] == "python":
            target = ROOT / words[1] if words[1] != "-m" else ROOT / (words[2].replace(".", "/") + ".py")
            assert target.is_file() or words[2] in ("pytest",), (path.name, words)


@pytest.mark.long
def test_the_commands_of_the_readme_run(tmp_path):
    """At a small size, without the images that nobody has here."""
    small = ["recipe.epochs=1", "recipe.warmup_epochs=0", "logger=none", "backbone.kwargs.depth=2", "threads=1"]
    given = [words for words in commands(ROOT / "README.md") if words[0] == "sbp"]
    ran = 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in given:
        if any("/path/to" in word for word in words) or words[1:] == ["--help"]:
            continue
        more = small if words[1] == "train" else []
        more = [*more, "run_dir=outputs/NAME"] if words[1:] == ["train"] else more
        words = ["checkpoint=outputs/NAME" if word.startswith("checkpoint=") else word for word in words]
        command = [sys.executable, "-m", "sbp.cli", *words[1:], *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
        ran += 1
    assert ran >= 3
