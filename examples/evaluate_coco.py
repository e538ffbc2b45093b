"""Evaluate a DINO model on a dataset: `hf-dino evaluate` as a script.

    accelerate launch examples/evaluate_coco.py --model_name_or_path runs/mine --dataset mine --report_html report.html

`--help` lists the options.
"""

import sys

from hf_dino.cli import main


if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
