"""For all folders of tests."""

from __future__ import annotations

import pytest

from kenotron.testing import close_pools


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Processes that one folder's tests share end with them: even idle ones take time from those of the next."""
    if nextitem is not None and nextitem.path.parent != item.path.parent:
        close_pools()
