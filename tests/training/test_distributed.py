"""Two processes train as one does on the same images, and none waits for a gradient that never comes.

Both processes are started once and run all cases; the tests check the results they saved.
"""

import itertools
import os
from dataclasses import asdict
from statistics import fmean

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from helpers.models import TINY_SWIN, make_labels, tiny_model
from hf_dino.data.loaders import TrainingBatchSampler
from hf_dino.training.batch import effective_batch, with_effective_batch
from hf_dino.training.ema import ExponentialMovingAverage
from hf_dino.utils.distributed import summon_full_params


NUM_PROCESSES = 2
# Without noise, since the number of denoising groups, and so of random numbers, depends on a process's own images.
NO_NOISE = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0}

# Config fields, and objects of four images, of which each process has two. Padding among the denoising queries
# takes part in attention, as in the official implementation: with denoising, each process needs an image with the
# maximum number of objects.
SAME_AS_ONE_PROCESS = {
    "equal counts": ({}, (3, 1, 1, 3)),
    "unequal counts": ({}, (3, 3, 0, 3)),
    "plain denoising": ({"denoising": "plain"}, (3, 3, 0, 3)),
    "no denoising": ({"denoising": "none"}, (4, 1, 2, 0)),
    "no objects on one process": ({"denoising": "none"}, (3, 2, 0, 0)),
    "separate heads": ({"share_decoder_heads": False, "box_refinement": "look_forward_once"}, (3, 1, 1, 3)),
}

NOTHING_UNUSED = {
    f"{denoising}, {selection}": {"denoising": denoising, "query_selection": selection}
    for denoising, selection in itertools.product(("contrastive", "plain", "none"), ("mixed", "pure", "static"))
} | {
    "swin": {"backbone_config": TINY_SWIN},
    "trained batch norm": {"freeze_backbone_batch_norms": False},
    "look forward once": {"box_refinement": "look_forward_once"},
    "separate heads": {"share_decoder_heads": False},
    "conditional queries": {"positional_query": "conditional", "decoder_norm": False},
    "last layer only": {"auxiliary_loss": False},
}
# Objects of the images that a training of 20 steps goes through seven times, four images per step
OBJECTS_OF_IMAGES = (3, 0, 5, 1, 2, 0, 4, 1, 6, 2)
STEPS = 20

OBJECTS_RUN_OUT = [(3, 1, 2, 0), (3, 1, 0, 0), (0, 0, 0, 0)]  # somewhere, on one process, everywhere


