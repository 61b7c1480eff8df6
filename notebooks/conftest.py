"""Under pytest the notebooks run in fast mode."""

from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set EDGELAB_FAST for the kernel of a notebook only: every other test runs in full."""
    with pytest.MonkeyPatch.context() as patch:
        if item.path.suffix == ".ipynb":
            patch.setenv("EDGELAB_FAST", "1")
        return (yield)
