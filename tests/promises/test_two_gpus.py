"""``-num_gpus 2``: nnU-Net's whole distributed training in two processes, on CPUs instead of GPUs.

nnU-Net starts it for CUDA only, with NCCL and the device in three places; the test puts gloo and the CPU there and
leaves everything else as it is. But nnU-Net also turns BatchNorm into SyncBatchNorm, which PyTorch has on GPUs only;
CIPA's norms stay as they are here, so that its statistics differ between the processes.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.promises.conftest import every_network
from tests.promises.test_promises import check_prediction, weights


def worker(rank: int, environment: dict[str, str], trainer_name: str, plans_name: str, result: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    dist.init_process_group("gloo", init_method=f"file://{result}.rendezvous", rank=rank, world_size=2)
    module.DDP = lambda network, device_ids=None, **options: DistributedDataParallel(network, **options)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(lambda cls, network, group=None: network)
    trainer = get_trainer_from_args("731", "3d_fullres", 0, trainer_name, plans_name, False, torch.device("cpu"))
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    torch.manual_seed(rank)
    trainer.run_training()
    used = {name for name, parameter in trainer.plain_network.named_parameters() if parameter.grad is not None}
    trainer.perform_actual_validation()
    torch.save(trainer.plain_network.state_dict(), f"{result}.{rank}.pth")
    everything = {name for name, _ in trainer.plain_network.named_parameters()}
    with open(f"{result}.{rank}.json", "w") as file:
        json.dump({"batch": trainer.batch_size, "unused": sorted(everything - used)}, file)
    dist.destroy_process_group()


@every_network(None)
def test_two_processes_share_the_batch_and_the_weights(promises, network, tmp_path):
    trainer, plans = f"nnUNetTrainer{network}FewSteps", f"nnUNet{network}Plans"
    result = str(tmp_path / "result")
    mp.spawn(worker, (promises.environment(), trainer, plans, result), nprocs=2)
    found = [json.loads((tmp_path / f"result.{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(item["batch"] for item in found) == [1, 2]
    assert [item["unused"] for item in found] == [[], []]
    first, second = (torch.load(tmp_path / f"result.{rank}.pth") for rank in (0, 1))
    parameters = [key for key in first if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(first[key], second[key]) for key in parameters)
    saved = weights(promises.results(trainer, plans) / "fold_0")
    assert all(torch.equal(first[key], saved[key]) for key in parameters)
    check_prediction(promises.predict("3d_fullres", "0", trainer, plans, tmp_path / "out"))
