"""Copies top-level definitions of one file of algos/ into every other file there that has them, byte for byte.

python tests/spread.py Run fail algos/ppo.py   # these
python tests/spread.py --all algos/ppo.py      # all that others have too, but what is each file's own
python tests/spread.py --check                 # names with more than one source; exit code 1 if there are any
"""

import ast
import sys
from pathlib import Path

OWN = {"Args", "RECOMMENDED", "train", "solve", "play"}


def definitions(path: Path) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """By name of a function, class or constant: the file's lines before its definition, those of it, those after.

    Comments right above belong to it, and so does the string below a constant.
    """
    text, found = path.read_bytes().decode(), {}
    lines, body = text.split("\n"), ast.parse(text, str(path)).body
    for node, below in zip(body, [*body[1:], None]):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = getattr(target, "id", getattr(node, "name", None))
        if name is None:  # an import, for instance
            continue
        start = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])]) - 1
        while start and lines[start - 1].startswith("#") and not lines[start - 1].endswith("---"):  # a section's line
            start -= 1
        described = target and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        end = (below if described else node).end_lineno
        found[name] = lines[:start], lines[start:end], lines[end:]
    return found


def sources(folder: Path) -> dict[str, dict[str, list[str]]]:
    """By name, then by its definition's text, the files that have it; without OWN and what RECOMMENDED is made of."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for name, (_, source, _) in definitions(path).items():
            found.setdefault(name, {}).setdefault("\n".join(source), []).append(path.name)
    nodes = [node for text in found.get("RECOMMENDED", ()) for node in ast.walk(ast.parse(text))]
    own = OWN | {node.id for node in nodes if isinstance(node, ast.Name)}
    return {name: texts for name, texts in found.items() if name not in own}


def spread(name: str, path: Path) -> None:
    """Writes the definition into the files beside `path` that have one of that name; prints those that it changes."""
    source = definitions(path)[name][1]
    for other in sorted(path.parent.glob("*.py")):
        before, old, after = definitions(other).get(name, ([], source, []))
        if old != source:
            other.write_bytes("\n".join(before + source + after).encode())
            print(f"{name}: {other.name}")


if __name__ == "__main__":
    *names, path = sys.argv[1:] or sys.exit(__doc__)
    if path == "--check":
        texts = sources(Path(__file__).resolve().parent.parent / "algos")
        several = [f"{name}: {' | '.join(map(' '.join, x.values()))}" for name, x in texts.items() if len(x) > 1]
        print("\n".join(several))
        sys.exit(len(several) > 0)
    defined, common = definitions(Path(path)), sources(Path(path).parent)
    names = [name for name in defined if name in common] if names == ["--all"] else names
    if missing := [name for name in names if name not in defined]:
        sys.exit(f"{path} does not define {', '.join(missing)}")
    for name in names:
        spread(name, Path(path))
