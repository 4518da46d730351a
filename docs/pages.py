"Notebooks as Markdown pages: nbdev's processors and nbconvert, and links that hold on the site"

import ast, inspect, re
from importlib import import_module
from os.path import relpath
from pathlib import Path
from textwrap import dedent, indent

import bnfreeze_fastai.all
import nbformat
from fastcore.docments import DocmentTbl
from fastcore.nbio import mk_cell, read_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, FrontmatterProc, add_links, exec_show_docs, insert_warning
from nbdev.showdoc import MarkdownRenderer

NBS = Path(__file__).resolve().parent.parent / 'nbs'


def page_name(notebook):
    "Where a notebook's page is, below the site's root: `nbs/07b_find.ipynb` is `find.md`"
    path = Path(notebook).relative_to(NBS)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.md')


def reference(symbol, name):
    "A heading to link to, signature, docstring, parameters, and the source under a fold"
    shown = MarkdownRenderer(symbol, name=name)
    signature = re.sub(r' +# .*', '', str(shown.dm))  # what the comments say is in the table
    source = indent(dedent(inspect.getsource(shown.sym)).rstrip(), '    ')
    return f"""### {name} {{ #{name.lower()} }}

```python
{signature}
```

{shown.docs}

{DocmentTbl(shown.sym)}

??? quote "Source"

    ```python
{source}
    ```"""


class render_docs(Processor):
    "Turn each `show_doc` into the reference of what the installed module has by that name; no cell of the notebook is run"

    def cell(self, cell):
        if shown := re.search(r'^show_doc\((.+)\)', cell.source or '', flags=re.M):
            module = import_module(f'{get_config().lib_name}.{page_name(self.nb.path_).stem}')
            symbol = module
            for part in shown[1].split('.'):
                symbol = getattr(symbol, part)
            cell.cell_type, cell.source = 'markdown', reference(symbol, shown[1])


class PageProcessors(FilterDefaults):
    "nbdev's own, without front matter (the title stays a heading), without running cells, and with links as they are"

    def base_procs(self):
        left_out = FrontmatterProc, insert_warning, add_links
        return [render_docs if p is exec_show_docs else p for p in super().base_procs() if p not in left_out]


def bound_names(node):
    "The names that a statement at the top of a module gives it"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).partition('.')[0] for alias in node.names]
    targets = getattr(node, 'targets', [])
    return [getattr(node, 'name', None), *(name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))]


def example_imports(nb, module):
    "Import lines for the visible cells of a module's notebook: what they have from cells that its page does not show"
    cells = [cell for cell in nb.cells if cell.cell_type == 'code']
    is_hidden = [bool(re.search(r'^#\|\s*(hide|exporti?)\b', cell.source, flags=re.M)) for cell in cells]
    visible = [ast.parse(cell.source) for cell, hidden in zip(cells, is_hidden) if not hidden]
    used = {node.id for tree in visible for node in ast.walk(tree) if isinstance(node, ast.Name)} | {'*'}
    lines, own = [], set()
    for node in (node for cell, hidden in zip(cells, is_hidden) if hidden for node in ast.parse(cell.source).body):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            own |= used & {name for name in bound_names(node) if hasattr(module, str(name))}
        elif isinstance(node, ast.Import) and '.' in node.names[0].name:  # for what it does: methods of a Learner
            lines.append(ast.unparse(node))
        elif used & {*bound_names(node)}:
            node.names = [alias for alias, name in zip(node.names, bound_names(node)) if name in used]
            lines.append(re.sub(r'^from \.', f'from {get_config().lib_name}.', ast.unparse(node)))
    lines.append(f'from {module.__name__} import {", ".join(sorted(own))}' if own else f'import {module.__name__}')
    return '\n'.join(dict.fromkeys(lines))


def with_imports(nb, module):
    "The notebook with those lines under a fold before the first example"
    first = next((i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and not c.source.startswith('#|')), None)
    if first is not None:
        fold = '??? quote "What the examples import"\n\n' + indent(f'```python\n{example_imports(nb, module)}\n```', '    ')
        nb.cells.insert(first, mk_cell(fold, 'markdown'))


def shown_output(output):
    "An output without remains of progress bars and the styles that a notebook needs for data frames; None if nothing is left"
    output = nbformat.from_dict(output)
    if output['output_type'] == 'stream':
        lines = ''.join(output['text']).splitlines(keepends=True)
        output['text'] = ''.join(line for line in lines if not re.search(r'\d<[\d:?]+\]|█', line))
        return output if output['text'].strip() else None
    if html := output.get('data', {}).get('text/html'):
        html = re.sub(r'<style.*?</style>\n?', '', ''.join(html), flags=re.S)
        output['data']['text/html'] = re.sub(r' (class="dataframe"|border="1"|style="text-align: right;")', '', html)
    return output


def shown_cell(cell):
    "A cell without directives, and without its input if they say so"
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    if cell.cell_type == 'markdown':
        return nbformat.v4.new_markdown_cell(source)
    outputs = [shown for output in cell.outputs if (shown := shown_output(output))]
    return nbformat.v4.new_code_cell('' if '#| echo: false' in cell.source else source, outputs=outputs)


def markdown(notebook):
    "Text of a notebook's page, and its pictures as a dict of path (relative to the page) to bytes; links are as in the notebook"
    nb = read_nb(notebook)
    name = page_name(notebook).stem
    if re.search(r'^#\| default_exp', '\n'.join(cell.source for cell in nb.cells), flags=re.M):
        with_imports(nb, import_module(f'{get_config().lib_name}.{name}'))
    PageProcessors()(nb)
    cells = [shown_cell(cell) for cell in nb.cells]
    page = nbformat.v4.new_notebook(cells=cells, metadata={'language_info': {'name': 'python'}})
    text, resources = MarkdownExporter().from_notebook_node(page, {'unique_key': name, 'output_files_dir': f'{name}_files'})
    return re.sub(r'```python\n+```\n', '', text), resources['outputs']


def relative(url, page):
    "What nbdev gives as `/stats.html#moved`, seen from a page"
    path, _, anchor = url.lstrip('/').partition('#')
    return f'{relpath(path, page.parent)}#{anchor}'.replace('.html', '.md')


def site_links(text, notebook):
    "Links to notebooks as links to pages, and names of what the package offers as links to their reference; all relative"
    page = page_name(notebook)

    def to_notebook(link):
        folder = NBS.parent if link['path'].startswith('nbs/') else notebook.parent
        target = page_name((folder / link['path']).resolve())
        return f']({relpath(target, page.parent)}{(link["anchor"] or "").lower()})'

    def to_reference(code):
        name = re.sub(r'^learn\.', 'Learner.', code['name'])
        url = NbdevLookup().doc(name) if '.' in name or hasattr(bnfreeze_fastai.all, name) else None
        return f'[{code[0]}]({relative(url, page)})' if url else code[0]

    prose_and_code = re.split(r'(^```.*?^```$|^    .*?$)', text, flags=re.M | re.S)
    for i in range(0, len(prose_and_code), 2):
        linked = re.sub(r'\]\((?P<path>[\w./]+\.ipynb)(?P<anchor>#[^)]*)?\)', to_notebook, prose_and_code[i])
        prose_and_code[i] = re.sub(r'(?<!\[)`(?P<name>[\w.]+)(\([^`]*\))?`', to_reference, linked)
    return ''.join(prose_and_code)
