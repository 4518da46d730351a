"What the examples on a module's page import in cells that the page does not show"

import ast, re
from textwrap import indent

from fastcore.nbio import mk_cell

from docs.notebooks import LIB

FOLD = '??? quote "What the examples import"'


def is_hidden(cell):
    "Whether a code cell has no place on the page"
    return bool(re.match(r'#\|\s*(hide|exporti?|default_exp)\b', cell.source))


def bound_names(node):
    "The names that a statement at the top of a module gives it"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition('.')[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, 'targets', [getattr(node, 'target', node)])
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def example_imports(nb, module):
    "Import lines for the visible cells of a module's notebook: what they have from cells that its page does not show"
    cells = [cell for cell in nb.cells if cell.cell_type == 'code']
    visible = [node for cell in cells if not is_hidden(cell) for node in cell.parsed_() or []]
    used = {name.id for node in visible for name in ast.walk(node) if isinstance(name, ast.Name)} | {'*'}
    lines, own = [], set()
    for node in (node for cell in cells if is_hidden(cell) for node in cell.parsed_() or []):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= used & {name for name in bound_names(node) if hasattr(module, name)}
        elif isinstance(node, ast.Import) and '.' in node.names[0].name:  # for what it does: methods of a Learner
            lines.append(ast.unparse(node))
        elif used & {*bound_names(node)}:
            node.names = [alias for alias, name in zip(node.names, bound_names(node)) if name in used]
            lines.append(re.sub(r'^from \.', f'from {LIB}.', ast.unparse(node)))
    lines.append(f'from {module.__name__} import {", ".join(sorted(own))}' if own else f'import {module.__name__}')
    return '\n'.join(dict.fromkeys(lines))


def with_imports(nb, module):
    "The notebook with those lines under a fold before the first example"
    first = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == 'code' and not is_hidden(cell)), None)
    if first is not None:
        fold = f'{FOLD}\n\n' + indent(f'```python\n{example_imports(nb, module)}\n```', '    ')
        nb.cells.insert(first, mk_cell(fold, 'markdown'))
