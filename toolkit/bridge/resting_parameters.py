"""Parameters that do not cross: frozen in all jobs, such as what LoRA adapters stand on.

They are compared once, when a job joins the run, by a digest of each. From then on they must stay
as they are: other values in one of the jobs would train on without any error.

A pretrained backbone whose adapters alone cross, for either job:

.. code-block:: python

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    class Model(torch.nn.Module):
        def __init__(self, name_or_path: str, num_classes: dict[str, int]) -> None:
            super().__init__()
            base = AutoModel.from_pretrained(name_or_path)
            self.backbone = get_peft_model(base, LoraConfig(target_modules=["q_lin", "v_lin"]))
            heads = {h: torch.nn.Linear(base.config.dim, n) for h, n in num_classes.items()}
            self.heads = torch.nn.ModuleDict(heads)

A model that is wrapped as a whole has other names, and of heads that are ``modules_to_save`` the
copy is trained: ``backbone="base_model.model.backbone"``,
``head="base_model.model.heads.h2.modules_to_save.default"``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from toolkit.bridge.digests import digest_tensors
from toolkit.parameters import SharedParameters
from toolkit.sharding import full_tensor, is_sharded

SAMPLE = 16  # elements of each parameter that every check looks at
_REMEDY = (
    "it was frozen when the bridge began, and does not cross. Freeze it later, or let it cross: "
    "BridgeConfig(frozen='cross') in all jobs"
)


class RestingParameters:
    """Those of one job, and what they were when it began. A collective where they are sharded.

    Args:
        shared: what the jobs share.

    Attributes:
        digests: by name, in hexadecimal.
    """

    def __init__(self, shared: SharedParameters) -> None:
        self._parameters = {name: shared.backbone[name] for name in sorted(shared.resting)}
        self.digests = {name: self._digest(name) for name in self._parameters}
        self._versions = {name: p._version for name, p in self._parameters.items()}
        self._sample = self._take_sample()

    def check(self) -> None:
        """Notice that one has been unfrozen, or overwritten with other values.

        A checkpoint that brings the same values is none. Of one that torch does not call written,
        as after ``parameter.data += ...`` (so adapters are merged), ``SAMPLE`` elements are
        compared. What FSDP2 has sharded, it moves about: there new values are not noticed.

        Raises:
            RuntimeError: naming it.
        """
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                raise RuntimeError(f"{name} requires a gradient, but {_REMEDY}")
        is_same = all(map(torch.equal, self._sample, self._take_sample()))
        for name, parameter in self._parameters.items():
            is_written = not is_same or parameter._version != self._versions[name]
            if not is_written or is_sharded(parameter):
                continue
            if self._digest(name) != self.digests[name]:
                raise RuntimeError(f"{name} has other values now, but {_REMEDY}")
            self._versions[name] = parameter._version

    def _take_sample(self) -> list[Tensor]:
        """Bytes of some elements of each, one tensor for each device, on the CPU."""
        parts: dict[torch.device, list[Tensor]] = defaultdict(list)
        for parameter in self._parameters.values():
            if not is_sharded(parameter):
                parts[parameter.device].append(_sample_of(parameter))
        return [torch.cat(of_device).cpu() for of_device in parts.values()]

    def _digest(self, name: str) -> str:
        whole = full_tensor(self._parameters[name].detach())
        return digest_tensors({name: whole.cpu().contiguous()})


def _sample_of(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().flatten()
    stride = max(1, flat.numel() // SAMPLE)
    return flat[::stride][:SAMPLE].contiguous().view(torch.uint8)
