"""Small configurations of the detection models of transformers, by type."""

from typing import Any

from transformers import AutoConfig, AutoModelForObjectDetection


CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
TRANSFORMER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 30,
}
DETR = {**TRANSFORMER, "backbone_config": CONVNEXT, "auxiliary_loss": True}
RT_DETR = {
    **TRANSFORMER,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 10,
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
D_FINE = {
    **RT_DETR,
    "hidden_expansion": 0.5,
    "backbone_config": {
        "model_type": "hgnet_v2",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 1, 1, 1],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 24, 32, 40],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
LW_DETR = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 10,
    "group_detr": 2,
    "projector_scale_factors": [1.0],
    "backbone_config": {
        "model_type": "lw_detr_vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "num_windows": 4,
        "num_windows_side": 2,
        "window_block_indices": [0],
        "out_indices": [1, 2],
    },
}
RF_DETR = {
    **{name: value for name, value in LW_DETR.items() if name != "projector_scale_factors"},
    "backbone_config": {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "num_windows": 2,
        "num_register_tokens": 0,
        "out_features": ["stage1", "stage2"],
    },
}

SMALL: dict[str, dict[str, Any]] = {
    "detr": DETR,
    "table-transformer": DETR,
    "conditional_detr": DETR,
    "dab-detr": {**DETR, "hidden_size": 32},
    "deformable_detr": {**DETR, "num_feature_levels": 4},
    "lw_detr": LW_DETR,
    "rf_detr": RF_DETR,
    "rt_detr": RT_DETR,
    "rt_detr_v2": RT_DETR,
    "d_fine": D_FINE,
    "deimv2": D_FINE,
}
"""Fields by `model_type`. All take images of 128 pixels, but RF-DETR of 112."""


def small_detector(model_type: str, **fields: Any) -> Any:
    """Make a model with random weights."""
    config = AutoConfig.for_model(model_type, **{**SMALL[model_type], **fields})
    return AutoModelForObjectDetection.from_config(config)
