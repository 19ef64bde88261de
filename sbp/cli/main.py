"""The command `sbp`, also `python -m sbp.cli`: one subcommand a file."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "train a timm model, with or without SBP; or sweep",
    "eval": "evaluate a checkpoint",
    "export": "write a checkpoint as timm reads it",
    "forecast": "forecast the memory of a training run, on any machine",
    "plan": "say which settings train fastest on a GPU, on any machine",
    "benchmark": "compare ways to train a network by time and memory",
    "check-data": "look for what is wrong with a data set",
    "sweep": "show the table of a sweep",
}


def main() -> None:
    """Runs the subcommand that the first argument names, with the others as its own."""
    name, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  sbp {one:<{width}}  {what}" for one, what in COMMANDS.items()]
        print("\n".join(["usage: sbp COMMAND [argument ...]", "", *lines, "", "sbp COMMAND --help says more of each."]))
        return
    if name not in COMMANDS:
        sys.exit(f"error: sbp has no command {name!r}; it has {', '.join(COMMANDS)}")
    sys.argv = [f"sbp {name}", *rest]
    try:
        command = import_module(f"sbp.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        lacking = (error.name or "sbp").partition(".")[0]
        if lacking == "sbp":
            raise
        sys.exit(f"error: sbp {name} needs {lacking}, which comes with: pip install 'stochastic-backprop[train]'")
    command.main()
