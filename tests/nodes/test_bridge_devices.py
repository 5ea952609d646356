"""Device placement without a GPU: every operation of a forward must find its operands on one (fake) CUDA device."""

from __future__ import annotations

import bridge_kit as kit
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = pytest.mark.usefixtures("comfy_core")

CUDA = torch.device("cuda:0")


def indexed(tensor, key):
    """Basic indexing by single operations: torch's own enters a CUDA guard, which a CPU build does not have."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(k, torch.Tensor) for k in keys):
        assert len(keys) == 1
        return torch.ops.aten.index.Tensor(tensor, keys)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (tensor.ndim - sum(k is not None and k is not Ellipsis for k in keys))
    dim = 0
    for k in keys:
        if k is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(k, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, k.start, k.stop, k.step or 1)
        else:
            tensor = tensor.select(dim, k)
            continue
        dim += 1
    return tensor


@pytest.fixture
def fake_cuda(monkeypatch):
    """FakeTensorMode in which a CPU build of torch takes "cuda:0" for a device, and core's transfers are empty tensors
    there."""
    import comfy.model_management as management

    def move(self, device=None, *args, **kwargs):
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                moved = torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)
                module._parameters[name] = moved
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)
        return self

    def cast_to(weight, dtype=None, device=None, non_blocking=False, copy=False, stream=None):
        return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device)

    core = kit.engine("attention.core")
    kit.bridge()

    def attend(self, q, k, v, *settings):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v).transpose(1, 2)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(management, "cast_to", cast_to)
    monkeypatch.setattr(management, "cast_to_device", lambda t, d, dtype, copy=False: cast_to(t, dtype, d))
    monkeypatch.setattr(management, "device_supports_non_blocking", lambda device: False)
    monkeypatch.setattr(management, "get_offload_stream", lambda device: None)
    monkeypatch.setattr(management, "sync_stream", lambda device, stream: None)
    monkeypatch.setattr(management, "pin_memory", lambda tensor: False)
    monkeypatch.setattr(core.AttentionCore, "forward", attend)
    monkeypatch.setattr(FakeTensor, "__getitem__", indexed, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake_model(fp8=False, lora=False):
    """A MODEL of fake tensors that core believes belongs on cuda:0."""
    weights = kit.core_weights(layers=1)
    model = kit.own_model(layers=1)
    net = model.model.diffusion_model
    net.fused_kernels = "eager"
    for name, parameter in list(net.named_parameters()):
        owner, leaf = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        owner._parameters[leaf] = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
        if fp8 and leaf == "weight" and name.startswith("blocks.") and parameter.ndim == 2:
            stored = torch.empty(parameter.shape, dtype=torch.float8_e4m3fn)
            owner._parameters["weight"] = torch.nn.Parameter(stored, requires_grad=False)
            owner.weight_scale = torch.nn.Parameter(torch.empty(parameter.shape[0], 1), requires_grad=False)
    model.model.model_sampling.sigmas = torch.empty(1000)
    model.load_device = CUDA
    if lora:
        file = kit.core_lora(
            {
                k: (torch.empty(4, d.shape[1]), torch.empty(u.shape[0], 4))
                for k, (d, u) in kit.lora_pairs(weights).items()
            }
        )
        model = kit.with_core_lora(model, {**file, "diffusion_model.blocks.0.modulation.diff": torch.empty(1, 6, 128)})
    return model


def forward(model):
    net = model.model.diffusion_model
    x = torch.empty(1, 16, 2, 4, 4, device=CUDA)
    return net(x, torch.empty(1, device=CUDA), torch.empty(1, 8, kit.TEXT_DIM, device=CUDA), transformer_options={})


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("budget", [0, 1])
def test_every_operand_is_on_the_device(fake_cuda, budget, fp8, lora):
    model = fake_model(fp8, lora)
    model.patch_model(CUDA, lowvram_model_memory=budget)
    resting = {p.device.type for p in model.model.diffusion_model.parameters()}
    assert resting == ({"cuda"} if budget == 0 else {"cuda", "cpu"})
    assert forward(model).device == CUDA


@pytest.mark.parametrize(
    "fault", ["norm read directly", "leaf unknown to core", "modulation left behind", "scale left behind"]
)
def test_the_check_notices_what_it_is_for(fake_cuda, fault, monkeypatch):
    layers = kit.engine("models.layers")
    model = fake_model(fp8=fault == "scale left behind")
    net = model.model.diffusion_model
    block = net.blocks[0]
    if fault == "norm read directly":
        monkeypatch.setattr(
            block.norm3, "fetch", lambda like: (block.norm3.weight, block.norm3.bias, None), raising=False
        )
    elif fault == "leaf unknown to core":
        leaf = block.self_attn.q
        del leaf.comfy_cast_weights
        leaf.weight_source = layers.OWN_WEIGHTS
    elif fault == "modulation left behind":
        model.remove_callbacks_with_key("on_load_after", "wan_fp8")
        monkeypatch.setattr(torch.Tensor, "to", stay_home(torch.Tensor.to))
    else:
        monkeypatch.setattr(layers.Leaf, "dequantized", lambda self, w, dtype: w.to(dtype) * self.weight_scale)
    model.patch_model(CUDA, lowvram_model_memory=1)
    with pytest.raises(RuntimeError, match=r"devices|device"):
        forward(model)


def stay_home(original):
    """A model that casts its modulation without moving it."""

    def to(self, *args, **kwargs):
        if self.ndim == 3 and self.shape[1] == 6:
            kwargs.pop("device", None)
        return original(self, *args, **kwargs)

    return to
