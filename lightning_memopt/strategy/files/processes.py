"""Who is saving: processes of this machine, and whether they are still there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from pathlib import Path


@functools.cache
def machine() -> str:
    """Return an identifier of host, boot and container. Processes that share it see each other's process IDs."""
    facts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):  # not Linux
            facts.append(read())
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=4).hexdigest()


def is_alive(process: int) -> bool:
    """Return whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, and another user owns it
        return True
    return True
