"""What the operator's process tells of its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from internlm_operator.serve import _but_for_generators


def test_generators_that_the_loop_closes_badly_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    left = []

    async def watch() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise RuntimeError("the generator found another one closed")

    def fail() -> None:
        raise RuntimeError("nobody awaits this")

    async def stop() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_but_for_generators)
        left.append(watch())
        await anext(left[0])
        loop.call_soon(fail)
        await asyncio.sleep(0.01)

    asyncio.run(stop())
    assert "nobody awaits this" in caplog.text
    assert "another one closed" not in caplog.text
