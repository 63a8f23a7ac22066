"""The files in deploy/ are what they say, and start the server with options that it has."""

import re
from pathlib import Path

import yaml
from typer.testing import CliRunner

from tinier.cli.main import app

DEPLOY = Path(__file__).parent.parent / "deploy"


def options_of(verb: str) -> str:
    return CliRunner().invoke(app, [verb, "--help"]).output


def test_compose_and_kubernetes_use_options_and_paths_of_the_server() -> None:
    known = options_of("serve")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    service = compose["services"]["tinier"]
    deployment, exposed = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    used = [*service["command"], *container["args"]]
    dockerfile = (DEPLOY / "Dockerfile").read_text("utf-8")
    used += re.findall(r'"(--[a-z-]+)"', dockerfile)
    for option in (word for word in used if word.startswith("--")):
        assert option in known
    paths = {
        container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"/health/ready", "/health/live"}
    assert exposed["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    # whoever stops it waits longer than it needs
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 60
    assert int(service["stop_grace_period"].removesuffix("s")) > 60
