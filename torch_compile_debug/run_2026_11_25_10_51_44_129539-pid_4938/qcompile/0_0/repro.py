"""Runs one graph again that qcompile 0.1.0 compiled, with its inputs, options and grad mode: python repro.py"""

from __future__ import annotations

import os


from pathlib import Path

import torch
from torch import device, inf, nan, tensor

import qcompile.repro

from torch.nn import *
class Repro(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()



    def forward(self, L_inputs_0_ : torch.Tensor, L_self_modules_0_parameters_weight_ : qcompile_tensor_Quantized_int8, L_self_modules_0_parameters_bias_ : torch.nn.parameter.Parameter, L_self_modules_2_parameters_weight_ : torch.nn.parameter.Parameter, L_self_modules_2_parameters_bias_ : torch.nn.parameter.Parameter):
        l_inputs_0_ = L_inputs_0_
        l_self_modules_0_parameters_weight_ = L_self_modules_0_parameters_weight_
        l_self_modules_0_parameters_bias_ = L_self_modules_0_parameters_bias_
        l_self_modules_2_parameters_weight_ = L_self_modules_2_parameters_weight_
        l_self_modules_2_parameters_bias_ = L_self_modules_2_parameters_bias_
        input_1 = torch._C._nn.linear(l_inputs_0_, l_self_modules_0_parameters_weight_, l_self_modules_0_parameters_bias_);  l_inputs_0_ = l_self_modules_0_parameters_weight_ = l_self_modules_0_parameters_bias_ = None
        input_2 = torch.nn.functional.relu(input_1, inplace = False);  input_1 = None
        input_3 = torch._C._nn.linear(input_2, l_self_modules_2_parameters_weight_, l_self_modules_2_parameters_bias_);  input_2 = l_self_modules_2_parameters_weight_ = l_self_modules_2_parameters_bias_ = None
        return (input_3,)


OPTIONS = {'policy': '{\n "name": "int8",\n "explicit": false,\n "rules": [\n  {\n   "pattern": "*",\n   "scheme": "int8@4fe942a0be02489f"\n  }\n ]\n}', 'strict': False, 'weights': 'free', 'rounding': 'nearest', 'fallback': 'error', 'inductor': {}}
ORDER = [0, '0.weight', '0.bias', '2.weight', '2.bias']

if __name__ == "__main__":
    saved = torch.load(Path(__file__).with_name("values.pt"), weights_only=True)
    model = qcompile.repro.Model(Repro(), ORDER, saved["parameters"])
    with torch.set_grad_enabled(False):
        torch.compile(model, backend="qcompile", options=qcompile.repro.options(OPTIONS), dynamic=False)(*saved["inputs"])
    print("no failure")
