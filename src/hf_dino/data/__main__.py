"""Run `hf-dino data` as `python -m hf_dino.data`."""

import sys

from ..cli import main


if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
