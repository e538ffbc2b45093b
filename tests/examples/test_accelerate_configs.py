"""The files for `accelerate launch --config_file`: accelerate takes each, and the command in it is the one to type."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
KINDS = {
    "one_gpu.yaml": "NO",
    "multi_gpu.yaml": "MULTI_GPU",
    "multi_node.yaml": "MULTI_GPU",
    "fsdp.yaml": "FSDP",
    "deepspeed_zero2.yaml": "DEEPSPEED",
}


def command_of(file: Path) -> argparse.Namespace:
    """What the command in a file's comment tells accelerate."""
    comment = "\n".join(line[2:] for line in file.read_text().splitlines() if line.startswith("# "))
    command = re.search(r"accelerate launch (.*)", comment.replace("\\\n", ""))[1]
    return launch_command_parser().parse_args(shlex.split(command))


def test_every_file_is_tested():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_takes_the_file(name):
    config = load_config_from_file(str(FOLDER / name))
    assert config.distributed_type == KINDS[name]
    assert config.mixed_precision == "bf16"
    assert config.num_processes == {"one_gpu.yaml": 1, "multi_node.yaml": 16}.get(name, 8)


@pytest.mark.parametrize("name", KINDS)
def test_the_command_in_the_file_starts_what_it_says(name, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    args = command_of(FOLDER / name)
    assert args.config_file == f"examples/accelerate_configs/{name}"
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "hf_dino", "train")
    given = args.num_processes
    args, _, _ = _validate_launch_command(args)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        kind == KINDS[name] for kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    )
    assert args.num_processes == (given or load_config_from_file(str(FOLDER / name)).num_processes)
