"""How far detections move when an image is padded because of another one in its batch.

    python benchmarks/padding.py --model runs/bccd --images DIR [--padding 32] [--threshold 0.3]

Padding is masked in the transformer, but it reaches the borders of the backbone's features, as in the official
implementation. Each image is run alone and with `--padding` pixels to the right and below; detections of one class
that overlap by more than half are compared.
"""

import argparse
from pathlib import Path

import torch
from torchvision.ops import box_iou

from common.machine import write_result
from hf_dino.data import list_images, read_image
from hf_dino.hub import load_model_and_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50, help="images at most (default: 50)")
    parser.add_argument("--padding", type=int, default=32, help="padding in pixels (default: 32)")
    parser.add_argument("--threshold", type=float, default=0.3)
    args = parser.parse_args()

    model, processor = load_model_and_processor(args.model)
    shifts, score_changes, lost = [], [], 0
    for path in list_images([args.images])[: args.limit]:
        image = read_image(path)
        alone = processor(images=image, return_tensors="pt")
        height, width = alone["pixel_values"].shape[-2:]
        padded_size = {"height": height + args.padding, "width": width + args.padding}
        padded = processor(images=image, return_tensors="pt", pad_size=padded_size)
        found = []
        for inputs in (alone, padded):
            with torch.no_grad():
                outputs = model(**inputs)
            found += processor.post_process_object_detection(outputs, args.threshold, target_sizes=[(height, width)])
        one, other = found
        same_class = one["labels"][:, None] == other["labels"]
        pairs = (box_iou(one["boxes"], other["boxes"]) * same_class > 0.5).nonzero()
        lost += len(one["boxes"]) - len(pairs[:, 0].unique())
        shifts.append((one["boxes"][pairs[:, 0]] - other["boxes"][pairs[:, 1]]).abs().amax(dim=1))
        score_changes.append((one["scores"][pairs[:, 0]] - other["scores"][pairs[:, 1]]).abs())

    shift, change = torch.cat(shifts), torch.cat(score_changes)
    command = f"python benchmarks/padding.py --model {args.model} --images {args.images} --padding {args.padding}"
    content = {
        "pixels": args.padding,
        "detections": len(shift) + lost,
        "unmatched": lost,
        "corner_shift_pixels": {
            "median": round(shift.median().item(), 3),
            "95th_percentile": round(shift.quantile(0.95).item(), 3),
            "largest": round(shift.max().item(), 3),
        },
        "score_change": {"median": round(change.median().item(), 4), "largest": round(change.max().item(), 4)},
    }
    write_result("padding", command, content)


if __name__ == "__main__":
    main()
