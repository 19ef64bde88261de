"""`python train.py ...` is `sbp train ...`, and so under torchrun."""

from sbp.cli.train import main

if __name__ == "__main__":
    main()
