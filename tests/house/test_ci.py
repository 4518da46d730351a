"`.ci/run` gives the README's commands, then `make long` and `make oldest`, in a clone, and leaves nothing, on a small repository in place of this one"

import os, shutil, signal, subprocess, time

import pytest
from conftest import on_linux, ROOT

pytestmark = [pytest.mark.slow, on_linux]

README = """# Toy

## Try it

```sh
git clone <this repository> bnfreeze_fastai && cd bnfreeze_fastai
make demo   # the demo
make test   # the tests
make docs-serve
```
"""
MAKEFILE = """
demo:
	@echo demo in $(notdir $(CURDIR)): $$(ls)
	@python3 -c 'import os; print(sorted(os.environ.items()))'
test:
	@echo "test: $$(ls -A $$HOME $$TMPDIR | wc --lines)"
long:
	@echo the long tests
oldest:
	@echo the oldest versions
docs-serve:
	@echo never
"""


@pytest.fixture
def checkout(tmp_path):
    "A repository with the script, one commit, something uncommitted and an environment, in a folder with another name"
    folder = tmp_path / 'my checkout'
    (folder / '.ci').mkdir(parents=True)
    shutil.copy(ROOT / '.ci' / 'run', folder / '.ci')
    change(folder, README=README, Makefile=MAKEFILE)
    (folder / 'uncommitted').touch()
    (folder / '.venv').mkdir()
    (folder / '.venv' / 'installed').touch()
    return folder


def change(folder, README=README, Makefile=MAKEFILE):
    (folder / 'README.md').write_text(README)
    (folder / 'Makefile').write_text(Makefile)
    identity = ['-c', 'user.name=Toy', '-c', 'user.email=toy@localhost', '-c', 'commit.gpgsign=false']
    for command in (['init', '--quiet'], ['add', '.ci', 'README.md', 'Makefile'], [*identity, 'commit', '--quiet', '--message', 'toy']):
        subprocess.run(['git', *command], cwd=folder, check=True)


def started(folder):
    "The script, with a temporary folder that it has to leave empty and settings that it must not hand on"
    (folder.parent / 'tmp').mkdir(exist_ok=True)
    environment = dict(os.environ, TMPDIR=str(folder.parent / 'tmp'), PYTHONPATH='somewhere', VIRTUAL_ENV='somewhere', PIP_RETRIES='7')
    command = [folder / '.ci' / 'run']
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run(folder):
    process = started(folder)
    said = process.communicate()[0]
    assert not os.listdir(folder.parent / 'tmp')
    return process.returncode, said


def test_commands_run_in_a_clone_without_what_is_around_it(checkout):
    status, said = run(checkout)
    assert status == 0, said
    assert 'demo in bnfreeze_fastai: Makefile README.md\n' in said and 'test: ' in said and 'never' not in said
    assert "('CI', 'true')" in said and "('PIP_RETRIES', '7')" in said and 'PYTHONPATH' not in said and 'VIRTUAL_ENV' not in said
    steps = ['== make demo', '== make test', '== make long', 'the long tests', '== make oldest', 'the oldest versions']
    assert sorted(steps, key=said.index) == steps
    home = said.partition("('HOME', '")[2].partition("'")[0]
    assert home.startswith(str(checkout.parent / 'tmp')) and home != os.environ.get('HOME')


@pytest.mark.parametrize('target', ['demo', 'test', 'long', 'oldest'])
def test_a_command_that_fails_fails_the_run(checkout, target):
    change(checkout, Makefile=MAKEFILE.replace(f'\n{target}:', f'\n{target}:\n\t@exit 3'))
    status, said = run(checkout)
    assert status == 2 and 'Error 3' in said


@pytest.mark.parametrize(
    'readme', [README.replace('make demo', 'make it'), README.replace('Try it', 'Use it'), README.replace('make test', '')]
)
def test_commands_that_the_readme_does_not_give_fail_the_run(checkout, readme):
    change(checkout, README=readme)
    status, said = run(checkout)
    assert status == 1 and '"Try it"' in said and 'demo in' not in said


def test_what_is_written_elsewhere_fails_the_run(checkout):
    stray = checkout.parent / 'stray'
    change(checkout, Makefile=MAKEFILE.replace('\ntest:', f'\ntest:\n\t@touch {stray}'))
    status, said = run(checkout)
    assert (status == 1 and f'\n{stray}\n' in said) if os.getuid() == 0 else 'nobody looked' in said


@pytest.mark.parametrize('sign', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_run_that_is_stopped_leaves_nothing(checkout, sign):
    change(checkout, Makefile=MAKEFILE.replace('\ntest:', '\ntest:\n\t@touch started; sleep 60'))
    process = started(checkout)
    while not list((checkout.parent / 'tmp').rglob('started')):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.Signals[sign])
    process.communicate(timeout=20)  # its output is closed only when all that it started has ended
    assert process.returncode == 128 + signal.Signals[sign] and not os.listdir(checkout.parent / 'tmp')
