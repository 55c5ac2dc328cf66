"""A donor's own weights, in a stream beside that of its payloads.

A donor that trains by itself publishes them now and then, for a receiver that begins with its head
(``init_h2``) or learns from it as a teacher. They are states and no payloads: only the newest
counts, none has a fate, and the donor deletes the older ones itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from toolkit.bridge.config import JOB_NAME
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import Record
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)

_SUFFIX = ".weights"


def stream_of(donor: str) -> str:
    """The name of the stream with a donor's own weights."""
    return f"{donor}{_SUFFIX}"


def donors_with_weights(transport: DirectoryTransport) -> list[str]:
    """The names of the donors that have opened such a stream, in order."""
    streams = transport.streams()
    donors = [stream.removesuffix(_SUFFIX) for stream in streams if stream.endswith(_SUFFIX)]
    return [donor for donor in donors if JOB_NAME.fullmatch(donor)]


def newest_own_weights(
    transport: DirectoryTransport, donor: str, read: Callable[[str, int], Record]
) -> Record | None:
    """The newest weights of a donor that can be read; None if there are none.

    Args:
        transport: the run's transport.
        donor: its name.
        read: reads and verifies a record of a stream.
    """
    stream = stream_of(donor)
    for sequence in reversed(transport.sequences(stream)):
        try:
            record = read(stream, sequence)
            if record.header.kind != "weights":
                raise PayloadError("alien", f"{record.header.kind!r} among a donor's weights")
            return record
        except FileNotFoundError:
            continue
        except PayloadError as error:
            logger.warning("weights %d of the %s rejected: %s", sequence, donor, error)
            transport.reject(stream, sequence, error.reason, error.detail)
    return None
