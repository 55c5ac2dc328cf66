"""Values that flags take, and the messages for those that they do not."""

from __future__ import annotations

import argparse

import pytest

from toolkit.flag_types import shard


def test_shard() -> None:
    assert shard("0/1") == (0, 1)
    assert shard("11/12") == (11, 12)


@pytest.mark.parametrize("text", ["2/2", "0/0", "-1/2", "1", "1/", "/2", "1/2/3", "a/b", "½/2", ""])
def test_that_no_shard_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected INDEX/COUNT .* 0/2 and 1/2"):
        shard(text)
