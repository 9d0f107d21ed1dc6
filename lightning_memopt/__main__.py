"""``python -m lightning_memopt``: the same as ``lightning-memopt``."""

from lightning_memopt.cli import main

if __name__ == "__main__":
    main()
