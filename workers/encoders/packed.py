"""Linear layers on a CPU whose weights are laid out once for oneDNN, instead of at each forward pass."""

import platform

import torch

#: Tokens of the forward pass that the layout is chosen for. Others are as right.
_TOKENS = 1_024


class _PackedLinear(torch.nn.Module):
    """Linear layer with packed weights, in float32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TOKENS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return made


def pack(module: torch.nn.Module) -> None:
    """Replace the linear layers below a module on a CPU by packed ones, where torch has oneDNN."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return
    with torch.no_grad():
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear and child.weight.dtype == torch.float32:
                    setattr(parent, name, _PackedLinear(child))
