"""The rules that keep a folder of self-contained scripts one project; each failure says what to do."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted((ROOT / "algos").glob("*.py"))
PYTHON = [path for folder in ("algos", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
ALLOWED = {"numpy", "torch", "gymnasium", "ale_py", "mujoco", "tyro", "tensorboard", "tqdm", *sys.stdlib_module_names}
ALLOWED_IN = {"bc": {"stable_baselines3", "minari"}, "dagger": {"stable_baselines3"}}
COMMON_FLAGS = (
    "env_id seed total_timesteps num_envs device torch_threads compile output_dir resume checkpoint_every"
    " eval_episodes capture_video"
).split()

each_algo = pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)


def parse(path) -> ast.Module:
    return ast.parse(path.read_text())


def definitions(path) -> list:
    """Top-level functions and classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in parse(path).body if isinstance(node, kinds)]


def args_fields(path) -> dict[str, str | None]:
    """Args' fields, each with the docstring below it."""
    (args,) = (node for node in definitions(path) if node.name == "Args")
    texts = {}
    for node, below in zip(args.body, [*args.body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            texts[node.target.id] = below.value.value if documented else None
    return texts


def imports(path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it; a relative import counts as '.'."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_there_are_scripts():
    assert ALGOS


def test_algos_is_a_folder_of_scripts_not_a_package():
    assert sorted(path.name for path in (ROOT / "algos").iterdir() if path.name != "__pycache__") == [
        path.name for path in ALGOS if path.name != "__init__.py"
    ], "algos/ holds one script per algorithm and nothing else; no __init__.py, no folders"


@each_algo
def test_imports_only_what_a_lone_copy_finds(path):
    forbidden = imports(path) - ALLOWED - ALLOWED_IN.get(path.stem, set())
    assert not forbidden, f"{path.name} imports {forbidden}: copy what it needs, or stay within the allowed packages"


def test_a_name_means_one_thing():
    seen = {}
    for path in ALGOS:
        for node in definitions(path):
            first, source = seen.setdefault(node.name, (path, ast.unparse(node)))
            assert node.name in ("Args", "train") or ast.unparse(node) == source, (
                f"{node.name} differs between {first.name} and {path.name}: make them one, or give one another name"
            )


@each_algo
def test_everything_public_has_a_docstring(path):
    assert ast.get_docstring(parse(path)), f"{path.name} needs a docstring: the algorithm on one card"
    missing = [
        node.name
        for node in definitions(path)
        if not node.name.startswith("_") and node.name != "Args" and not ast.get_docstring(node)
    ]
    assert not missing, f"{path.name}: write docstrings for {missing}"


@each_algo
def test_every_flag_is_explained(path):
    missing = [name for name, text in args_fields(path).items() if not (text or "").strip()]
    assert not missing, f"{path.name}: write a docstring line under {missing}; --help shows it"


@each_algo
def test_has_the_common_flags(path):
    missing = set(COMMON_FLAGS) - args_fields(path).keys()
    assert not missing, f"{path.name}: Args needs {missing}, as in every other script"


@each_algo
def test_names_its_paper(path):
    card = ast.get_docstring(parse(path)) or ""
    assert re.search(r"arXiv\W*\d{4}\.\d{4,5}|[A-Z]\w+[^.\n]{0,60}\b(19|20)\d\d\b", card), (
        f"{path.name}: name the paper in the docstring, by arXiv id or by author and year"
    )


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_parses_on_python_3_10(path):
    ast.parse(path.read_text(), feature_version=(3, 10))


@each_algo
def test_readme_has_a_table_row(path):
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\|.*\b{path.stem}\.py\b", readme, re.M), f"README.md: add a table row for algos/{path.name}"


def test_readme_mentions_only_files_that_exist():
    readme = (ROOT / "README.md").read_text()
    paths = set(re.findall(r"(?<![\w/.])(?:algos|benchmarks|tests)/[\w./-]*\w", readme))
    names = set(re.findall(r"(?<![\w/.-])[\w-]+\.(?:py|toml|txt|md)\b", readme))
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in link} - {""}
    folders = [ROOT, ROOT / "algos", ROOT / "benchmarks", ROOT / "tests"]
    own = "my_", "mine/"  # a reader's
    missing = [x for x in paths | links if not (ROOT / x).exists() and not Path(x).name.startswith(own)]
    names = {name for name in names if not name.startswith(own)}
    missing += [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert not missing, f"README.md mentions {sorted(missing)}, which do not exist"


def test_requirements_are_pinned():
    lines = [line.split(" #")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    requirements = [line for line in lines if line and not line.startswith("#")]
    loose = [line for line in requirements if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+]+(\s*;.+)?", line)]
    assert not loose, f"requirements.txt: pin {loose} with =="
    assert "torch==2.13.0" in requirements, "requirements.txt: pin torch==2.13.0, which the results were measured with"
