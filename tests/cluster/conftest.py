"""The Ray cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.ray_cluster import Cluster, ray_cluster


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster: node 0 without a GPU, nodes 1 and 2 with one, behind a head that runs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # by its 15 they would starve beside the tests of another process
        with ray_cluster((2, 0), (2, 1), (2, 1), dashboard=True) as running:
            yield running
