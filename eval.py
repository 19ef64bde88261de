"""`python eval.py ...` is `sbp eval ...`, and so under torchrun."""

from sbp.cli.eval import main

if __name__ == "__main__":
    main()
