"""Convert an official DINO checkpoint to a directory that `from_pretrained` loads: `hf-dino convert` as a script.

    python conversion/convert_original.py checkpoint0011_4scale.pth --output_dir dino-4scale-r50

The conversion itself is `hf_dino.conversion.convert_checkpoint`.
"""

import sys

from hf_dino.cli import main


if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
