"""Convert an official DINO checkpoint to a folder that `from_pretrained` loads.

    python conversion/convert_original.py --checkpoint checkpoint0011_4scale.pth --output_dir dino-4scale-r50

The conversion itself is `hf_dino.conversion.convert_checkpoint`.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_dino import conversion
from hf_dino.utils.errors import run_cli


def _underscored(option: re.Match[str]) -> str:
    return "--" + option[0].removeprefix("--").replace("-", "_")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, in which options may be written with dashes or underscores, and convert the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint that the official code wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--use_ema", action="store_true", help="convert the EMA weights (`ema_model`)")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="replace an output folder that is not empty"
    )
    parser.add_argument(
        "--trust_pickle",
        action="store_true",
        help="read a checkpoint whose settings contain objects of other code; this RUNS CODE FROM THE FILE",
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([re.sub(r"^--[\w-]+", _underscored, arg) for arg in argv])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    conversion.convert_checkpoint(
        args.checkpoint,
        args.output_dir,
        use_ema=args.use_ema,
        trust_pickle=args.trust_pickle,
        overwrite=args.overwrite_output_dir,
    )


if __name__ == "__main__":
    run_cli(main)
