"""The export of a trained model as docs/onnx.md shows it."""

from __future__ import annotations

import re

import pytest

from tests.conftest import EXT_TRAINERS, ROOT

CHECK = """
import sys

model, file = Path(sys.argv[1]), Path(sys.argv[2])
export(model, 0, file)
predictor = nnUNetPredictor(device=torch.device("cpu"))
predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
patch = torch.randn(2, *predictor.configuration_manager.patch_size)
with torch.no_grad():
    expected = predictor.network.eval()(patch[None])[0]
assert expected.std() > 1e-2
torch.testing.assert_close(torch.from_numpy(predict_patch(file, patch.numpy())), expected, atol=1e-3, rtol=0)
"""


@pytest.mark.full
def test_documented_export_of_a_trained_model(workspace, models, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.S)
    workspace.run("python", "-c", example + CHECK, models["ours"].results, tmp_path / "network.onnx",
                  nnUNet_extTrainer=str(EXT_TRAINERS))  # fmt: skip
