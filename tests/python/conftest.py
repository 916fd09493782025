"""Fixtures of several test files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bases import BaseSpec, make_base
from golden import Golden


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    folder = tmp_path_factory.mktemp("golden")
    yield Golden(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for files that are too large to be kept until the next but two sessions, as pytest does."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[BaseSpec], Path]]:
    """Bases by what they look like, each made once."""
    folder = tmp_path_factory.mktemp("bases")
    made: dict[BaseSpec, Path] = {}

    def get(spec: BaseSpec) -> Path:
        if spec not in made:
            made[spec] = make_base(folder / f"base-{len(made)}.safetensors", spec)
        return made[spec]

    yield get
    shutil.rmtree(folder, ignore_errors=True)
