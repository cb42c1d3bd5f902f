"""A program: prints the code that Inductor writes for a packed model on a CUDA device that is not there.

Run in a process of its own, because it tells PyTorch and Triton that an H200 is present: facts of the device are made up,
tensors are fake, Inductor's pattern initialisers (which would run on the device) are off, and compilation ends with the code.
"""

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import types
import warnings
from typing import Any

import torch
import torch._inductor.config
import torch.utils._triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, L2_cache_size=50 << 20,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32, is_integrated=False, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip


def pretend_device() -> None:
    """PyTorch and Triton see one H200; nothing can run on it."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda *_: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0), get_device_interface=lambda: torch.cuda,
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    rng = torch.zeros(16, dtype=torch.uint8)
    facts: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H200,
        "get_device_capability": (9, 0), "get_device_name": H200.name, "is_bf16_supported": True, "_lazy_init": None,
        "get_rng_state": rng, "set_rng_state": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
        "synchronize": None,
    }  # fmt: skip
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    interface = {"get_compute_capability": 90, "is_available": True, "current_device": 0, "device_count": 1,
                 "get_device_properties": H200, "is_triton_capable": True, "raise_if_triton_unavailable": None}  # fmt: skip
    for name, value in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, _value=value, **__: _value))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_, **__: H200)  # type: ignore[method-assign]
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)  # type: ignore[method-assign]


class Written(Exception):
    """Carries the code out of the compiler."""


def keep_code() -> None:
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering

    def written(graph: Any) -> None:
        code = graph.codegen()[0]
        raise Written(getattr(code, "value", code))

    GraphLowering.compile_to_module = written  # type: ignore[method-assign,assignment]
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None  # type: ignore[assignment]
    torch._inductor.config.compile_threads = 1


def packed_model() -> nn.Module:
    """LayerNorm, int4 linear, GELU, int4 linear in bf16, all of fake tensors."""
    from qcompile.formats import Scheme, get
    from qcompile.tensor import as_parameter, tensor_class

    for name in ("kaiming_uniform_", "uniform_"):
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    where = {"device": "cuda", "dtype": torch.bfloat16}
    model = nn.Sequential(nn.LayerNorm(256, **where), nn.Linear(256, 512, **where), nn.GELU(), nn.Linear(512, 256, **where))
    scheme = Scheme(get("int4_g128"))
    for linear in (model[1], model[3]):
        n, k = linear.weight.shape
        planes = [torch.empty(scheme.format.part_shape(p, n, k), dtype=p.dtype, device="cuda") for p in scheme.format.parts]
        linear.weight = as_parameter(tensor_class(scheme)(planes, (n, k), torch.bfloat16))
    return model.eval().requires_grad_(False)


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("has_triton", "has_triton_package"):
        setattr(torch.utils._triton, name, lambda *_, **__: True)
    pretend_device()
    keep_code()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, x = packed_model(), torch.empty(3, 5, 256, device="cuda", dtype=torch.bfloat16)
        try:
            torch.compile(model, backend="inductor")(x)
        except Exception as error:
            inner = getattr(error, "inner_exception", error)
            if not isinstance(inner, Written):
                raise
            print(inner.args[0])


if __name__ == "__main__":
    main()
