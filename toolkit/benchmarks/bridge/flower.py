"""The hand-over as a round of Flower: one server, one client, over gRPC.

By Flower's own gRPC server and ``start_client``, which keep one stream open for all rounds. Newer
ways to run Flower put a SuperLink and a SuperNode between the two, which ask each other for
messages every few seconds: this is the fast one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch

from toolkit.benchmarks.bridge.raw import POLL_SECONDS
from toolkit.benchmarks.bridge.ways import Side, Tensors, Way, num_bytes_of

MAX_MESSAGE_BYTES = 2**31 - 1  # of gRPC
CLIENT_SECONDS = 60.0  # within which the client must come, and go


class Flower(Way):
    """The receiver is the server: for it, a round is one call, which blocks until the answer."""

    title = "Flower"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before it is imported
        self._address = directory / "address"
        self._max_bytes = min(MAX_MESSAGE_BYTES, 2 * num_bytes_of(tensors) + 2**20)
        self._weights: queue.Queue[Any] = queue.Queue()
        self._gradients: queue.Queue[Any] = queue.Queue()
        self._server: Any = None
        self._client: Any = None
        self._thread: threading.Thread | None = None
        if side == "receiver":
            self._serve()
        else:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    @classmethod
    def lacks(cls) -> str:
        return "" if importlib.util.find_spec("flwr") else "not installed"

    def _serve(self) -> None:
        from flwr.server import SimpleClientManager
        from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        clients = SimpleClientManager()
        self._server = start_grpc_server(clients, address, max_message_length=self._max_bytes)
        temporary = self._address.with_suffix(".tmp")
        temporary.write_text(address)
        temporary.rename(self._address)
        if not clients.wait_for(1, timeout=CLIENT_SECONDS):
            raise TimeoutError("no client of Flower came")
        (self._client,) = clients.all().values()

    def _follow(self) -> None:
        from flwr.client import Client, start_client
        from flwr.common import Code, FitIns, FitRes, Status

        weights, gradients = self._weights, self._gradients

        class Donor(Client):
            def fit(self, ins: FitIns) -> FitRes:
                weights.put(ins.parameters)
                return FitRes(Status(Code.OK, ""), gradients.get(), num_examples=1, metrics={})

        while not self._address.exists():
            time.sleep(POLL_SECONDS)
        start_client(
            server_address=self._address.read_text(),
            client=Donor(),
            grpc_max_message_length=self._max_bytes,
            insecure=True,
        )

    def send(self, number: int) -> None:
        from flwr.common import FitIns, ndarrays_to_parameters

        parameters = ndarrays_to_parameters([tensor.numpy() for tensor in self.tensors.values()])
        if self.side == "donor":
            self._gradients.put(parameters)
        else:
            answer = self._client.fit(FitIns(parameters, {}), timeout=None, group_id=number)
            self._weights.put(answer.parameters)

    def receive(self, number: int) -> Tensors:
        from flwr.common import parameters_to_ndarrays

        arrays = parameters_to_ndarrays(self._weights.get())
        return {
            name: torch.from_numpy(array) for name, array in zip(self.tensors, arrays, strict=True)
        }

    def close(self) -> None:
        """The server asks the client to go, and ends."""
        if self._thread is not None:
            self._thread.join(CLIENT_SECONDS)
        if self._client is not None:
            from flwr.common import ReconnectIns
            from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

            with contextlib.suppress(GrpcBridgeClosed):  # it has gone without an answer
                self._client.reconnect(ReconnectIns(None), timeout=None, group_id=0)
        if self._server is not None:
            self._server.stop(grace=1).wait()
