"""One executor of each kind, for all tests that leave it whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest

from tests.executors.places import TESTS, Hands, Place, cluster, opened_place

KINDS = ("local", "dask-local:2", "dask")
needs_dask = pytest.mark.skipif(find_spec("distributed") is None, reason="dask.distributed is not installed")


@pytest.fixture(scope="package", autouse=True)
def _doubles_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        yield


@pytest.fixture(scope="package")
def hands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hands]:
    """A cluster of two workers that are processes of their own, with stores of their own. One has a label."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.work("a", "--label", "cuda-sm_90")
        made.work("b")
        yield made


@pytest.fixture(scope="package")
def places(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, _doubles_can_be_imported: None
) -> Iterator[Callable[[str], Place]]:
    """Executors by kind, each opened once, when the first test asks for it."""
    made: dict[str, Place] = {}
    with contextlib.ExitStack() as stack:

        def get(kind: str) -> Place:
            if kind not in made:
                folder = tmp_path_factory.mktemp("driver")
                if kind == "dask":
                    there: Hands = request.getfixturevalue("hands")
                    made[kind] = opened_place(there.address, folder, there.url)
                else:
                    made[kind] = opened_place(kind, folder)
                stack.callback(made[kind].executor.stop)
            return made[kind]

        yield get


@pytest.fixture(params=[pytest.param(kind, marks=needs_dask if "dask" in kind else ()) for kind in KINDS])
def place(request: pytest.FixtureRequest, places: Callable[[str], Place]) -> Place:
    """Every kind in turn."""
    return places(request.param)


@pytest.fixture(params=KINDS[1:])
def daskly(request: pytest.FixtureRequest, places: Callable[[str], Place]) -> Place:
    """Those that go through dask."""
    pytest.importorskip("distributed")
    return places(request.param)
