"What a page says of a function or class"

import inspect, re
from functools import reduce
from textwrap import dedent, indent

from fastcore.docments import DocmentTbl
from nbdev.process import Processor
from nbdev.showdoc import MarkdownRenderer

from docs.notebooks import module_of


def reference(symbol, name):
    "A heading to link to, signature, docstring, parameters, and the source under a fold, which is open for a named tuple"
    shown = MarkdownRenderer(symbol, name=name)
    is_tuple = hasattr(symbol, '_fields')
    table = re.sub(r'\n\| \*\*Returns\*\* \| \*\*None\*\* .*', '', str(DocmentTbl(shown.sym)))
    signature = re.sub(r' +# .*', '', str(shown.dm)) if table else shown.dm  # what the comments say is in the table
    source = indent(dedent(inspect.getsource(shown.sym)).rstrip(), '    ')
    parts = [
        f'### {name} {{ #{name.lower()} }}',
        '' if is_tuple else f'```python\n{signature}\n```',
        shown.docs,
        table,
        f'???{"+" * is_tuple} quote "Source"\n\n    ```python\n{source}\n    ```',
    ]
    return '\n\n'.join(filter(None, parts))


class render_docs(Processor):
    "Turn each `show_doc` into the reference of what the installed module has by that name; no cell of the notebook is run"

    def cell(self, cell):
        if shown := re.search(r'^show_doc\((.+)\)', cell.source or '', flags=re.M):
            symbol = reduce(getattr, shown[1].split('.'), module_of(self.nb.path_))
            cell.cell_type, cell.source = 'markdown', reference(symbol, shown[1])
