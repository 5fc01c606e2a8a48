"""`gigavim doctor`, as a user sees it."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from gigavim.cli.main import cli


@pytest.fixture
def doctor():
    def run(*arguments):
        return CliRunner().invoke(cli, ["doctor", *arguments], standalone_mode=False)

    return run


def test_it_names_what_runs_and_checks_it(doctor):
    result = doctor("--device", "cpu")
    assert result.return_value == 0
    assert "torch" in result.output
    assert "block, torch, fp32" in result.output
    assert "WRONG" not in result.output


def test_json_has_all_of_it(doctor):
    facts = json.loads(doctor("--device", "cpu", "--json").output)
    assert facts["device"] == "cpu"
    assert facts["versions"]["openslide"]
    assert "runs" in " ".join(facts["backends"].values())
    assert all(check["ok"] and check["error"] < 2.5e-2 for check in facts["checks"])


def test_a_wrong_backend_is_told_and_fails(doctor, monkeypatch):
    from gigavim_kernels import selftest

    check = selftest.check_block
    monkeypatch.setattr(
        selftest, "check_block", lambda *a: dataclasses.replace(check(*a), error=0.3)
    )
    result = doctor("--device", "cpu")
    assert result.return_value == 1
    assert "WRONG" in result.output
    assert "cannot be trusted" in result.output


def test_the_long_check_needs_a_gpu(doctor):
    result = doctor("--device", "cpu", "--full")
    assert "GPU" in str(result.exception)