def learn(network, counts, first=0, last=4):
    """Return loss and gradients for the images from `first` to `last` of four images that are always the same."""
    parameters = dict(network.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    pixel_values = torch.randn(4, 3, 96, 128, generator=torch.Generator().manual_seed(0), dtype=dtype)
    labels = [{**label, "boxes": label["boxes"].to(dtype)} for label in make_labels(*counts)]
    network.zero_grad()
    loss = network(pixel_values=pixel_values[first:last], labels=labels[first:last]).loss
    loss.backward()
    gradients = {name.removeprefix("module."): each.grad for name, each in parameters.items() if each.requires_grad}
    return loss.detach(), gradients


def noiseless_model(overrides):
    return tiny_model(**NO_NOISE, **overrides).double().train()


def without_gradient(network, first, last):
    """Return the parameters without a gradient in some step; DDP would fail or wait in the next one."""
    for counts in OBJECTS_RUN_OUT:
        loss, gradients = learn(network, counts, first, last)
        assert loss.isfinite()
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            return missing
    return []


def train(accumulation, as_one_batch=with_effective_batch):
    """Take 20 steps as `FineTuner` does. Return the images of each, its losses and gradients."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = tiny_model(**NO_NOISE).train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4))
    pixel_values = torch.randn(len(OBJECTS_OF_IMAGES), 3, 96, 128, generator=torch.Generator().manual_seed(0))
    labels = make_labels(*OBJECTS_OF_IMAGES)
    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    options = {"seed": 0, "gradient_accumulation_steps": accumulation, **processes}
    images = [batch for epoch in range(7) for batch in TrainingBatchSampler(len(labels), 4, epoch=epoch, **options)][
        : STEPS * accumulation
    ]
    batches = ({"pixel_values": pixel_values[batch], "labels": [labels[i] for i in batch]} for batch in images)
    losses, gradients = [], []
    for batch in as_one_batch(batches, accelerator):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            losses.append(loss.item())
            if accelerator.sync_gradients:
                gradients.append(
                    [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
                )
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    # a row per step, over its micro-batches in this process
    return {
        "images": torch.tensor(images).view(STEPS, -1).tolist(),
        "losses": torch.tensor(losses, dtype=torch.float64).view(STEPS, -1).mean(dim=1).tolist(),
        "gradients": gradients,
    }


def train_with_average(network, first=0, last=4, calls=1):
    """Take two steps. Return the EMA weights, and the logits they give in `calls` runs of this process alone."""
    average = ExponentialMovingAverage(network, 0.9)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(2):
        learn(network.train(), (3, 1, 1, 3), first, last)
        optimizer.step()
        average.update()
    with average.average_parameters(), summon_full_params(network), torch.no_grad():
        for _ in range(calls):
            logits = network.eval()(torch.ones(1, 3, 96, 128)).logits
    state = average.state_dict()
    resumed = ExponentialMovingAverage(network, 0.9)
    resumed.load_state_dict(state)
    return {"logits": logits, "state": state, "resumed": resumed.state_dict()}


def shard(network, reshard_after_forward=None):
    """Shard the weights over the processes with FSDP2."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    for part in (network.model.backbone, *network.model.encoder.layers, *network.model.decoder.layers, network):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return network


@torch.no_grad()
def kept_whole(network):
    """Return the parameters that stay unsharded after a forward of all processes."""
    network(torch.ones(1, 3, 96, 128))
    kept = {name for name, parameter in network.named_parameters() if not isinstance(parameter, DTensor)}
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return kept


def kept_before_and_after(reshard_after_forward):
    """Return what a forward leaves unsharded before and after each process ran the model alone, and all parameters."""
    network = shard(tiny_model(), reshard_after_forward).eval()
    before = kept_whole(network)
    with summon_full_params(network), torch.no_grad():
        network(torch.ones(1, 3, 96, 128))
    return before, kept_whole(network), {name for name, _ in network.named_parameters()}


def run_process(rank, folder):
    torch.set_num_threads(1)
    # for accelerate; the process group is initialized below
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "WORLD_SIZE": str(NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
    }
    count = str(NUM_PROCESSES)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    store = torch.distributed.FileStore(str(folder / "store"), NUM_PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    first, last = 2 * rank, 2 * rank + 2
    learned = {
        case: learn(DistributedDataParallel(noiseless_model(overrides)), counts, first, last)
        for case, (overrides, counts) in SAME_AS_ONE_PROCESS.items()
    }
    unused = {
        case: without_gradient(DistributedDataParallel(tiny_model(**overrides).train()), first, last)
        for case, overrides in NOTHING_UNUSED.items()
    }
    trained = {accumulation: train(accumulation) for accumulation in (1, 2)}
    shared = train_with_average(shard(tiny_model(**NO_NOISE)), first, last, calls=1 + 2 * rank)
    kept = {setting: kept_before_and_after(setting) for setting in (None, True, False)}
    seen = {"learned": learned, "unused": unused, "trained": trained, "shared": shared, "kept": kept}
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Return the results of each process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, (folder,), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_two_processes_train_what_one_does(processes, case):
    overrides, counts = SAME_AS_ONE_PROCESS[case]
    loss_alone, gradients_alone = learn(noiseless_model(overrides), counts)
    losses, gradients = zip(*(process["learned"][case] for process in processes))
    torch.testing.assert_close(sum(losses) / NUM_PROCESSES, loss_alone, rtol=1e-9, atol=0)
    for of_process in gradients:
        torch.testing.assert_close(of_process, gradients_alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", NOTHING_UNUSED)
def test_every_parameter_gets_a_gradient_on_every_process(processes, case):
    assert [process["unused"][case] for process in processes] == [[]] * NUM_PROCESSES


def gap(gradients, others):
    """Return the largest distance of a parameter's gradients, relative to their norm or 1e-4 of the global norm.

    Some are zero but for rounding: biases of keys, before a softmax, and those before a group norm of single channels.
    """
    whole = torch.stack([gradient.norm() for gradient in others]).norm()
    distances = [(one - other).norm() / max(other.norm(), 1e-4 * whole) for one, other in zip(gradients, others)]
    return max(distances).item()


@pytest.fixture(scope="module")
def trained_alone():
    """Train on one process with one batch per step: the reference for all others."""
    return train(accumulation=1)


def assert_same_training(trained, expected):
    """Check that the processes of one training together did in each step what a single process did in another."""
    for step in range(STEPS):
        images = [image for process in trained for image in process["images"][step]]
        assert sorted(images) == sorted(expected["images"][step])
        loss = fmean(process["losses"][step] for process in trained)
        assert loss == pytest.approx(expected["losses"][step], rel=1e-5)
        for process in trained:
            assert gap(process["gradients"][step], expected["gradients"][step]) < 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(processes, trained_alone, accumulation):
    assert_same_training([process["trained"][accumulation] for process in processes], trained_alone)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_train_as_one(trained_alone, accumulation):
    assert_same_training([train(accumulation)], trained_alone)


def test_without_the_effective_batch_they_do_not(trained_alone):
    with pytest.raises(AssertionError):
        assert_same_training([train(2, as_one_batch=lambda batches, accelerator: batches)], trained_alone)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_weights_are_averaged_and_run_in_each_process_alone(processes):
    expected = train_with_average(tiny_model(**NO_NOISE))
    for process in processes:
        torch.testing.assert_close(process["shared"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(process["shared"]["resumed"], process["shared"]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("setting", [None, True, False])
def test_which_weights_stay_unsharded_after_a_forward_does_not_change(processes, setting):
    for process in processes:
        before, after, parameters = process["kept"][setting]
        assert before == after
        # torch's default: the root's weights stay unsharded, as they are needed again at once, those of parts do not
        assert 0 < len(before) < len(parameters) if setting is None else before == (set() if setting else parameters)


def test_the_effective_batch_counts_the_objects_of_all_batches():
    accelerator = Accelerator(cpu=True)
    for batches, expected in (
        ([make_labels(2, 0), make_labels(5, 1)], {"num_boxes": 8 / 2, "max_num_objects": 5}),
        ([make_labels(0), make_labels(0), []], {"num_boxes": 1 / 3, "max_num_objects": 0}),
    ):
        assert asdict(effective_batch(batches, accelerator)) == expected


class OneProcessOfMany:
    """An accelerator of one process, for which gathering would fail."""

    num_processes = 1


def test_one_process_does_not_communicate():
    assert asdict(effective_batch([make_labels(2, 0)], OneProcessOfMany())) == {"num_boxes": 2, "max_num_objects": 2}
