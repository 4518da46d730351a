"The menu of the site below what mkdocs.yml names by hand: a section for each room of the package; mkdocs calls `on_config`"

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from docs.notebooks import notebooks_of, page_name, rooms


def on_config(config):
    "Add the rooms, those that are one module together"
    pages = {room: [str(page_name(path)) for path in notebooks_of(room)] for room in rooms()}
    single = [page for room in pages.values() if len(room) == 1 for page in room]
    config.nav += [{'Modules': single}, *({room: found} for room, found in pages.items() if len(found) > 1)]
    return config
