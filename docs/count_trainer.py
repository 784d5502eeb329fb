"""Count what makes a trainer hard to read: its lines, imports and comments, and the size of its loop.

    python docs/count_trainer.py train_accelerate.py [OTHER_TRAINER.py ...]

Prints a row of a table for each file. The loop is the longest `for` or `while` statement of the file. The names that a
loop reads are those that are bound outside of the loop (too). The width of a code line includes its indent. `main` is
the function of that name, if there is one: its names are those that it binds itself.
"""

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path


def count(path: Path) -> dict[str, str]:
    """The row of one trainer."""
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    code = [i for i, line in enumerate(lines, start=1) if line.strip() and not line.strip().startswith("#")]
    loop = max((node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While)), key=size)
    in_loop = range(loop.lineno, loop.end_lineno + 1)
    mains = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "main"]
    return {
        "trainer": path.name,
        "lines": str(len(lines)),
        "imports": str(sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))),
        "loop, lines": str(len(in_loop)),
        "loop, code lines": str(sum(i in in_loop for i in code)),
        "names the loop reads": str(len(names_read(loop, tree))),
        "names that main binds": str(len(names_bound(mains[0]))) if mains else "–",
        "mean width of a code line": f"{statistics.mean(len(lines[i - 1]) for i in code):.0f}",
        "lines with a comment": f"{len(comments) / len(lines):.0%}",
    }


def size(node) -> int:
    return node.end_lineno - node.lineno


def names_read(loop: ast.AST, tree: ast.Module) -> set[str]:
    """The names that a loop reads and that are bound outside of it, perhaps by an import."""
    inside = {id(node) for node in ast.walk(loop)}
    bound = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    return {
        node.id for node in ast.walk(loop) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    } & bound


def names_bound(function: ast.FunctionDef) -> set[str]:
    """The names that a function binds: its arguments, its variables and the functions in it, but not the latter's."""
    bound = {argument.arg for argument in function.args.args + function.args.kwonlyargs}
    unseen = list(function.body)
    while unseen:
        node = unseen.pop()
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp):
            continue  # these have names of their own
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        unseen.extend(ast.iter_child_nodes(node))
    return bound


def main() -> None:
    rows = [count(Path(name)) for name in sys.argv[1:]]
    if not rows:
        sys.exit("name the trainers to count: python docs/count_trainer.py train_accelerate.py")
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
