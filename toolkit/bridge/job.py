"""What donors and receiver have in common: the run, the shared parameters, waiting, reading."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from toolkit.bridge.background import Background
from toolkit.bridge.compression import compressed_bytes
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.errors import BridgeError, DiskError, Interrupted, PayloadError
from toolkit.bridge.interruption import GRACE_SECONDS, Interruption
from toolkit.bridge.liveness import Heartbeat, PeerWatch, Wait
from toolkit.bridge.outage import ride_out, riding_out
from toolkit.bridge.payload import (
    Header,
    Record,
    check_identity,
    parse_record,
    payload_dtype,
)
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.resting import Rest
from toolkit.bridge.resting_parameters import RestingParameters
from toolkit.bridge.runs import CHECKPOINT_FILE, attach, read_checkpoint
from toolkit.bridge.transport import READ_SECONDS, DirectoryTransport
from toolkit.configuration import check_configuration
from toolkit.parameters import check_in_optimizer, check_optimizer_within, shared_parameters
from toolkit.sharding import check_sharding, full_tensor, is_sharded, reshard

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEADER_ALLOWANCE_BYTES = 2**20
_DISK_FAILS, _LACKS, _READ = 0.0, 1.0, 2.0  # what a rank has come to with a record, worst first


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
        self._wait_seconds, self._step_began = 0.0, time.monotonic()
        self.stop_signal = 0
        self._interruption = Interruption()
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
        terms = {
            "schemas": self._schemas(),
            "exchange": config.exchange,
            "local_steps": config.local_steps if config.exchange == "delta" else None,
            "scope": config.scope,
            "unit": config.unit,
            "class_names": self._class_names(),
        }
        claim = {
            "record_bytes": self._record_bytes(),
            "writes_behind": config.writes_behind,
            "compression": config.compression,
            "payload_budget_files": config.payload_budget_files,
            "payload_budget_gib": config.payload_budget_gib,
            "payload_bytes": compressed_bytes(
                (tensor for like in self._payloads_like.values() for tensor in like.values()),
                config.compression,
                config.topk_ratio,
            ),
            # No teacher is kept for a checkpoint.
            "checkpoint_interval": None
            if config.exchange == "distill"
            else config.checkpoint_interval,
            "checkpoints_kept": config.checkpoints_kept,
        }
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
        self._rest = Rest(self._heartbeat)
        self._background = Background()  # main process: where no step waits for what it writes

    def _schemas(self) -> dict[str, dict[str, list[Any]]]:
        """What all jobs must have alike: tensors, or in exchange ``distill`` heads by name only.

        A teacher may have another shape; whether the receiver can run it shows where it is read.
        """
        schemas = self.shared.schemas()
        if self.config.exchange == "distill":
            return {part: {} for part in schemas}
        for name, digest in self._resting.digests.items():
            schemas["backbone"][name].append(digest)
        return schemas

    def _class_names(self) -> dict[str, list[str]]:
        stated = self.config.class_names
        if unknown := sorted(set(stated) - set(self.shared.heads)):
            raise ValueError(
                f"class_names has {unknown[0]!r}, which this job does not share; it shares "
                f"{', '.join(self.shared.heads)}"
            )
        return {head: list(names) for head, names in stated.items()}

    def _open_on_main(self) -> None:
        self._publisher = self._open_stream(self.job)
        self.output_dir.mkdir(exist_ok=True)

    def _open_stream(self, name: str) -> Publisher:
        self._publishers.append(Publisher(self.transport, name, self.run_id, self._record_bytes()))
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

    def _record_bytes(self) -> int:
        """The size of a record of all that this job shares, at most."""
        # A gradient may be wider than its parameter, at most 8 bytes an element.
        elements = sum(tensor.numel() for tensor in self.shared.weights.values())
        return 8 * elements + 1024 * len(self.shared.weights) + _HEADER_ALLOWANCE_BYTES

    def _read(self, job: str, sequence: int) -> Record:
        """Read and verify one record of another job, on this rank."""
        record = parse_record(self._read_bytes(job, sequence), self.transport.signer)
        check_identity(record.header, run_id=self.run_id, job=job, sequence=sequence)
        return record

    def _read_bytes(self, job: str, sequence: int) -> memoryview:
        return self.transport.read(job, sequence, max_bytes=self._record_bytes())

    def _read_everywhere(
        self, job: str, sequence: int, digest: str, mine: Record | None
    ) -> Record | None:
        """The same record on every rank, or None on every rank if one of them lacks it.

        Args:
            job: whose record it is.
            sequence: the record's number.
            digest: the tensors' digest that the main process read; every rank must find it.
            mine: the record, where this rank has read it already.

        Raises:
            DiskError: on every rank, if the disk of one fails for ``peer_wait`` seconds.
        """
        record, disk_fails, start = mine, False, time.monotonic()
        while record is None:
            try:
                record = self._read(job, sequence)
            except (OSError, PayloadError) as error:
                disk_fails = isinstance(error, OSError) and error.errno != errno.ENOENT
                patience = self.config.peer_wait if disk_fails else READ_SECONDS
                if time.monotonic() > start + patience:
                    logger.warning("rank cannot read record %d: %s", sequence, error)
                    break
                time.sleep(0.05)
        if record is None:
            mine_is = _DISK_FAILS if disk_fails else _LACKS
        else:
            mine_is = _READ if record.header.tensors_digest == digest else _LACKS
        outcome = self.control.min(mine_is)
        if outcome == _DISK_FAILS:
            raise DiskError(
                f"the disk of some rank has failed for {self.config.peer_wait:g} s (--peer_wait), "
                f"as that rank's log says: let its host read {self.run_dir} again, then start this "
                "job again, with --resume_from_checkpoint if it has a checkpoint"
            )
        return record if outcome == _READ else None

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
        self._interruption.catch()
        try:
            yield
        except Interrupted as interrupted:  # on all ranks
            self.stop_signal = interrupted.signal
        finally:
            # This rank may know of a signal that is still on its way to it: not to end its
            # checkpoint.
            if not self.stop_signal:
                self._interruption.release()

    def _vote_to_stop(self) -> None:
        """Whether some rank has got a signal, on all ranks. A collective."""
        self.stop_signal = -int(self.control.min(-self._interruption.signal))

    def _decide(self, poll: Callable[[], T | None], grace: float) -> tuple[T, float]:
        """:meth:`ControlGroup.decide`, which a signal breaks off after ``grace`` seconds.

        A poll that fails with an ``OSError`` is repeated.

        Raises:
            DiskError: if the disk fails for ``peer_wait`` seconds.
        """

        def awake() -> T | None:
            try:
                return poll()
            except OSError:
                self._rest.wake()
                raise

        riding = riding_out(awake, self.run_dir, self.config.peer_wait)
        return self.control.decide(self._interruption.bounding(riding, grace))

    def _persist(self, action: Callable[[], T], grace: float = math.inf) -> T:
        """What ``action`` returns on the main process, once the disk lets it. A collective.

        The other ranks follow in slices, as in every wait, so that no collective times out.

        Args:
            action: may be repeated after an ``OSError``.
            grace: seconds after a signal at which it is given up. Not within a step: one that is
                half done is in no checkpoint.

        Raises:
            DiskError: if the disk fails for ``peer_wait`` seconds.
        """
        (outcome,), _ = self._decide(lambda: (action(),), grace)
        return outcome

    def _write_behind(self, action: Callable[[], object]) -> None:
        """Begin a write that no step waits for (main process), after :meth:`_catch_up`.

        It must touch nothing that this thread changes meanwhile. It is tried again while the disk
        fails; what it raises is raised by the next :meth:`_catch_up`.
        """
        directory, patience = self.run_dir, self.config.peer_wait
        self._background.start(lambda: ride_out(action, directory, patience))

    def _catch_up(self, grace: float = math.inf) -> None:
        """Wait for the write that :meth:`_write_behind` has begun. A collective."""
        # A donor is told by the receiver, its main process alone, whether a step waits for it.
        if self.config.writes_behind or self.role == "donor":
            self._decide(lambda: self._background.check() or None, grace)

    def _open_wait(self, peer: PeerWatch, what: str, patience: float | None = None) -> Wait:
        """Begin a wait for something of another job (main process).

        Args:
            peer: that job.
            what: what is waited for.
            patience: seconds of silence after which it is given up; by default ``peer_wait``.
        """
        config = self.config
        recipe = "receiver" if self.role == "donor" else "donor"
        hint = f"Start it now, for instance: accelerate launch recipes/{recipe}.py"
        if str(config.runs_dir) != "runs":
            hint += f" --runs_dir {config.runs_dir}"
        if config.run is not None:
            hint += f" --run {config.run}"
        return Wait(peer, what, config.peer_wait, config.require_peer, hint, patience)

    def _measure_wait(self) -> None:
        """Add to the metrics how long this job has waited for the other one since the last call."""
        waited, self._wait_seconds = self._wait_seconds, 0.0
        began, self._step_began = self._step_began, time.monotonic()
        share = waited / max(waited, self._step_began - began) if waited else 0.0
        self.metrics |= {"bridge/wait (s)": waited, "bridge/wait (% of the step)": 100.0 * share}

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
        self._catch_up()
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
        self._catch_up()
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
            self._catch_up(GRACE_SECONDS)
            self._persist(self._publish_end, GRACE_SECONDS)
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
        self._interruption.release()
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
            is_written = self._background.join(GRACE_SECONDS)
            try:
                self._background.check()
            except Exception as failure:  # the error that ends this job is the one to raise
                logger.error("the newest record of the %s is not written: %s", self.job, failure)
                is_written = False
            if issubclass(kind, KeyboardInterrupt) and self._heartbeat is not None and is_written:
                try:
                    self._publish_end()
                except OSError as failure:
                    self._say_untold(failure)
            self._stop()
