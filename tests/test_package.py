"""The package as a whole: its size, its form, what it must not contain, and that importing it is cheap."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanodiff"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = MODULES + sorted([*PACKAGE.rglob("*.cu"), *PACKAGE.rglob("*.cuh")])
BUDGET, COLUMNS = 12_300, 110

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def calls(path):
    """The name of every function a module calls, and "name(key=True)" of every keyword with a constant."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name
            yield from (
                f"{name}({k.arg}={k.value.value!r})" for k in node.keywords if hasattr(k.value, "value")
            )


def imports(path):
    """Every module that a file imports anywhere, by its first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_the_package_stays_within_its_budget():
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert sum(lines.values()) <= BUDGET, sorted(lines.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit_on_a_screen(path):
    lines = path.read_text().splitlines()
    assert not [i for i, line in enumerate(lines, 1) if len(line) > COLUMNS or line != line.rstrip()]


@each_module
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@each_module
def test_what_no_module_does(path):
    """Read or run anything that a file could smuggle in; print, but for the two that talk to the user."""
    found = set(calls(path))
    assert not found & {"eval", "exec", "compile", "__import__"}
    assert not [call for call in found if call.endswith(("(allow_pickle=True)", "(fastmath=True)"))]
    assert not set(imports(path)) & {
        "pickle",
        "cPickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "diffusers",
        "cffi",
    }
    assert "torch" not in imports(path) or path.name == "testing.py"  # there as an opponent, when asked for
    assert "print" not in found or path.name in ("__main__.py", "train.py")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("kernels/*_cpu.py")), ids=lambda path: path.name)
def test_no_cpu_kernel_calls_blas(path):
    """Its bits would change with the number of threads and with the batch."""
    tree = ast.parse(path.read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult)]
    assert not {c for c in calls(path) if re.fullmatch(r"np\.(dot|matmul|einsum|tensordot|inner)|.*\.dot", c)}


def test_importing_is_cheap():
    code = "import sys, nanodiff; print(*sorted({'numpy', 'numba', 'PIL', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_public_names():
    import nanodiff as nd

    promised = (
        "Adam Diffusion NanodiffError UNet UNetConfig ddim_sample ddpm_sample set_threads train_step".split()
    )
    assert set(promised) <= set(nd.__all__) <= set(dir(nd))
    assert all(callable(getattr(nd, name)) for name in nd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Unet'.*UNet"):
        nd.Unet  # noqa: B018


def test_the_readme_mentions_every_module():
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md")
    text = (ROOT / "README.md").read_text()
    families = {path.name.rsplit("_", 1)[0] for path in PACKAGE.glob("kernels/*_ref.py")}
    names = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"] + sorted(families)
    assert not [name for name in names if name not in text]


def test_ruff_format():
    command = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if command is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [command, "format", "--check", "nanodiff", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
