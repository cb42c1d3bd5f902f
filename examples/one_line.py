"""The smallest use: a module of your own, and the name of a backend. Nothing of qcompile is imported."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).eval()
x = torch.randn(8, 512)

with torch.inference_mode():
    expected = model(x)
    quantized = torch.compile(model, backend="qcompile")
    error = (quantized(x) - expected).norm() / expected.norm()

print(f"relative error of the quantized output: {error:.2e}")
