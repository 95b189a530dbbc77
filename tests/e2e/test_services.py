"""`realm up`: two web interfaces and a daemon on loopback, until Ctrl-C."""

import json
import socket
from contextlib import closing
from typing import Any

import psutil
import pytest

from orchestration import services
from tests.e2e.homes import Home, answers

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]


def listening(home: Home) -> set[tuple[str, int]]:
    """Addresses on which any process of the home accepts connections."""
    found = set()
    for process, _ in home.living():
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def test_it_serves_dagster_and_mlflow_on_loopback_until_ctrl_c(
    finished: tuple[Home, dict[str, Any]], free_ports: tuple[int, int]
) -> None:
    home, report = finished
    port, mlflow_port = free_ports
    up = home.start("up", "--port", str(port), "--mlflow-port", str(mlflow_port))
    query = """{
        assetNodes { assetKey { path } }
        sensorsOrError(repositorySelector:
            {repositoryName: "__repository__", repositoryLocationName: "orchestration.definitions"}) {
            ... on Sensors { results { name sensorState { status } } }
        }
    }"""
    found = home.wait_for(answers(f"http://127.0.0.1:{port}/graphql", {"query": query}), "Dagster does not answer", up)
    data = json.loads(found)["data"]
    assert {"mips_index", "realm_checkpoint", "corpus_shards"} <= {
        node["assetKey"]["path"][0] for node in data["assetNodes"]
    }
    assert {sensor["name"]: sensor["sensorState"]["status"] for sensor in data["sensorsOrError"]["results"]} == {
        "checkpoint_sensor": "RUNNING",
        "dead_run_sensor": "RUNNING",
        "growth_sensor": "RUNNING",
        "inbox_sensor": "RUNNING",
        "pointer_sensor": "RUNNING",
        "refresh_failure_sensor": "RUNNING",
        "retrain_sensor": "RUNNING",
        "segment_sensor": "RUNNING",
        "spool_sensor": "RUNNING",
        "trainer_health_sensor": "RUNNING",
        "training_failure_sensor": "RUNNING",
    }
    page = home.wait_for(answers(f"http://127.0.0.1:{mlflow_port}/"), "MLflow does not answer", up)
    assert "MLflow" in page
    run = answers(f"http://127.0.0.1:{mlflow_port}/api/2.0/mlflow/runs/get?run_id={report['mlflow']['run_id']}")()
    assert run is not None
    assert json.loads(run)["run"]["info"]["run_name"] == "r1"

    assert {address for address, _ in listening(home)} <= {"127.0.0.1", "::1"}
    assert {port, mlflow_port} <= {number for _, number in listening(home)}
    assert services.daemon_process(home.path) is not None

    # A second one shares the daemon, and says which port is taken.
    second = home.start("up", "--port", str(port), "--mlflow-port", str(mlflow_port))
    assert second.wait(timeout=120) == 2
    assert home.last_error() == f"error: port {port} for Dagster is in use; pass another one or stop what listens there"

    assert home.interrupt(up) == 130
    assert home.processes() == []


def test_a_port_in_use_is_one_line_and_nothing_is_started(
    finished: tuple[Home, dict[str, Any]], free_ports: tuple[int, int]
) -> None:
    home, _ = finished
    with closing(socket.create_server(("127.0.0.1", free_ports[1]))):
        home.run("up", "--port", str(free_ports[0]), "--mlflow-port", str(free_ports[1]), code=2)
    assert home.last_error().startswith(f"error: port {free_ports[1]} for MLflow is in use")
    assert home.processes() == []


def test_one_port_for_two_pages_is_refused(finished: tuple[Home, dict[str, Any]], free_ports: tuple[int, int]) -> None:
    home, _ = finished
    home.run("up", "--port", str(free_ports[0]), "--mlflow-port", str(free_ports[0]), code=2)
    assert "wanted for both Dagster and MLflow; pass another --mlflow-port" in home.last_error()


def test_a_home_that_is_none_is_refused(home: Home) -> None:
    home.run("up", code=2)
    assert "not a realm home" in home.last_error()
    assert not home.path.exists()


def test_a_daemon_that_dies_is_replaced_and_a_page_that_dies_ends_all(
    finished: tuple[Home, dict[str, Any]], free_ports: tuple[int, int]
) -> None:
    home, _ = finished
    up = home.start("up", "--port", str(free_ports[0]), "--mlflow-port", str(free_ports[1]))
    daemon = home.wait_for(lambda: services.daemon_process(home.path), "no daemon", up)
    psutil.Process(daemon).kill()
    home.wait_for(lambda: services.daemon_process(home.path) not in (None, daemon), "no new daemon", up)
    page = home.wait_for(
        lambda: [process for process, line in home.living() if "dagster_webserver" in line], "no page", up
    )
    page[0].kill()
    assert up.wait(timeout=120) == 2
    assert "daemon ended with code -9; see " in home.errors.read_text()
    assert home.last_error().startswith("error: webserver ended with code -9; see ")
    assert home.processes() == []
