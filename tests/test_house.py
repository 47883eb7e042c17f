"""The house rules: floors, import names, what is installed. No behaviour of the server is tested here."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "scheduler", "server")  # lowest first
HEAVY = {"kernels": {"fastapi", "uvicorn"}, "scheduler": {"fastapi", "uvicorn"}, "server": {"torch"}}


def imported_modules(path: Path) -> set[str]:
    """Every absolute module name that a file imports, lazily or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor: str) -> None:
    """Guards the three floors: a lower one must not know a higher one, and each has libraries it must not touch."""
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for path in (ROOT / floor).rglob("*.py"):
        for name in imported_modules(path):
            assert not any(name.startswith(f"ropeway.{other}") for other in above), f"{path} imports {name}"
            assert name.split(".")[0] not in HEAVY[floor], f"{path} imports {name}"


def test_floors_have_no_init() -> None:
    """Guards the import name `kernels`: a top-level package of that name would be taken for another project's."""
    for floor in FLOORS:
        assert not (ROOT / floor / "__init__.py").exists()
        assert (ROOT / "src" / "ropeway" / floor).is_symlink()


@pytest.mark.parametrize("module", ["ropeway.server.app", "ropeway.server.worker", "ropeway.server.cli"])
def test_api_code_never_loads_torch(module: str) -> None:
    """Guards start-up time and memory of API workers: torch is the engine's alone."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def test_kernels_import_without_cuda_or_triton() -> None:
    """Guards machines without a GPU: every module of the tensor floor must import, but for device code in Gluon, which
    is Triton's own and which `hopper_attention.py` imports where it can."""
    device_code = {"hopper_attention_kernels", "hopper_attention_walk"}
    stems = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    assert device_code < stems
    modules = [f"ropeway.kernels.{stem}" for stem in sorted(stems - device_code)]
    code = "import importlib, sys; sys.modules['triton'] = None\nfor m in sys.argv[1:]: importlib.import_module(m)"
    assert subprocess.run([sys.executable, "-c", code, *modules], check=False).returncode == 0


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names inside a wheel built from the files git knows (and those it would add)."""
    tree = tmp_path_factory.mktemp("tree")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, files):
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(build, cwd=tree, check=True, capture_output=True)
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_only_ropeway_is_installed(wheel_names: list[str]) -> None:
    """Guards against a top-level `kernels` or `server` in somebody's site-packages."""
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ropeway"}


def test_wheel_holds_everything(wheel_names: list[str]) -> None:
    """Guards package data: a wheel without the model or a module works in the checkout and nowhere else."""
    expected = {"ropeway/py.typed"}
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add("ropeway/" + path.relative_to(ROOT).as_posix())
    assert "ropeway/server/demo_model/model.safetensors" in expected
    assert expected <= set(wheel_names), sorted(expected - set(wheel_names))
