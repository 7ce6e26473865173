"""How long the files of algos/ are, and what one has to read to follow one gradient step; exit code 1 above a budget.

    python tests/budgets.py          # every file
    python tests/budgets.py ppo sac  # these
    python tests/budgets.py --write  # writes today's lines of files above their budget into KNOWN

A file's lines are its docstring's, its plumbing's, from the line "# Plumbing" on, and the rest's, docstring included;
the section "# Data parallel" counts with the rest and "# CUDA" with neither. A gradient step is followed in a short
training of ppo, sac and dqn: the file's functions that run from one step of an optimiser to the next, where no
environment is stepped in between. Their lines are those with code, without docstrings.
"""

import ast
import contextlib
import importlib
import io
import math
import re
import sys
import tempfile
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

import torch

ALGOS = Path(__file__).resolve().parent.parent / "algos"
SECTION = re.compile(r"# (\w[^\n]*?) -{3,}$")
"""The line that begins a section."""
DOCSTRING, PLUMBING, REST = 30, 230, 360
WHOLE = {name: 320 for name in ("fqi", "policy_iteration", "q_learning", "rmax", "td_lambda")}
WHOLE |= {"ilqr": 420, "mpc": 420, "mcts": 300}
"""Files that work on tables or plan: docstring to the last line, beside plumbing and the rest."""
REST_OF = {"ppo": 380, "ppo_atari": 380, "trpo": 450, "kfac": 450, "bc": 450, "mbpo": 700}
KNOWN = {
    "a2c": (295, 357),
    "bc": (295, 450),
    "dagger": (295, 315),
    "ddpg": (343, 338),
    "dqn": (345, 360),
    "dqn_atari": (295, 357),
    "grpo": (295, 359),
    "ilqr": (99, 379),
    "kfac": (295, 443),
    "mbpo": (343, 644),
    "mpc": (99, 347),
    "ppo": (343, 439),
    "ppo_atari": (293, 379),
    "reinforce": (295, 358),
    "sac": (343, 368),
    "td3": (343, 358),
    "trpo": (345, 432),
}
"""Files that are longer, by name: lines of plumbing and of the rest that tests/test_conventions.py lets them have."""
FUNCTIONS, LINES, DEPTH = 10, 170, 3
TINY = "--total-timesteps 400 --num-envs 2 --eval-episodes 1 --output-dir {} "
OFF_POLICY = TINY + "--learning-starts 100 --train-frequency 4 --gradient-steps 4"
FLAGS = {
    "ppo": TINY + "--num-steps 64 --num-minibatches 2 --update-epochs 2",
    "sac": OFF_POLICY + " --env-id Pendulum-v1",
    "dqn": OFF_POLICY,
}
"""What is trained to follow a gradient step; several of them without an environment's step in between."""


@dataclass
class Size:
    """Of a file, in lines."""

    docstring: int
    plumbing: int
    rest: int


def size(path: Path) -> Size:
    """Blank lines and comments count."""
    text = path.read_text(encoding="utf-8")
    lines = {"plumbing": 0, "CUDA": 0, "rest": 0}
    part = "rest"
    for line in text.splitlines():
        if line.startswith("# Plumbing"):
            part = "plumbing"
        elif line.startswith("# Data parallel"):
            part = "rest"
        elif line.startswith("# CUDA"):
            part = "CUDA"
        elif SECTION.match(line) and part == "CUDA":
            part = "rest"
        lines[part] += 1
    first = ast.parse(text).body[0]
    return Size(first.end_lineno - first.lineno + 1, lines["plumbing"], lines["rest"])


@dataclass
class GradientStep:
    """What one reads to follow a gradient step from one end to the other."""

    functions: list[str]
    """of the file, that run in it, beside train"""
    networks: list[str]
    """of the file's classes, those whose modules are called in it"""
    lines: int
    """of code, of the functions and of the networks' __init__"""
    depth: int
    """calls between train and the deepest function"""
    lines_in_train: int
    """of code, of train's innermost loop around it, which `lines` leaves out"""


