"""Names of sources, and losses by source."""

from __future__ import annotations

import pytest

from internlm_trainer.telemetry.tally import source_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["s3://corpus/en", "s3://corpus/code/"], ["en", "code"]),
        (["/data/a/train", "/data/b/train"], ["a/train", "b/train"]),
        (["/one.bin"], ["one.bin"]),
        (["/data/en", "/data/en"], ["/data/en#0", "/data/en#1"]),
        ([], []),
    ],
)
def test_a_source_is_called_by_the_end_of_its_path_that_tells_it_from_the_others(
    paths: list[str], names: list[str]
) -> None:
    assert source_names(paths) == names
