"""Register DINO, and DN-DETR with dense attention, with the auto classes of transformers.

Importing this module is enough. `import hf_dino` does, and so does every module that loads models by auto classes. The
classes of DINO and DN-DETR are the public names of the package.

| auto class | class of DINO | class of DN-DETR |
|---|---|---|
| `AutoConfig` | [`DinoDetrConfig`] | [`DnDetrConfig`] |
| `AutoModel` | [`DinoDetrModel`], without heads | |
| `AutoModelForObjectDetection` and `pipeline` | [`DinoDetrForObjectDetection`] | [`DnDetrForObjectDetection`] |
| `AutoImageProcessor` | [`DinoDetrImageProcessor`] | `ConditionalDetrImageProcessor`, as for DAB-DETR |
| the same with `backend="pil"` | [`DinoDetrImageProcessorPil`] | `ConditionalDetrImageProcessorPil` |

Example:

```python
>>> AutoConfig.for_model("dino_detr", num_queries=300).num_queries
300

```
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    ConditionalDetrImageProcessorPil,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .configuration_dino_detr import DinoDetrConfig
from .family.dn_detr import DnDetrConfig, DnDetrForObjectDetection
from .image_processing_dino_detr import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from .modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrModel, DinoDetrPreTrainedModel


# `exist_ok`: a later transformers may bring classes of these names.
AutoConfig.register(DinoDetrConfig.model_type, DinoDetrConfig, exist_ok=True)
AutoConfig.register(DnDetrConfig.model_type, DnDetrConfig, exist_ok=True)
AutoModel.register(DinoDetrConfig, DinoDetrModel, exist_ok=True)
AutoModelForObjectDetection.register(DinoDetrConfig, DinoDetrForObjectDetection, exist_ok=True)
AutoModelForObjectDetection.register(DnDetrConfig, DnDetrForObjectDetection, exist_ok=True)
AutoImageProcessor.register(
    DinoDetrConfig,
    image_processor_classes={"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil},
    exist_ok=True,
)
AutoImageProcessor.register(
    DnDetrConfig,
    image_processor_classes={"torchvision": ConditionalDetrImageProcessor, "pil": ConditionalDetrImageProcessorPil},
    exist_ok=True,
)
# `pipeline` looks up this table of names instead of the registry, and would log that they are not supported.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(DinoDetrConfig.model_type, DinoDetrForObjectDetection.__name__)
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(DnDetrConfig.model_type, DnDetrForObjectDetection.__name__)
