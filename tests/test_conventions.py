"""The rules that keep a folder of self-contained scripts one project; each failure says what to do."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import budgets
import pytest
import spread

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted((ROOT / "algos").glob("*.py"))
PYTHON = [path for folder in ("algos", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
ALLOWED = {"numpy", "torch", "gymnasium", "ale_py", "mujoco", "tyro", "tensorboard", "tqdm", *sys.stdlib_module_names}
ALLOWED_IN = {"bc": {"stable_baselines3", "minari"}, "fqi": {"minari"}, "dagger": {"stable_baselines3"}}
COMMON_FLAGS = (
    "env_id seed total_timesteps num_envs device torch_threads compile output_dir resume checkpoint_every"
    " eval_episodes capture_video"
).split()
COMMON_FLAGS_OF_TABLES = "env_id seed eval_episodes output_dir capture_video".split()

PLUMBING = "fail finite parse_args load_checkpoint make_env Envs Run evaluate export_policy".split()
PLUMBING += "check open_run make_table_env TablePolicy finish play_planner read_args".split()

each_algo = pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)


def parse(path) -> ast.Module:
    return ast.parse(path.read_text())


def definitions(path) -> list:
    """Top-level functions and classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in parse(path).body if isinstance(node, kinds)]


def args_fields(path) -> dict[str, str | None]:
    """Args' fields, each with the comment that ends its line; None where it has none, or more lines than one."""
    (args,) = (node for node in definitions(path) if node.name == "Args")
    lines, texts = path.read_text().splitlines(), {}
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            comment = re.fullmatch(r"\s*# (.+)", lines[node.lineno - 1].encode()[node.end_col_offset :].decode())
            texts[node.target.id] = comment[1] if comment and node.lineno == node.end_lineno else None
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
    several = {name: texts for name, texts in spread.sources(ROOT / "algos").items() if len(texts) > 1}
    assert not several, "\n".join(
        f"{name} differs: {' | '.join(' '.join(files) for files in texts.values())}. Make them one with"
        f" python tests/spread.py {name} algos/FILE.py, or give one another name"
        for name, texts in several.items()
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
    """tyro shows that comment; of a field without one it shows the comment above its section."""
    missing = [name for name, text in args_fields(path).items() if text is None]
    assert not missing, f"{path.name}: end the lines of {missing} in a comment, each on one line; --help shows it"


@each_algo
def test_has_the_common_flags(path):
    resumes = any(node.name == "Run" for node in definitions(path))
    missing = set(COMMON_FLAGS if resumes else COMMON_FLAGS_OF_TABLES) - args_fields(path).keys()
    assert not missing, f"{path.name}: Args needs {missing}, as in every other script"


@each_algo
def test_reads_from_the_algorithm_to_the_plumbing(path):
    """Args, networks where it has some, the maths under whatever titles, training or a solution, plumbing."""
    lines = path.read_text().splitlines()
    titles = {i: match[1] for i, line in enumerate(lines, 1) if (match := budgets.SECTION.match(line))}
    names = list(titles.values())
    plumbing = names.index("Plumbing: the same in every file")
    at = {node.name: node.lineno for node in definitions(path)}
    last, function = next(x for x in (("Training", "train"), ("Solution", "solve"), ("Playing", "play")) if x[1] in at)
    assert names[plumbing - 1] == last and plumbing > 0, f"{path.name}: {names}"
    assert "etwork" in names[0] and plumbing > 2 or "Run" not in at, f"{path.name}: {names}"
    helpers = [name for name in names[plumbing + 1 :] if not name.startswith(("Data parallel", "CUDA"))]
    assert not helpers, f"{path.name}: {helpers} belong above {last}"
    top, start, end = (list(titles)[i] for i in (0, plumbing - 1, plumbing))
    assert at["Args"] < top, f"{path.name}: Args stand above the first section"
    assert start < at[function] < end, f"{path.name}: {function}() is the section {last}'s"
    misplaced = [name for name, line in at.items() if name in PLUMBING and line < end]
    assert not misplaced, f"{path.name}: {misplaced} belong into Plumbing"
    arguments = "parse_args" if "Run" in at else "read_args"
    assert lines[-2:] == ['if __name__ == "__main__":', f"    {function}({arguments}())"]


@each_algo
def test_is_no_longer_than_its_budget_or_than_it_was(path):
    exceeded = budgets.longer_than_known(path)
    assert not exceeded, f"{'; '.join(exceeded)} lines: leave out what the reader of this algorithm would not miss"
    assert budgets.size(path).docstring <= budgets.DOCSTRING, (
        f"{path.name}: the docstring has {budgets.DOCSTRING} lines"
    )


def test_budgets_write_lets_files_have_their_present_lines_and_no_more():
    for folder in ("algos", "tests"):
        Path(folder).mkdir()
    shutil.copy(budgets.__file__, "tests")
    short, long = Path("algos/short.py"), Path("algos/ppo.py")
    short.write_text('"""Short."""\n')
    text = '"""Long."""\n' + "x = 1\n" * budgets.REST_OF["ppo"] + "# Plumbing ---\n" + "y = 2\n"
    for rest in (text, text + "y = 3\n", '"""Short now."""\n'):
        long.write_text(rest)
        subprocess.run([sys.executable, "tests/budgets.py", "--write"], check=True)
        scope = {"__file__": "tests/budgets.py", "__name__": "budgets"}
        exec(compile(Path("tests/budgets.py").read_text(), "budgets", "exec"), scope)
        lines = rest.count("y ="), rest.count("x =")
        assert scope["KNOWN"] == ({"ppo": (lines[0] + 1, lines[1] + 1)} if lines[1] else {})
        assert scope["longer_than_known"](long) == scope["longer_than_known"](short) == []
        if lines[1]:
            long.write_text(rest.replace("x = 1\n", "x = 1\n\n", 1))
            assert scope["longer_than_known"](long) == [f"ppo.py: rest {lines[1] + 2}, at most {lines[1] + 1}"]


def test_known_lengths_are_of_files_that_exist():
    assert budgets.KNOWN.keys() <= {path.stem for path in ALGOS}, "python tests/budgets.py --write"


@each_algo
def test_names_its_paper(path):
    card = ast.get_docstring(parse(path)) or ""
    assert re.search(r"arXiv\W*\d{4}\.\d{4,5}|[A-Z]\w+[^.\n]{0,60}\b(19|20)\d\d\b", card), (
        f"{path.name}: name the paper in the docstring, by arXiv id or by author and year"
    )


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_parses_on_python_3_11(path):
    ast.parse(path.read_text(), feature_version=(3, 11))


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
