"""Two processes learn what one would from the same pictures, and none waits for a gradient that never comes.

Both processes are started once and go through all cases; the tests look at what they wrote down.
"""

import itertools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from conftest import TINY_SWIN, make_labels, tiny_model


NUM_PROCESSES = 2
# Without noise, since the number of denoising groups, and so of random numbers, depends on a process's own pictures.
NO_NOISE = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0}

# Config fields, and objects of four pictures, of which each process has two. Denoising queries that fill up a picture
# take part in attention, as in the original: so with denoising each process needs a picture as full as the fullest.
SAME_AS_ONE_PROCESS = {
    "equal counts": ({}, (3, 1, 1, 3)),
    "unequal counts": ({}, (3, 3, 0, 3)),
    "plain denoising": ({"denoising": "plain"}, (3, 3, 0, 3)),
    "no denoising": ({"denoising": "none"}, (4, 1, 2, 0)),
    "no objects on one process": ({"denoising": "none"}, (3, 2, 0, 0)),
    "heads of their own": ({"share_decoder_heads": False, "box_refinement": "look_forward_once"}, (3, 1, 1, 3)),
}

NOTHING_UNUSED = {
    f"{denoising}, {selection}": {"denoising": denoising, "query_selection": selection}
    for denoising, selection in itertools.product(("contrastive", "plain", "none"), ("mixed", "pure", "static"))
} | {
    "swin": {"backbone_config": TINY_SWIN},
    "batch norm learns": {"freeze_batch_norm": False},
    "look forward once": {"box_refinement": "look_forward_once"},
    "heads of their own": {"share_decoder_heads": False},
    "last layer only": {"auxiliary_loss": False},
}
OBJECTS_RUN_OUT = [(3, 1, 2, 0), (3, 1, 0, 0), (0, 0, 0, 0)]  # somewhere, on one process, everywhere


def learn(network, counts, first=0, last=4):
    """Loss and gradients of those of the four pictures from `first` to `last`; the pictures are always the same."""
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
    """Names of parameters that some step leaves without a gradient; DDP would fail or wait in the step after it."""
    for counts in OBJECTS_RUN_OUT:
        loss, gradients = learn(network, counts, first, last)
        assert loss.isfinite()
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            return missing
    return []


def run_process(rank, folder):
    torch.set_num_threads(1)
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
    torch.save({"learned": learned, "unused": unused}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process wrote down."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, (folder,), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_two_processes_learn_what_one_does(processes, case):
    overrides, counts = SAME_AS_ONE_PROCESS[case]
    loss_alone, gradients_alone = learn(noiseless_model(overrides), counts)
    losses, gradients = zip(*(process["learned"][case] for process in processes))
    torch.testing.assert_close(sum(losses) / NUM_PROCESSES, loss_alone, rtol=1e-9, atol=0)
    for of_process in gradients:
        torch.testing.assert_close(of_process, gradients_alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", NOTHING_UNUSED)
def test_every_parameter_gets_a_gradient_on_every_process(processes, case):
    assert [process["unused"][case] for process in processes] == [[]] * NUM_PROCESSES
