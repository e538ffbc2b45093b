"""Detect objects in images and draw them: `hf-dino predict` as a script.

    python examples/predict.py --model_name_or_path runs/mine image.jpg --output drawn.png

`--help` lists the options.
"""

import sys

from hf_dino.cli import main


if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
