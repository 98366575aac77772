"""Tells whether a module computes what a well-known one does, by comparing their code.

transformers writes each architecture out in full, so most attention and MLP modules are copies of Llama's. Code is
compared as syntax trees, without docstrings, annotations and decorators.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys

from torch import nn


class _Bare(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list, node.returns = [], None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value is not None else ast.Pass()


@functools.lru_cache(maxsize=64)
def _functions(module_name: str) -> dict[str, str]:
    """Functions (`name`) and methods (`Class.name`) of a Python module, each as a dump of its syntax tree."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (OSError, TypeError, KeyError):
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(_Bare().visit(node))
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found[f"{node.name}.{item.name}"] = ast.dump(_Bare().visit(item))
    return found


def same_forward(module: nn.Module, reference: type[nn.Module], *helpers: str) -> bool:
    """Whether `module` has the code of `reference.forward` itself (not inherited), and the functions `helpers` of its
    Python module are those of the reference's."""
    kind = type(module)
    mine, theirs = _functions(kind.__module__), _functions(reference.__module__)
    code = mine.get(f"{kind.__name__}.forward")
    return (
        code is not None
        and code == theirs.get(f"{reference.__name__}.forward")
        and all(name in mine and mine[name] == theirs.get(name) for name in helpers)
    )
