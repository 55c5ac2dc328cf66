"""That the jobs of a run mean the same by class 3 of a head.

Two data sets with as many classes in another order fit each other's tensors, and train each other
on nonsense without any error. So a job may state the names of the classes of a head; the first one
that does writes them down, in ``bridge/heads/heads.h2.classes``, signed as the other terms are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from toolkit.bridge.agreement import create_or_read, in_lines
from toolkit.bridge.errors import ClassMismatchError
from toolkit.bridge.signed_files import SignedFiles

_SUFFIX = ".classes"


def agree_on_classes(
    small: SignedFiles, job: str, class_names: Mapping[str, Sequence[str]]
) -> None:
    """State the names of classes, or fit what was stated before.

    Args:
        small: the run's files.
        job: the name of this job.
        class_names: by head, in the order of their numbers; of a head that is not there nothing is
            compared.

    Raises:
        ClassMismatchError: naming each class that differs; nothing is stated then.
    """
    files = {head: f"heads/{head}{_SUFFIX}" for head in class_names}
    known = [head for head, name in files.items() if (small.root / name).exists()]
    for head in (*known, *class_names):
        mine = list(class_names[head])
        found = create_or_read(small, files[head], {"founder": job, "names": mine})
        if (theirs := found.get("names")) != mine:
            founder = f"earlier {job}" if found.get("founder") == job else found.get("founder", "?")
            names = theirs if isinstance(theirs, list) else []
            _refuse(small.root.parent.name, head, (job, mine), (founder, names))


def stated_classes(small: SignedFiles) -> dict[str, list[str]]:
    """By head, the names that were stated; without those that cannot be read or believed."""
    stated = {}
    for path in sorted((small.root / "heads").glob(f"*{_SUFFIX}")):
        content = small.read(f"heads/{path.name}")
        names = None
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            names = json.loads(content or b"")["names"]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            stated[path.name.removesuffix(_SUFFIX)] = names
    return stated


def _refuse(
    run: str, head: str, mine: tuple[str, Sequence[str]], theirs: tuple[str, Sequence[str]]
) -> None:
    pairs = enumerate(zip_longest(mine[1], theirs[1]))
    lines = [
        f"class {number}: {mine[0]} {_shown(name)}, {theirs[0]} {_shown(other)}"
        for number, (name, other) in pairs
        if name != other
    ]
    raise ClassMismatchError(
        f"the classes of {head!r} are not those of run {run}, as the {theirs[0]} states them. Give "
        "both data sets the same classes in the same order (Dataset.align_labels_with_mapping), or "
        "begin another run (--run NAME, or another --runs_dir). These differ:" + in_lines(lines)
    )


def _shown(name: str | None) -> str:
    return "absent" if name is None else repr(name)
