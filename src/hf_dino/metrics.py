"""Names of the COCO metrics, without the packages that compute them."""

METRIC_NAMES = {
    "ap": "AP@[.50:.95]",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar_1": "AR 1",
    "ar_10": "AR 10",
    "ar_100": "AR 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
"""Key and display name of the twelve COCO metrics, each in [0, 1], in pycocotools' order."""
