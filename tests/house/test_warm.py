"A script that is forked behaves as one that is started"

import signal, time
from pathlib import Path

import pytest, warm


def script(text):
    Path('script.py').write_text(text)
    return Path('script.py').resolve()


def test_output_arguments_folder_and_environment(tmp_path):
    path = script('import os, sys; print(sys.argv, os.getcwd(), os.environ["ADDED"], __name__); print("no", file=sys.stderr)')
    (tmp_path / 'elsewhere').mkdir()
    result = warm.run(path, 1, 'b', folder='elsewhere', ADDED='yes')
    assert result.stdout == f"{[str(path), '1', 'b']} {tmp_path / 'elsewhere'} yes __main__\n"
    assert (result.returncode, result.stderr) == (0, 'no\n')


@pytest.mark.parametrize(
    'text,status,word', [('1 / 0', 1, 'ZeroDivisionError'), ('import sys; sys.exit(3)', 3, ''), ('exit("bad")', 1, 'bad')]
)
def test_failures_are_told(text, status, word):
    result = warm.run(script(text))
    assert result.returncode == status and word in result.stderr


@pytest.mark.parametrize('missing', ['import conftest', 'from fastai.learner import Learner; Learner.fit_one_cycle'])
def test_what_a_script_does_not_import_is_not_there(missing):
    assert warm.run(script(missing)).returncode == 1


def test_what_is_to_be_done_at_the_end_is_done():
    warm.run(
        script('import atexit; atexit.register(open, "done", "w"); import weakref; a = set; weakref.finalize(a, open, "that too", "w")')
    )
    assert Path('done').exists() and Path('that too').exists()


def test_ctrl_c_reaches_it():
    process = warm.Script(script('import time\nprint("on", flush=True)\ntime.sleep(60)'))
    while not (process.told / 'out').exists() or not (process.told / 'out').read_text():
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in process.communicate(timeout=20)[1] and process.returncode
