"""What donors and receiver have in common: the run, the shared parameters, waiting, reading."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from toolkit.bridge import files
from toolkit.bridge.accumulation import WindowAccumulator
from toolkit.bridge.authentication import KEY_SOURCES, UNSIGNED, Signer, load_key
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.errors import BridgeError, DiskError, Interrupted
from toolkit.bridge.interruption import GRACE_SECONDS
from toolkit.bridge.liveness import Heartbeat
from toolkit.bridge.payload import (
    Header,
    Record,
    check_identity,
    parse_record,
    payload_dtype,
)
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.reading import Reading
from toolkit.bridge.resting_parameters import RestingParameters
from toolkit.bridge.runs import CHECKPOINT_FILE, attach, read_checkpoint
from toolkit.bridge.terms import claim_of, record_bytes, terms_of
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.waiting import Waiting
from toolkit.configuration import check_configuration
from toolkit.parameters import check_in_optimizer, check_optimizer_within, shared_parameters
from toolkit.sharding import check_sharding, full_tensor, is_sharded, reshard

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BridgeJob:
    """One side of the bridge. Use :class:`GradientDonor` or :class:`GradientReceiver`."""

    role: ClassVar[Role]

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: BridgeConfig | None = None,
        *,
        backbone: str = "backbone",
        head: str | Sequence[str] = "heads.h2",
    ) -> None:
        self.config = config = config or BridgeConfig()
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.model = accelerator.unwrap_model(model, keep_torch_compile=False)
        try:
            check_configuration(accelerator, may_shard=True)
            reshard(self.model)
            check_sharding(model, accelerator.num_processes)
        except ValueError as error:
            raise BridgeError(str(error)) from None
        # Taken here: FSDP2 puts other tensors in their place while a forward needs them whole.
        self.parameters = dict(self.model.named_parameters())
        heads = (head,) if isinstance(head, str) else tuple(head)
        frozen_rest = config.follows and config.frozen == "rest"
        self.shared = shared_parameters(self.model, backbone, heads, frozen_rest=frozen_rest)
        check_in_optimizer(self.shared.trained, optimizer)
        check_optimizer_within(self.model, optimizer)
        self.control = ControlGroup(accelerator)
        self.accumulator = WindowAccumulator(
            accelerator, model, self.control, config.loss_reduction
        )
        self.metrics: dict[str, float] = {}
        self.stop_signal = 0
        self._signer = self._agree_on_key()
        self._resting = RestingParameters(self.shared)
        self._attach()
        accelerator.register_save_state_pre_hook(self._on_save_state)
        accelerator.register_load_state_pre_hook(self._on_load_state)

    def _agree_on_key(self) -> Signer:
        """This job's signer; its ranks may run on machines with environments of their own."""
        signer, failure = UNSIGNED, None
        try:
            signer = Signer(load_key(self.config.key_file))
        except BridgeError as error:
            failure = error
        mine = signer.sign("ranks", b"") if signer.has_key else ""
        first = self.control.on_main(lambda: mine)
        if not self.control.agree(failure is None and mine == first):
            raise failure or BridgeError(f"not all ranks have the same key ({KEY_SOURCES})")
        return signer

    def _attach(self) -> None:
        config = self.config
        # By head, what the tensors of a payload are like.
        self._payloads_like = {
            head: {
                name: torch.empty(p.shape, dtype=payload_dtype(p.dtype), device="meta")
                for name, p in self._gradient_parameters(head).items()
            }
            for head in self.shared.heads
        }
        terms = terms_of(config, self.shared, self._resting.digests)
        claim = claim_of(config, self.shared, self._payloads_like)
        attachment = self.control.on_main(
            lambda: attach(self.role, config, terms, claim, self._signer)
        )
        self.run_dir, self.run_id = attachment.run_dir, attachment.run_id
        self.job, self.attempt = config.job_of(self.role), attachment.attempt
        self.transport = DirectoryTransport(
            self.run_dir / "bridge", self._signer.of_run(self.run_id)
        )
        self.output_dir = self.run_dir / self.job
        self._heartbeat: Heartbeat | None = None
        self._publishers: list[Publisher] = []  # main process: one for each stream
        self._closed = False
        self.control.on_main(self._open_on_main)
        if self.accelerator.is_main_process:
            self._heartbeat = Heartbeat(self.transport, self.job, self.attempt)
            signs = ", which signs with a key" if self._signer.has_key else ""
            logger.info("%s of run %s%s", self.job, self.run_dir, signs)
        self._waiting = Waiting(self.control, config, self.role, self.run_dir, self._heartbeat)
        self._reading = Reading(self._read_now, self.control, self.run_dir, config)

    def _open_on_main(self) -> None:
        self._publisher = self._open_stream(self.job)
        self.output_dir.mkdir(exist_ok=True)

    def _open_stream(self, name: str) -> Publisher:
        self._publishers.append(
            Publisher(self.transport, name, self.run_id, record_bytes(self.shared))
        )
        return self._publishers[-1]

    def _gradient_parameters(self, head: str) -> dict[str, nn.Parameter]:
        """What a gradient for one head is for: that head, and the backbone if it crosses."""
        return (
            self.shared.of_gradient(head) if self.config.scope == "all" else self.shared.heads[head]
        )

    @torch.no_grad()
    def _whole_weights(
        self, tensors: Mapping[str, Tensor], into: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Shared weights and buffers as they are, whole, on the CPU; empty but on the main process.

        A collective where they are sharded.

        Args:
            tensors: which ones.
            into: take a copy, in these tensors of the last call; empty before the first.
        """
        weights = {} if into is None else into
        for name, tensor in tensors.items():
            whole = full_tensor(tensor.detach())
            if not self.accelerator.is_main_process:
                continue
            if into is None:
                there = whole.cpu().contiguous()
                # The next forward changes a buffer, and they may be published again after it.
                weights[name] = there.clone() if name in self.shared.buffers else there
            elif name in into:
                into[name].copy_(whole)
            else:
                into[name] = torch.empty_like(
                    whole, device="cpu", memory_format=torch.contiguous_format
                ).copy_(whole)
        return weights

    # -- reading ----------------------------------------------------------------------------

    def _read_now(self, job: str, sequence: int) -> Record:
        """Read and verify one record of another job, on this rank."""
        record = parse_record(self._read_bytes(job, sequence), self.transport.signer)
        check_identity(record.header, run_id=self.run_id, job=job, sequence=sequence)
        return record

    def _read_bytes(self, job: str, sequence: int) -> memoryview:
        return self.transport.read(job, sequence, max_bytes=record_bytes(self.shared))

    # -- waiting, and being interrupted -------------------------------------------------------

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """While this is entered, Ctrl-C and SIGTERM are a wish to end after the present step.

        ``stop_signal`` is then the signal's number, on all ranks alike from the end of the step
        on; before, it is 0. A donor's ``follow()`` ends by itself; the loop of a receiver has to
        leave. A wait for the other job is broken off, a receiver's after 5 s: the block ends
        there, and the step has not happened. A second signal ends at once, by
        ``KeyboardInterrupt``.

        It goes inside of ``with receiver:``; a checkpoint can be saved between the two ends.
        """
        self._waiting.interruption.catch()
        try:
            yield
        except Interrupted as interrupted:  # on all ranks
            self.stop_signal = interrupted.signal
        finally:
            # This rank may know of a signal that is still on its way to it: not to end its
            # checkpoint.
            if not self.stop_signal:
                self._waiting.interruption.release()

    def _vote_to_stop(self) -> None:
        """Whether some rank has got a signal, on all ranks. A collective."""
        self.stop_signal = -int(self.control.min(-self._waiting.interruption.signal))

    # -- checkpoints ------------------------------------------------------------------------

    @property
    def obstacle_to_saving(self) -> str | None:
        """Why ``save_state()`` is refused just now; None where it is not."""
        if self.accumulator.is_open:
            return (
                "save_state() in the middle of an accumulation window would lose its gradients; "
                "save after the step"
            )
        return None

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def _on_save_state(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        self._waiting.catch_up()
        if (obstacle := self.obstacle_to_saving) is not None:
            raise RuntimeError(obstacle)
        sharded = any(map(is_sharded, self.parameters.values()))
        if sharded and self.accelerator.distributed_type != DistributedType.FSDP:
            raise RuntimeError(
                "save_state() would write rank 0's shards only, because Accelerate has not sharded "
                "this model: let it do so (accelerate_configs/fsdp2.yaml)"
            )
        if self.accelerator.is_main_process:
            content = {
                "job": self.job,
                "run": self.run_dir.name,
                "run_id": self.run_id,
                **self._state(),
            }
            files.replace(Path(directory, CHECKPOINT_FILE), json.dumps(content, indent=1).encode())

    def _on_load_state(self, models: list[nn.Module], directory: str) -> None:
        content = read_checkpoint(Path(directory))
        self._waiting.catch_up()
        if content["run_id"] != self.run_id:
            raise BridgeError(
                f"{directory} is a checkpoint of run {content['run']}, but this job has joined "
                f"{self.run_dir.name}: give BridgeConfig(resume_from_checkpoint={directory!r})"
            )
        self._load_state(content)

    def save_position(self, directory: Path) -> None:
        """Write the bridge's position beside a checkpoint that something else has saved.

        ``accelerator.save_state()`` does it by itself. A collective.

        Args:
            directory: the checkpoint's, which exists; complete but for this.

        Raises:
            RuntimeError: where :attr:`obstacle_to_saving` has a reason.
        """
        self._on_save_state([], [], str(directory))

    def load_position(self, directory: Path) -> None:
        """Go on from where :meth:`save_position` was called, before the first ``backward()``.

        ``accelerator.load_state()`` does it by itself. A collective. The caller loads weights and
        optimizer, and has given the directory to ``BridgeConfig(resume_from_checkpoint=...)``.

        Raises:
            BridgeError: if the bridge has not been saved there, or the run was another one.
        """
        self._on_load_state([], str(directory))

    # -- the end ----------------------------------------------------------------------------

    def traffic(self) -> dict[str, int]:
        """What this start of the job has published, in all its streams, for ``results.json``.

        Heartbeats and acknowledgements, a few bytes each, do not count. All zero but on the main
        process.
        """
        return {
            "published_records": sum(stream.num_records for stream in self._publishers),
            "published_bytes": sum(stream.num_bytes for stream in self._publishers),
        }

    def _end_header(self) -> Header:
        raise NotImplementedError

    def close(self) -> None:
        """Publish this job's end and leave together. A collective; safe to call twice.

        Where the disk refuses the end for ``peer_wait`` seconds, this job ends without: what it
        has trained is worth more, and the others wait for it no longer than they say.
        """
        if self._closed:
            return
        try:
            self._waiting.catch_up(GRACE_SECONDS)
            self._waiting.persist(self._publish_end, GRACE_SECONDS)
        except (DiskError, Interrupted) as error:
            self._say_untold(error)
        finally:
            self._stop()
        self.control.close()

    def _publish_end(self) -> None:
        self._publisher.publish(self._end_header(), {})

    def _say_untold(self, error: Exception) -> None:
        logger.error("the other jobs are not told that the %s has ended: %s", self.job, error)

    def _stop(self) -> None:
        self._closed = True
        self._reading.stop()
        self._waiting.interruption.release()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            # No collective: the other ranks may be elsewhere. After an error the stream stays open,
            # as after a crash: the other job waits for a resume as long as its peer_wait.
            # A process that ends while a thread is inside of torch is aborted.
            is_written = self._waiting.background.join(GRACE_SECONDS)
            try:
                self._waiting.background.check()
            except Exception as failure:  # the error that ends this job is the one to raise
                logger.error("the newest record of the %s is not written: %s", self.job, failure)
                is_written = False
            if issubclass(kind, KeyboardInterrupt) and self._heartbeat is not None and is_written:
                try:
                    self._publish_end()
                except OSError as failure:
                    self._say_untold(failure)
            self._stop()
