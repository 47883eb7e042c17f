"""install_tools.sh with stand-ins for apt-get and systemctl: it installs programs and starts nothing."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("install_tools.sh")


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("there", [(), ("nginx",), ("nginx", "promtool")])
def test_installs_without_starting(tmp_path: Path, there: tuple[str, ...]) -> None:
    """Guards machines with an init system: while packages are installed the policy says no, afterwards it is as it was,
    and what was there already is left alone."""
    script = tmp_path / SCRIPT.name
    script.write_text(SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/usr/local/sbin\n", ""))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("rm", "chmod", "sed", "sh", "cat", "printf"):
        (tools / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    log, policy = tmp_path / "log", tmp_path / "policy-rc.d"
    program(tools, "id", "echo 0")
    program(tools, "apt-get", f'"{policy}" && echo started; echo "policy $?, apt-get $@" >> "{log}"')
    program(tools, "systemctl", f'echo "systemctl $@" >> "{log}"')
    for name in there:
        program(tools, name, "exit 1")
    environ = os.environ | {"PATH": str(tools), "POLICY": str(policy)}
    done = subprocess.run(["/bin/sh", str(script)], env=environ, capture_output=True, text=True, check=True)
    assert not policy.exists() and "started" not in done.stdout.replace("not started", "")
    lines = log.read_text().splitlines() if log.exists() else []
    if len(there) == 2:
        assert lines == [] and done.stdout == ""
        return
    packages = "prometheus" if there else "nginx-light prometheus"
    assert lines == [
        "policy 101, apt-get update -q",
        f"policy 101, apt-get install -q -y --no-install-recommends {packages}",
        f"systemctl disable --quiet {packages.replace('nginx-light', 'nginx')}",
    ]
    assert done.stdout == f"Installed, not started and not enabled: {packages}\n"
