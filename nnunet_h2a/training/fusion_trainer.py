"""What the trainers of all fusion networks share: nnU-Net's trainer with the network's own optimiser and levels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_h2a.training.architecture import (
    PLANS_KEY,
    build_fusion_network,
    check_same_channels,
    fusion_settings,
)
from nnunet_h2a.training.failures import (
    NonFiniteLoss,
    TrainingStopped,
    first_non_finite,
    non_finite_message,
    out_of_memory_message,
    stop_at_non_finite,
)
from nnunet_h2a.training.modalities import ChannelError
from nnunet_h2a.training.recipe import OptimizerRecipe, parameter_groups


class FusionTrainer(nnUNetTrainer):
    """nnU-Net's trainer for a network with a CT and a PET branch.

    Everything is nnU-Net's (data, augmentation, sampling, epochs, Dice + cross-entropy or BCE, validation) but the
    optimiser's settings and deep supervision, in which every supervised level has a weight above 0.

    Subclasses set :attr:`network_class` and :attr:`recipe`, and define ``deep_supervision_weights`` where the network
    has auxiliary heads.
    """

    #: The network that is trained.
    network_class: ClassVar[type[nn.Module]]
    #: Further arguments of the network, whatever the plan; they are kept in the plans for inference.
    network_options: ClassVar[dict[str, Any]] = {}
    #: Optimiser settings.
    recipe: ClassVar[OptimizerRecipe]
    #: Whether the network has auxiliary heads.
    deep_supervision: ClassVar[bool] = True
    #: Whether the network predicts at its deepest level too. nnU-Net's own supervises all levels but that.
    supervise_deepest: ClassVar[bool] = True
    #: Whether the trainer takes a batch size of its own, whatever the plan says.
    fixed_batch_size: ClassVar[bool] = False
    #: Number of epochs where it is not nnU-Net's 1000.
    epochs: ClassVar[int | None] = None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature must be nnU-Net's
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._steps, self._epoch_of_steps = 0, -1
        self.initial_lr = self.recipe.learning_rate
        self.weight_decay = self.recipe.weight_decay
        self.enable_deep_supervision = self.deep_supervision
        if self.epochs is not None:
            self.num_epochs = self.epochs
        # Inference sees plans and checkpoint only, so the plans must say which channel is which.
        self.plans_manager.plans[PLANS_KEY] = self.network_settings(
            self.configuration_manager.network_arch_init_kwargs, dataset_json, self.label_manager.has_regions
        )

    @classmethod
    def network_settings(
        cls, arch_kwargs: Mapping[str, Any], dataset_json: Mapping[str, Any], region_based: bool
    ) -> dict[str, Any]:
        """What the plans must hold beside a configuration's ``arch_kwargs`` for the network to be built from them.

        Args:
            arch_kwargs: of the configuration; what a plan for this network says there counts.
            dataset_json: content of dataset.json.
            region_based: whether classes are regions, one sigmoid each.

        Raises:
            ChannelError: where the dataset's channels are not what the network or the plans need, or the plans'
                network not the trainer's.
        """
        for key, value in cls.network_options.items():
            if arch_kwargs.get(key, value) != value:
                raise ChannelError(
                    f"the plans say {key} = {arch_kwargs[key]!r}, but {cls.__name__} trains {key} = {value!r}: "
                    "take the trainer or the plans (-p) of the other"
                )
        options = {key: value for key, value in cls.network_options.items() if key not in arch_kwargs}
        modalities = {**options, **arch_kwargs}.get("modalities", "both")
        settings = fusion_settings(dataset_json, region_based, modalities)
        check_same_channels(arch_kwargs, settings)
        return {**settings, **options}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network for a configuration; nnU-Net calls this in training and at inference."""
        return build_fusion_network(
            cls.network_class, plans_manager, configuration_manager, num_input_channels, num_output_channels,
            enable_deep_supervision,
        )  # fmt: skip

    def initialize(self) -> None:
        super().initialize()
        stop_at_non_finite(self.loss)
        # nnU-Net's log shows the plan's architecture, which is that of its own U-Net for a stock plan.
        network = self.plain_network
        parameters = sum(p.numel() for p in network.parameters())
        name, modalities = type(network).__name__, getattr(network, "modalities", "both")
        alone = "" if modalities == "both" else f", {modalities.upper()} alone"
        self.print_to_log_file(
            f"network: {name}{alone}, {parameters / 1e6:.2f} million parameters; recipe: {self.recipe}"
        )

    @property
    def plain_network(self) -> nn.Module:
        """The network without what distributed training and compilation put around it."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, which ends the training with the reason where it cannot go on."""
        self._steps = self._steps + 1 if self._epoch_of_steps == self.current_epoch else 1
        self._epoch_of_steps = self.current_epoch
        try:
            return super().train_step(batch)
        except NonFiniteLoss as error:
            where = f"epoch {self.current_epoch}, step {self._steps}"
            autocast = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
            with autocast:
                what = first_non_finite(self.plain_network, batch["data"].to(self.device))
            cases = [str(key) for key in batch.get("keys", ())]
            self._stop(non_finite_message(str(error), where, what, cases, self.output_folder), error)
        except torch.OutOfMemoryError as error:
            self._stop(
                out_of_memory_message(
                    self.plain_network, self.plans_manager.dataset_name, self.plans_manager.plans_name,
                    self.configuration_manager.configuration, self.configuration_name, self.fixed_batch_size,
                ),
                error,
            )  # fmt: skip

    def _stop(self, message: str, error: Exception) -> NoReturn:
        self.print_to_log_file(message, also_print_to_console=False)
        raise TrainingStopped(message) from error

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        network = getattr(self.network, "_orig_mod", self.network)
        groups = parameter_groups(network, self.weight_decay, self.free_of_weight_decay(network))
        return self.recipe.build(groups, self.num_epochs)

    def free_of_weight_decay(self, network: nn.Module) -> set[str]:
        """Names of parameters without weight decay: what the network itself wants so (CIPA's decay rates and skips)."""
        return network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision or not self.supervise_deepest:
            return super()._get_deep_supervision_scales()
        # nnU-Net leaves the deepest level out of the targets; its loss would then drop that prediction without a word.
        strides = np.vstack(self.configuration_manager.pool_op_kernel_sizes)
        return [[float(s) for s in scale] for scale in 1 / np.cumprod(strides, axis=0)]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.enable_deep_supervision:
            loss.weight_factors = tuple(self.deep_supervision_weights(len(self._get_deep_supervision_scales())))
        return loss

    @staticmethod
    def deep_supervision_weights(n_levels: int) -> list[float]:
        """Weight of each level's loss, highest resolution first; they sum to 1."""
        raise NotImplementedError("the trainer of a network with auxiliary heads says how its levels weigh")
