"""What every test may use: the test cluster's fixtures, started only where a test asks for them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["cluster.fixtures"]

# A busy machine is no mistake of the code's.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


class SharedFixtures(LoadScopeScheduling):
    """Keeps on one worker whatever shares something expensive: a cluster, or what a module's fixture trained."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::")[0] if nodeid.startswith("tests/trainer/") else "cluster"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes half an hour, unless it is asked for."""
    if "faults" not in config.option.markexpr:
        asked = [item for item in items if not item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=[item for item in items if item not in asked])
        items[:] = asked


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> SharedFixtures:
    config.option.loadscopereorder = False  # the cluster first, which takes longest
    return SharedFixtures(config, log)
