"""Damage checkpoints as disks, kills, other processes and attackers do, hundreds of times, and count the outcomes.

    python benchmarks/faults.py                               # writes docs/reliability.md, about 12 minutes
    python benchmarks/faults.py --rounds 20 --output /tmp     # a quick look

The functions are those of ``tests/strategy/files/test_faults.py``, on a network with a few hundred weights in both
formats. An outcome that breaks a promise is printed, and the script fails. The cost of checksums is measured on a
larger file.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from _report import ROOT, markdown, provenance, show
from torch import nn

sys.path.insert(0, str(ROOT))

from lightning_memopt.strategy.checkpoint.load import load_checkpoint
from lightning_memopt.strategy.checkpoint.save import model_state, save_directory, save_file
from tests.strategy.files import _faults

HEAD = ["what was done", "times", "refused, file named", "loaded, content right", "anything else"]
COSTS = ["format", "save", "of it checksums", "load", "load with verify=False", "verification"]

PAGE = """# What can be trusted

This page lists what a checkpoint of `memopt_fsdp` promises and how each promise was tested.
[SECURITY.md](../SECURITY.md) says what loading trusts, [strategy.md](strategy.md) how saving and loading work.

## Promises

1. **A save that is killed, or fails, leaves the previous checkpoint in place.** The name always refers to the old or
   the new checkpoint, complete.
2. **A load reads one save.** Another process may replace the checkpoint meanwhile: all files are opened once, and the
   ranks agree on which save they have opened before they read.
3. **A load returns what was saved.** Whole files have checksums, computed while the files are written and compared
   before anything is used. A damaged file is refused by name.
4. **No file can run code.** Everything except tensors is unpickled with an allow-list, in both formats and in every
   file.
5. **An error changes nothing.** Weights, optimizer state and hyperparameters keep their values.
6. **Two runs that save under one name do not break each other.** Each save is whole, and the last one stays. The next
   save removes what dead processes have left.
7. **A full disk is named as the cause**, regardless of what torch's writer reports.
8. **A save in the background keeps the previous checkpoint until it is complete**, even if a callback asks to remove
   that one.

On file systems without renames, such as object stores, promises 1 to 7 hold as
[export.md](export.md#checkpoints-at-urls) says: a reader that another save overtakes gets an error.

## Counts

The counts come from one process and both formats (a directory and a file), on a small network with state of
`adapm_lean`. "Loaded, content right" after a flipped bit means that the bit lay in padding.

{table}

`tests/strategy/checkpoint/` repeats this on several ranks, with fewer repetitions.
`tests/strategy/files/test_atomic.py` kills a save before and after every single operation on files,
`test_async.py` one in the background, and `test_remote.py` one to a store that cannot rename.

## What verification costs

Seconds per GB; {size} MB of weights, one process, the median of {repeats}. A save computes checksums while it writes. A
load reads everything once before it uses anything; the ranks divide the files of a directory among themselves.

{costs}

`MemOptFSDPStrategy(verify=False)` skips the checksums. It trusts nothing more: no file can run code, sizes are
compared, and weights and state must be finite.

{provenance}
"""


def count(rounds: int) -> list[tuple[str, int, Counter[str]]]:
    """Return the name, the repetitions and the outcomes of each fault."""
    rng = random.Random(0)
    results = []
    for whole, form in ((False, "directory"), (True, "file")):
        kinds: list[tuple[str, int, Callable[..., Counter[str]]]] = [
            (f"{name}, {form}", rounds, partial(damaged, rng=rng, whole=whole, how=how))
            for name, how in (
                ("a bit flipped", _faults.flipped),
                ("a file truncated", _faults.truncated),
                ("512 bytes overwritten", _faults.scribbled),
            )
        ]
        few = max(1, rounds // 5)
        kinds += [
            (f"read beside a writer, {form}", few, partial(counted, _faults.reading_beside_a_writer, whole=whole)),
            (f"killed while saving, {form}", few, partial(counted, _faults.killed_saves, rng, whole=whole)),
            (f"two writers, one killed, {form}", few, partial(counted, _faults.two_writers, rng, whole=whole)),
            (f"a disk full at a random byte, {form}", few, partial(counted, _faults.full_disk, rng, whole=whole)),
        ]
        places = _faults.WHOLE_PLACES if whole else tuple(_faults.PLACES)
        kinds.append((f"a command in the file, {form}", 2 * len(places), partial(hostile, places=places)))
        for name, times, kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                results.append((name, times, kind(folder=Path(folder), times=times)))
            print(name, dict(results[-1][2]), flush=True)
    return results


def damaged(folder: Path, times: int, *, rng: random.Random, whole: bool, how: Callable[..., bytes]) -> Counter[str]:
    """Damage a checkpoint and load it, repeatedly."""
    return _faults.damage(folder, rng, times, whole=whole, how=how)


def counted(
    fault: Callable[..., Counter[str]], *rng: random.Random, folder: Path, times: int, whole: bool
) -> Counter[str]:
    """Inject one of the faults into several processes."""
    return fault(folder, *rng, times, whole=whole)


def hostile(folder: Path, times: int, *, places: tuple[str, ...]) -> Counter[str]:
    """Put a command into every place of a checkpoint, with updated checksums and without any."""
    found: Counter[str] = Counter()
    for place in places:
        for drop in (False, True):
            message = _faults.hostile(folder, place, drop=drop)
            found["refused by name" if "os.system" in message and "last.ckpt" in message else message] += 1
    return found


def row(name: str, times: int, found: Counter[str]) -> list[str]:
    """Return a row of the table."""
    refused, loaded = (found.get(key, 0) for key in _faults.GOOD)
    other = {key: number for key, number in found.items() if key not in _faults.GOOD}
    return [name, str(times), str(refused), str(loaded), str(other or 0)]


def costs(megabytes: int, repeats: int) -> list[list[str]]:
    """Return the seconds per GB of saving and loading, with and without checksums."""
    width = 1024
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(megabytes // 4)))
    size = sum(param.nbytes for param in model.parameters()) / 1e9
    rows = []
    for whole, form in ((False, "directory"), (True, "file")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.ckpt"

            def save(path: Path = path, whole: bool = whole) -> None:
                checkpoint = {"state_dict": model_state(model, whole=whole)}
                if whole:
                    save_file(checkpoint, path, _faults.IO)
                else:
                    save_directory(checkpoint, path)

            def load(path: Path = path, *, verify: bool) -> None:
                load_checkpoint(path, model, None, _faults.IO, verify=verify)

            saved = seconds(save, repeats)
            with mock.patch.object(zlib, "crc32", return_value=0):
                plain = seconds(save, repeats)
            save()
            checked, trusted = (seconds(partial(load, verify=verify), repeats) for verify in (True, False))
        per_gb = [value / size for value in (saved, max(0.0, saved - plain), checked, trusted, checked - trusted)]
        rows.append([form, *(f"{value:.2f}" for value in per_gb)])
    return rows


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the median time of an action."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--megabytes", type=int, default=1024, help="weights of the file that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    rows = [row(*result) for result in count(options.rounds)]
    timed = costs(options.megabytes, options.repeats)
    show("What was done to checkpoints", HEAD, rows)
    show("What verification costs", COSTS, timed)
    page = PAGE.format(
        table=markdown(HEAD, rows),
        costs=markdown(COSTS, timed),
        size=options.megabytes,
        repeats=options.repeats,
        provenance=provenance(threads=torch.get_num_threads()),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "reliability.md").write_text(page)
    if any(line[-1] != "0" for line in rows):
        sys.exit("Something was not as promised.")


if __name__ == "__main__":
    main()
