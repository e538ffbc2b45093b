"""Run `hf-dino kernels` as `python -m hf_dino.kernels`."""

import sys

from ..cli import main


if __name__ == "__main__":
    main(["kernels", *sys.argv[1:]])
