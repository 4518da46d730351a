"Hands the metadata in settings.ini to setuptools"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']

setup(
    version=re.search(r'__version__ = "(.+?)"', (here/lib/'__init__.py').read_text(encoding='utf-8'))[1],
    description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'], license_expression=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=cfg['classifiers'].strip().splitlines(),
    packages=find_packages(include=[f'{lib}*']), package_data={lib: ['py.typed', 'advice.json']}, python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
