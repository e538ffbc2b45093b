r"""Fine-tune DINO on a dataset, or train it from scratch: `hf-dino train` as a script, with the same options.

    accelerate launch examples/finetune_coco.py --model_name_or_path dino-4scale-r50 --dataset mine \
        --output_dir runs/mine

The loop is `hf_dino.training.FineTuner`. To write a loop of your own, start from `finetune_minimal.py`.
"""

import sys

from hf_dino.cli import main


if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
