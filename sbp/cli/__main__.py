"""python -m sbp.cli COMMAND ..., as torchrun -m starts it."""

from sbp.cli.main import main

main()
