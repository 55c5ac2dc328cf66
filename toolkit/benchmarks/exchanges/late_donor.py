"""The donor's recipe, whose payloads come a fixed number of receiver steps late.

    accelerate launch toolkit/benchmarks/exchanges/late_donor.py 8 [flags of recipes/donor.py]

and ``recipes/receiver.py --max_staleness 8``. On one machine a donor answers within a step or two,
whatever the bound. Here a payload becomes visible only once the receiver has taken that many steps
since the weights that it was taken at, as if the way between the two jobs were so long: every step
of the receiver gets a payload, of this age.
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import toolkit
from toolkit.bridge.digests import Digest
from toolkit.bridge.donor import GradientDonor
from toolkit.bridge.payload import Header
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.terms import record_bytes
from toolkit.launching import bundled


class LatePublisher(Publisher):
    """Holds payloads back.

    Args:
        late: receiver steps for which a payload is held back.
        stream: arguments of :class:`Publisher`.
    """

    def __init__(self, late: int, *stream: Any) -> None:
        super().__init__(*stream)
        self._late = late
        self._lock = threading.RLock()  # payloads come from beside the loop, and go from within it
        self._held: deque[tuple[Header, Mapping[str, Tensor]]] = deque()
        self._present = 0  # newest step of the receiver that is known
        self._released = -1  # step of the newest payload that is visible

    def publish(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> int:
        """Hold a payload back; its size then does not count yet. An end is published at once."""
        if header.kind == "end":
            return super().publish(header, tensors, digest)
        # A copy: the next payload's sums are made in the same memory.
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        with self._lock:
            self._held.append((header, held))
            return self.release(self._present)

    def release(self, receiver_step: int) -> int:
        """Publish what is due at this step of the receiver; the bytes.

        Where nothing is, because the donor missed the weights of that step, the next payload is:
        the receiver waits for one.
        """
        num_bytes = 0
        with self._lock:
            self._present = receiver_step
            while self._held and self._released < receiver_step - self._late:
                header, tensors = self._held.popleft()
                num_bytes += super().publish(header, tensors)
                self._released = header.receiver_step
        return num_bytes


class LateDonor(GradientDonor):
    """A donor with a :class:`LatePublisher`."""

    late = 0

    def _open_stream(self, name: str) -> Publisher:
        stream = (self.transport, name, self.run_id, record_bytes(self.shared))
        self._publishers.append(LatePublisher(self.late, *stream))
        return self._publishers[-1]

    def _poll(self) -> Any:
        decision = super()._poll()
        newest = self._inbox.fetched
        if newest is not None:
            assert isinstance(self._publisher, LatePublisher)
            self._publisher.release(newest.header.receiver_step)
        return decision


if __name__ == "__main__":
    LateDonor.late = int(sys.argv.pop(1))
    toolkit.GradientDonor = LateDonor  # type: ignore[misc]
    runpy.run_path(str(bundled("recipes") / "donor.py"), run_name="__main__")