@dataclass
class Text:
    """A file's functions, and which of its lines are code."""

    functions: dict[tuple[str, int], str] = field(default_factory=dict)
    """Qualified name by a code object's name and first line; lambdas and comprehensions are none"""
    spans: dict[str, ast.AST] = field(default_factory=dict)
    """Syntax by qualified name; classes, too"""
    code: set[int] = field(default_factory=set)
    """Lines with code on them, from 1"""

    @classmethod
    def of(cls, path: Path) -> "Text":
        text = cls()
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        text.add(tree, "")
        blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in (*blank, tokenize.ENDMARKER):
                text.code |= set(range(token.start[0], token.end[0] + 1))
        for node in [tree, *text.spans.values()]:
            if ast.get_docstring(node) is not None:
                text.code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return text

    def add(self, node: ast.AST, prefix: str) -> None:
        """The functions and classes below this node."""
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self.add(child, prefix)
                continue
            name = prefix + child.name
            self.spans[name] = child
            if not isinstance(child, ast.ClassDef):
                first = min(x.lineno for x in [child, *child.decorator_list])  # where its code object begins
                self.functions[child.name, first] = name
            self.add(child, f"{name}.")

    def lines_of(self, node: ast.AST) -> set[int]:
        """Those of this node that are code."""
        first = min(x.lineno for x in [node, *getattr(node, "decorator_list", [])])
        return self.code & set(range(first, node.end_lineno + 1))


DRAWS = {"shuffled_minibatches", "ReplayBuffer.draw_rows", "ReplayBuffer.get", "n_step_transitions"}
"""Functions that a minibatch comes from."""


class Tracer:
    """sys.setprofile's function: collects what runs between a minibatch and the optimiser's step on it."""

    def __init__(self, path: Path, text: Text):
        self.file, self.text = str(path), text
        self.stack, self.train = [], None
        self.functions, self.networks, self.train_lines, self.depth = set(), set(), set(), 0
        self.windows, self.window = 0, None  # the window's functions, networks, lines of train, depth; None: outside

    def name_of(self, frame) -> str | None:
        """Of a function of the file, its qualified name."""
        code = frame.f_code
        return self.text.functions.get((code.co_name, code.co_firstlineno)) if code.co_filename == self.file else None

    def __call__(self, frame, event: str, arg) -> None:
        if event == "call":
            self.called(frame, self.name_of(frame))
        elif event == "return":
            self.returned(frame, self.name_of(frame))
        elif self.window is not None and event == "c_call":
            self.window[2].add(self.train.f_lineno)

    def called(self, frame, name: str | None) -> None:
        if name == "train" and self.train is None:
            self.train, self.stack = frame, []
            return
        if self.train is None:
            return
        if name is not None:
            self.stack.append((frame, name))
            if name.startswith("Envs.") or name == "step_envs":
                self.window = None
            elif name in DRAWS and self.window is not None:
                self.window = [set(), set(), set(), 0]  # the minibatch is on its way: what follows is the step
                return
        if self.window is None:
            return
        self.window[2].add(self.train.f_lineno)
        if name is not None:
            self.running()
        if name is not None or frame.f_code.co_name == "_call_impl":  # torch's, of every module called
            me = frame.f_locals.get("self")
            if isinstance(me, torch.nn.Module):
                self.window[1].update(x.__qualname__ for x in type(me).__mro__)

    def running(self) -> None:
        """Notes the file's functions that are being run."""
        self.window[0].update(name for _, name in self.stack)
        self.window[3] = max(self.window[3], len(self.stack))

    def returned(self, frame, name: str | None) -> None:
        if self.train is None:
            return
        if frame is self.train:
            self.train = self.window = None
            return
        if self.stack and self.stack[-1][0] is frame:
            self.stack.pop()
        if is_step(frame, name):
            if self.window is not None:
                functions, networks, lines, depth = self.window
                if len(functions) > len(self.functions):  # the longest of an actor's and a critic's, say
                    self.functions, self.networks, self.train_lines = functions, networks, lines
                self.depth = max(self.depth, depth)
                self.windows += 1
            self.window = [set(), set(), set(), 0]
            self.running()


def is_step(frame, name: str | None) -> bool:
    """Whether this function is what changes the weights: a method `step` of an optimiser, PyTorch's or the file's."""
    if name is not None:
        return name == "adam_step" or (name.endswith(".step") and not name.startswith("Envs."))
    return frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer)


