"""Runs an example with its weights sharded over processes on CPUs, which Accelerate does on accelerators only.

torchrun --nproc_per_node 2 tests/helpers/fsdp_on_cpus.py examples/finetune_coco.py ...
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType


CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "fsdp.yaml"
_init = PartialState.__init__


def init_as_if_on_gpus(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    _init(self, cpu, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU  # for which ACCELERATE_USE_FSDP is heeded


if __name__ == "__main__":
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["fsdp_config"]  # as `accelerate launch` passes it on
    os.environ |= {name.upper(): str(value) for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    PartialState.__init__ = init_as_if_on_gpus
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert Accelerator().distributed_type == DistributedType.FSDP, "the run was another"
