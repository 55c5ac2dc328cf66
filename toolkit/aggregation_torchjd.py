"""Weightings of the package ``torchjd`` as rules of ``aggregation``; the package is optional.

``pip install "gradient-bridge[torchjd]"`` brings it. Offered are the weightings of torchjd 0.18
that need the Gramian alone and keep nothing from step to step:

============== =========================== =====================================================
name           packages besides torchjd    published in
============== =========================== =====================================================
``AlignedMTL`` none                        Senushkin et al. 2023, arXiv 2305.19000
``CAGrad``     cvxpy, clarabel             Liu et al. 2021, arXiv 2110.14048; here with c = 0.5
``DualProj``   qpsolvers, quadprog         Lopez-Paz and Ranzato 2017, arXiv 1706.08840
``FairGrad``   scipy                       Ban and Ji 2024, arXiv 2402.15638; here with alpha = 1
``IMTLG``      none                        Liu et al., ICLR 2021
``MGDA``       none                        see ``aggregation.mgda_weights``, which is exact
``PCGrad``     none                        see ``aggregation.pcgrad_weights``
``UPGrad``     qpsolvers, quadprog         see ``aggregation.upgrad_weights``, which needs neither
============== =========================== =====================================================

Read the licences of the solvers before you install them: quadprog's and qpsolvers' are the GPL and
the LGPL. GradVac, PCD and CR-MOGM are left out because they keep a state, which a checkpoint would
not carry and a skipped step would move; Krum because it needs three gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PREFIX = "torchjd:"
TORCHJD_WEIGHTINGS: dict[str, dict[str, float]] = {
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "DualProj": {},
    "FairGrad": {"alpha": 1.0},
    "IMTLG": {},
    "MGDA": {},
    "PCGrad": {},
    "UPGrad": {},
}  # with their settings
_STATEFUL = ("GradVac", "PCD", "CRMOGM")
_PROJECTING = ("DualProj", "UPGrad")
# Added to the diagonal of a Gramian of trace 1. torchjd's default of 1e-4 is as much as the squared
# norm of a gradient a hundred times shorter than the other: the result then conflicts with it.
_REGULARISATION = 1e-12


def torchjd_weights(name: str) -> Callable[[Tensor], Tensor]:
    """A rule that asks torchjd.

    torchjd compares with absolute thresholds (CAGrad returns zeros for gradients shorter than
    about 0.01), so the Gramian is divided by the mean of its diagonal first. That changes no
    weight of these methods but FairGrad's, which are put right afterwards: its weights w solve
    ``G w = w^(-1/alpha)``, so those of ``u G`` are ``u^(-alpha/(1 + alpha)) w``.

    Args:
        name: a key of ``TORCHJD_WEIGHTINGS``.

    Raises:
        ValueError: for another name, and where torchjd or a solver is not installed.
    """
    if name in _STATEFUL:
        raise ValueError(
            f"aggregate '{PREFIX}{name}' keeps a state between steps, which would be lost with a "
            f"checkpoint and moved by a skipped step; choose one of {list(TORCHJD_WEIGHTINGS)}"
        )
    if name not in TORCHJD_WEIGHTINGS:
        raise ValueError(
            f"aggregate '{PREFIX}{name}' is unknown; choose one of "
            f"{[PREFIX + known for known in TORCHJD_WEIGHTINGS]}"
        )
    if importlib.util.find_spec("torchjd") is None:
        raise ValueError(
            f"aggregate '{PREFIX}{name}' needs the package torchjd, an extra of this one: "
            'pip install "gradient-bridge[torchjd]"'
        )
    try:
        weighting = _build(name)
    except ImportError as error:
        raise ValueError(f"aggregate '{PREFIX}{name}': {error}") from None

    def weights(gramian: Tensor) -> Tensor:
        unit = float(gramian.diagonal().mean())
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # PCGrad draws an order
            found: Tensor = weighting(gramian / unit)
        if name == "FairGrad":
            alpha = TORCHJD_WEIGHTINGS[name]["alpha"]
            found = found / unit ** (alpha / (1 + alpha))
        return found

    return weights


def _build(name: str) -> Any:
    import torchjd.aggregation
    import torchjd.linalg

    settings: dict[str, Any] = dict(TORCHJD_WEIGHTINGS[name])
    if name in _PROJECTING:
        settings["projector"] = torchjd.linalg.QuadprogProjector(
            norm_eps=0.0, reg_eps=_REGULARISATION
        )
    return getattr(torchjd.aggregation, f"{name}Weighting")(**settings)
