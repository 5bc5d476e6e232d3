"""Checkpoints that PyTorch itself wrote, read without it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.parity

K, D = 96, 16
READ = """
import json, sys
from protojax.audit.files import load_prototypes
found = load_prototypes(sys.argv[1])
print(json.dumps({"rows": found.rows.tolist(), "key": found.key, "layout": found.layout, "dtype": found.dtype,
                  "weight_norm": found.weight_norm, "torch": "torch" in sys.modules}))
"""


def read(path) -> dict:
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def head(torch, parametrised: bool):
    """DINO's head: three linear layers and a weight-normed last one with gain 1."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Sequential(torch.nn.Linear(D, 32), torch.nn.GELU(), torch.nn.Linear(32, D))
            last = torch.nn.Linear(D, K, bias=False)
            if parametrised:
                self.last_layer = torch.nn.utils.parametrizations.weight_norm(last)
                self.last_layer.parametrizations.weight.original0.data.fill_(1)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch's own, that this form of weight norm is old
                    self.last_layer = torch.nn.utils.weight_norm(last)
                self.last_layer.weight_g.data.fill_(1)
                self.last_layer.weight_g.requires_grad = False

        def forward(self, x):
            return self.last_layer(torch.nn.functional.normalize(self.mlp(x), dim=-1))

    return Head()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("parametrised", [False, True], ids=["weight_g", "parametrizations"])
def test_dino_checkpoints_give_the_rows_of_the_teacher(zipped, parametrised, tmp_path):
    import torch

    torch.manual_seed(0)
    networks = {name: torch.nn.ModuleDict({"head": head(torch, parametrised)}) for name in ("student", "teacher")}
    optimiser = torch.optim.AdamW(networks["student"].parameters())
    networks["student"]["head"](torch.randn(4, D)).square().mean().backward()
    optimiser.step()
    networks["teacher"]["head"](torch.randn(1, D))  # the older weight norm makes `weight` in the forward pass
    state = {
        "student": {f"module.{k}": v for k, v in networks["student"].state_dict().items()},
        "teacher": networks["teacher"].state_dict(),
        "optimizer": optimiser.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", out_dim=K, lr=5e-4),
        "fp16_scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    weight = networks["teacher"]["head"].last_layer.weight.detach().numpy()
    np.testing.assert_allclose(np.asarray(found["rows"], np.float32), weight, rtol=1e-6, atol=1e-7)
    assert found["key"].startswith("teacher.head.last_layer.")
    assert found["weight_norm"]
    assert not found["torch"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_views_and_whole_modules(dtype, tmp_path):
    """A SwAV-like model saved whole, and a transposed half-precision view of a larger storage."""
    import torch

    torch.manual_seed(1)
    base = torch.randn(D, 2 * K).to(getattr(torch, dtype))
    torch.save({"prototypes.weight": base[:, K:].T}, tmp_path / "view.pth")
    found = read(tmp_path / "view.pth")
    np.testing.assert_array_equal(np.asarray(found["rows"]), base[:, K:].T.double().numpy())
    assert found["dtype"] == dtype

    model = torch.nn.ModuleDict({"prototypes": torch.nn.Linear(D, K, bias=False)}).to(getattr(torch, dtype))
    torch.save({"model": model, "step": 3}, tmp_path / "module.pt", _use_new_zipfile_serialization=False)
    found = read(tmp_path / "module.pt")
    np.testing.assert_array_equal(np.asarray(found["rows"]), model["prototypes"].weight.detach().double().numpy())
    assert (found["layout"], found["torch"]) == ("SwAV", False)


def test_safetensors_of_the_package_itself(tmp_path):
    import torch
    from safetensors.torch import save_file

    weight = torch.randn(K, D, dtype=torch.bfloat16)
    save_file({"dino_head.last_layer.weight": weight, "backbone.w": torch.zeros(3, 3)}, tmp_path / "v3.safetensors")
    found = read(tmp_path / "v3.safetensors")
    np.testing.assert_array_equal(np.asarray(found["rows"]), weight.double().numpy())
    assert found["layout"] == "DINOv2 or DINOv3, image head"
