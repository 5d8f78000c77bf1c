import numpy as np
import pytest
import torch
from quire_vera.method import Vera

from quire.sdk import AdapterLimits, LayerInfo
from quire.testing import parametrize_with_checks


@parametrize_with_checks(Vera)
def test_keeps_its_contract(check):
    check()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adds_what_peft_adds(tmp_path):
    peft = pytest.importorskip("peft")
    up, down = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 24, bias=False)
    model = torch.nn.ModuleDict({"up": up, "down": down})
    config = peft.VeraConfig(r=7, target_modules=["up", "down"], save_projection=True)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "vera_lambda" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    shapes = {"up": (40, 24), "down": (24, 40)}
    adapter = Vera.read_adapter(tmp_path, max_rank=8, module_shapes=shapes)
    method = Vera(AdapterLimits(2, 8, 16, torch.float32, torch.device("cpu")))
    layers = {}
    for name, (outputs, inputs) in shapes.items():
        info = LayerInfo(name, "linear", inputs, outputs, (name,), (outputs,), (outputs,), inputs, "row",
                         torch.float32, False)  # fmt: skip
        layers[name] = method.make_layer(info, 0, 1)
    for owner in (method, *layers.values()):
        for buffer, tensor in zip(owner.slot_buffers(1), owner.make_tensors(adapter), strict=True):
            buffer[: len(tensor)] = tensor
    method.prepare_metadata(np.array([1, -1, 1], np.int32))
    for name, (_, inputs) in shapes.items():
        x = torch.randn(3, inputs)
        base = model[name].base_layer(x).detach()
        out = base.clone()
        layers[name].apply(x, out)
        expected = torch.where(torch.tensor([[True], [False], [True]]), model[name](x).detach(), base)
        assert torch.allclose(out, expected, atol=1e-5)
