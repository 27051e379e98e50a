"""Two processes train one network: every parameter must take part in every step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn.parallel import DistributedDataParallel

from nnunet_h2a.networks import H2ASeg
from nnunet_h2a.trainers import nnUNetTrainerH2ASeg
from tests.networks.plans import PLANS


def worker(rank: int, rendezvous: str, result: str, stock_weights: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    plan = PLANS["three stages"]
    network = DistributedDataParallel(H2ASeg(**plan.keywords(deep_supervision=True)))
    # The stock trainer supervises n_stages - 1 levels and gives the last of them 1e-6 under DDP.
    weights = (1.0, 1e-6) if stock_weights else nnUNetTrainerH2ASeg.deep_supervision_weights(3)
    loss = DeepSupervisionWrapper(
        DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}, {},
                       dice_class=MemoryEfficientSoftDiceLoss), weights,
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step in range(3):
        outputs = network(plan.input(seed=10 * rank + step))
        targets = [torch.randint(0, 2, (2, 1, *o.shape[2:])).float() for o in outputs][: len(weights)]
        optimizer.zero_grad()
        loss(outputs, targets).backward()
        optimizer.step()
    torch.save([p.detach() for p in network.module.parameters()], f"{result}_{rank}")
    dist.destroy_process_group()


def train(tmp_path, stock_weights):
    mp.spawn(worker, (str(tmp_path / "rendezvous"), str(tmp_path / "weights"), stock_weights), nprocs=2)
    first, second = (torch.load(tmp_path / f"weights_{rank}") for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.full
def test_three_steps_leave_equal_weights_with_our_loss(tmp_path):
    train(tmp_path, stock_weights=False)


def test_three_steps_leave_equal_weights_with_the_stock_trainers_levels(tmp_path):
    train(tmp_path, stock_weights=True)
