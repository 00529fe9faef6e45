"""The files of docker/: linted, and every command in them is one that MoonLang understands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moonlang.config.server_args import parse
from moonlang.router import args as router_args

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
MANIFESTS = sorted(file for file in (DOCKER / "kubernetes").glob("*.yaml") if file.stem != "kustomization")
PARSERS = {"serve": parse, "router": router_args.parse}


def tool(name: str) -> str:
    """A linter of the dev extra, beside the interpreter or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed (it has no build for this machine)")


def run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def containers(file: Path) -> Iterator[dict[str, Any]]:
    """Of the pods that a manifest describes."""
    for document in documents(file):
        yield from document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])


def test_dockerfiles() -> None:
    run(tool("hadolint"), *sorted(DOCKER.glob("Dockerfile*")))


def test_compose_files() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *COMPOSE)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests(file: Path) -> None:
    run(tool("kubernetes-validate"), "--strict", file)


def commands() -> Iterator[list[str]]:
    """Every command line of the product that the images are told to run."""
    for service in documents(DOCKER / "compose.yaml")[0]["services"].values():
        yield service["command"]
    for file in MANIFESTS:
        for container in containers(file):
            yield container["args"]


def test_commands_are_understood() -> None:
    seen = set()
    for name, *flags in commands():
        if name in PARSERS:
            PARSERS[name]([flag.replace("$(POD_IP)", "10.0.0.1") for flag in flags])
            seen.add(name)
    assert seen == set(PARSERS)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_every_container_has_probes_and_limits(file: Path) -> None:
    for container in containers(file):
        assert {"readinessProbe", "livenessProbe", "resources"} <= container.keys(), container["name"]
        assert ":latest" not in container["image"]


def test_everything_that_is_applied_is_there() -> None:
    (kustomization,) = documents(DOCKER / "kubernetes" / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == [file.name for file in MANIFESTS]
