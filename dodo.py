"""The default workspace: a small network written in Relax, and squeezenet from the onnx package."""

from bench import zoo
from pipeline import DOIT_CONFIG, Model, Workspace  # noqa: F401 - doit reads DOIT_CONFIG


def mlp():
    """Two layers, 64 → 128 → 10, with seeded weights."""
    import numpy as np
    from tvm.relax.frontend import nn

    class Mlp(nn.Module):
        def __init__(self):
            self.hidden = nn.Linear(64, 128)
            self.out = nn.Linear(128, 10)

        def forward(self, x: nn.Tensor):
            return nn.op.softmax(self.out(nn.op.relu(self.hidden(x))))

    net = Mlp()
    net.to("float32")
    random = np.random.default_rng(0)
    for _, parameter in net.named_parameters():
        parameter.data = random.standard_normal(parameter.shape).astype("float32") * 0.1
    return net, {"forward": {"x": nn.spec.Tensor([1, 64], "float32")}}


def squeezenet():
    return zoo.light("squeezenet")


workspace = Workspace(
    Model.relax("mlp", mlp),
    Model.onnx("squeezenet", squeezenet),
)