def traced(path: Path) -> tuple[Text, Tracer]:
    """A file of FLAGS, and what a short training of it in a temporary folder ran."""
    sys.path.insert(0, str(path.parent))
    try:
        script = importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))
    text = Text.of(Path(script.__file__))
    tracer, before, printed = Tracer(Path(script.__file__), text), sys.getprofile(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            args = script.parse_args(FLAGS[path.stem].format(folder).split())
            sys.setprofile(tracer)
            script.train(args)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{path.name}: its training fails ({error!r}) {printed.getvalue()}") from error
        finally:
            sys.setprofile(before)
    if not tracer.windows:
        raise RuntimeError(f"{path.name}: no step of an optimiser follows another without an environment's in between")
    return text, tracer


def gradient_step(path: Path) -> GradientStep:
    """Of a file of FLAGS."""
    text, tracer = traced(path)
    networks = [name for name in text.spans if name in tracer.networks]
    read = [*tracer.functions, *(f"{name}.__init__" for name in networks)]
    lines = set().union(*(text.lines_of(text.spans[name]) for name in read if name in text.spans))
    loops = [node for node in ast.walk(text.spans["train"]) if isinstance(node, ast.For | ast.While)]
    around = [node for node in loops if all(node.lineno <= x <= node.end_lineno for x in tracer.train_lines)]
    in_train = min((len(text.lines_of(node)) for node in around), default=0)
    return GradientStep(sorted(tracer.functions), networks, len(lines), tracer.depth, in_train)


def measured(path: Path) -> list[tuple[str, int, int | None]]:
    """What the table has of a file: (what, how much, at most), None where there is no budget.

    RuntimeError where there is no gradient step to follow.
    """
    lines = size(path)
    values = [("docstring", lines.docstring, DOCSTRING), ("plumbing", lines.plumbing, PLUMBING)]
    values.append(("rest", lines.rest, REST_OF.get(path.stem, REST)))
    if path.stem in WHOLE:
        values.append(("whole", lines.plumbing + lines.rest, WHOLE[path.stem]))
    if path.stem in FLAGS:
        step = gradient_step(path)
        values += [("functions", len(step.functions), FUNCTIONS), ("lines", step.lines, LINES)]
        values += [("depth", step.depth, DEPTH), ("in train", step.lines_in_train, None)]
    return values


def over_budget(path: Path) -> list[str]:
    """A line for each budget that the file exceeds."""
    return [f"{path.name}: {what} {x}, at most {most}" for what, x, most in measured(path) if most and x > most]


def longer_than_known(path: Path) -> list[str]:
    """A line for the plumbing and for the rest, where they exceed both their budget and what KNOWN has of the file."""
    lines, budgets = size(path), (PLUMBING, REST_OF.get(path.stem, REST))
    parts = [*zip(("plumbing", "rest"), (lines.plumbing, lines.rest), budgets, KNOWN.get(path.stem, budgets))]
    whole = WHOLE.get(path.stem, math.inf)
    parts.append(("whole", lines.plumbing + lines.rest, whole, sum(KNOWN.get(path.stem, (whole,)))))
    return [f"{path.name}: {what} {x}, at most {max(most)}" for what, x, *most in parts if x > max(most)]


def write_known() -> None:
    """Writes KNOWN, of this file, anew."""
    known = {}
    for path in sorted(ALGOS.glob("*.py")):
        lines = size(path)
        whole = lines.plumbing + lines.rest > WHOLE.get(path.stem, math.inf)
        if whole or lines.plumbing > PLUMBING or lines.rest > REST_OF.get(path.stem, REST):
            known[path.stem] = lines.plumbing, lines.rest
    rows = "".join(f'    "{name}": {lines},\n' for name, lines in known.items())
    table = f"KNOWN = {{\n{rows}}}\n" if known else "KNOWN = {}\n"
    file = Path(__file__)
    text = file.read_text(encoding="utf-8")
    file.write_text(
        re.sub(r"^KNOWN = \{(\n.*?)?\}\n", lambda _: table, text, count=1, flags=re.M | re.S), encoding="utf-8"
    )


def main(names: list[str]) -> None:
    paths = [ALGOS / f"{name}.py" for name in names] or sorted(ALGOS.glob("*.py"))
    print(f"{'':12}  docstring    plumbing        rest |  a gradient step's")
    print(f"{'':12}      lines       lines       lines |  functions       lines       depth   + in train")
    exceeded = 0
    for path in paths:
        cells = []
        try:
            values = measured(path)
        except (RuntimeError, SyntaxError) as error:
            exceeded += 1
            print(f"{path.stem:12}{error}")
            continue
        for _, x, most in values:
            exceeded += (over := bool(most) and x > most)
            cells.append(f"{x}/{most}{'!' if over else ' '}" if most else f"{x} ")
        print(f"{path.stem:12}{''.join(f'{cell:>12}' for cell in cells)}")
    print(f"{exceeded} above their budget (!)" if exceeded else "all within their budgets")
    sys.exit(exceeded > 0)


if __name__ == "__main__":
    write_known() if sys.argv[1:] == ["--write"] else main(sys.argv[1:])
