"Notebooks as Markdown pages, by nbdev's processors and nbconvert"

import re

import nbformat
from fastcore.nbio import read_nb
from nbconvert import MarkdownExporter
from nbdev.processors import FilterDefaults, FrontmatterProc, add_links, exec_show_docs, insert_warning

from docs.imports import with_imports
from docs.notebooks import in_repository, module_of, page_name
from docs.reference import render_docs


class PageProcessors(FilterDefaults):
    "nbdev's own, without front matter (the title stays a heading), without running cells, and with links as they are"

    def base_procs(self):
        left_out = FrontmatterProc, insert_warning, add_links
        return [render_docs if p is exec_show_docs else p for p in super().base_procs() if p not in left_out]


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


@in_repository
def page_cells(notebook):
    "The cells that have a place on a notebook's page, still with their directives"
    nb = read_nb(notebook)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'raw']
    if any(re.match(r'#\| default_exp', cell.source) for cell in nb.cells):
        with_imports(nb, module_of(notebook))
    PageProcessors()(nb)
    return nb.cells


def shown_cell(cell):
    "A cell without directives, and without its input if they say so"
    source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    if cell.cell_type == 'markdown':
        return nbformat.v4.new_markdown_cell(source)
    outputs = [shown for output in cell.outputs if (shown := shown_output(output))]
    metadata = {'transient': {'remove_source': '#| echo: false' in cell.source}}
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata)


def markdown(notebook):
    "Text of a notebook's page, and its pictures as a dict of path (relative to the page) to bytes; links are as in the notebook"
    cells = [shown_cell(cell) for cell in page_cells(notebook)]
    page = nbformat.v4.new_notebook(cells=cells, metadata={'language_info': {'name': 'python'}})
    name = page_name(notebook).stem
    text, resources = MarkdownExporter().from_notebook_node(page, {'unique_key': name, 'output_files_dir': f'{name}_files'})
    return text, resources['outputs']
