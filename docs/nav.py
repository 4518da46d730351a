"The menu of the site below what mkdocs.yml names by hand: what users look up, then a section for each room; mkdocs calls `on_config`"

import json, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from docs.notebooks import notebooks_of, page_name, rooms


def is_for_users(notebook):
    "Whether a notebook's prose is also its module's docstring, as it is where users come"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return any(cell['cell_type'] == 'markdown' and ''.join(cell['source']).startswith('#| export') for cell in cells)


def on_config(config):
    "Add the reference, and below it what is inside, room by room; rooms of one module stand together"
    pages = {room: notebooks_of(room) for room in rooms()}
    names = lambda found: [str(page_name(path)) for path in found]
    inside = {room: [path for path in found if not is_for_users(path)] for room, found in pages.items()}
    alone = [path for room, found in inside.items() if len(pages[room]) == 1 for path in found]
    config.nav += [
        {'Reference': names(path for found in pages.values() for path in found if is_for_users(path))},
        {'Inside': [*({room: names(found)} for room, found in inside.items() if len(pages[room]) > 1), *names(alone)]},
    ]
    return config
