"""Models trained and predicted with nnU-Net's commands, once for all tests here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import EXT_TRAINERS, WIDE, Workspace


@dataclass(frozen=True)
class Model:
    """A trained model and its predictions of the held-out case."""

    space: Workspace
    name: str
    trainer: str
    plans: str
    configuration: str = "3d_fullres"

    @property
    def results(self) -> Path:
        return (
            self.space.root
            / "nnUNet_results"
            / self.space.dataset
            / f"{self.trainer}__{self.plans}__{self.configuration}"
        )

    @property
    def predictions(self) -> Path:
        return self.space.root / self.name

    def train(self, **environment: str) -> None:
        extra = {"nnUNet_extTrainer": str(EXT_TRAINERS)} | environment
        self.space.run("nnUNetv2_train", "711", self.configuration, "0", "-tr", self.trainer, "-p", self.plans,
                       "-device", "cpu", **extra)  # fmt: skip

    def predict_arguments(self, output: Path) -> list[str | Path]:
        """Arguments of nnUNetv2_predict for the held-out case."""
        return ["-d", self.space.dataset, "-i", self.space.raw / "imagesTs", "-o", output, "-tr", self.trainer,
                "-p", self.plans, "-c", self.configuration, "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0",
                "--save_probabilities", "--disable_tta"]  # fmt: skip

    def predict(self, output: Path, **environment: str) -> None:
        extra = {"nnUNet_extTrainer": str(EXT_TRAINERS)} | environment
        self.space.run("nnUNetv2_predict", *self.predict_arguments(output), **extra)

    def probabilities(self, folder: Path | None = None) -> dict[str, np.ndarray]:
        """Predicted probabilities by case."""
        files = sorted((folder or self.predictions).glob("*.npz"))
        assert files
        return {file.stem: np.load(file)["probabilities"] for file in files}


@pytest.fixture(scope="session")
def models(workspace) -> dict[str, Model]:
    """A trainer of ours, the stock trainer with plans that name our network, and stock nnU-Net."""
    found = {
        model.name: model
        for model in (
            Model(workspace, "ours", "nnUNetTrainerH2ASegFewSteps", "nnUNetH2ASegWidePlans"),
            Model(workspace, "plans", "nnUNetTrainerFewSteps", "nnUNetH2ASegWidePlans"),
            Model(workspace, "stock", "nnUNetTrainerFewSteps", "nnUNetWidePlans"),
        )
    }
    for model in found.values():
        if not (workspace.preprocessed / f"{model.plans}.json").exists():
            network = "stock" if model.name == "stock" else "H2ASeg"
            workspace.run("h2a_plan", "-d", "711", "--network", network, *WIDE, "-o", model.plans)
        model.train()
        model.predict(model.predictions)
    return found


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two sets of probabilities are equal bit by bit."""
    return first.keys() == second.keys() and all(np.array_equal(first[case], second[case]) for case in first)
