"""Scripts, each in a new process, forked from one that has loaded the libraries which fastai needs: to load them takes seconds.

Nothing is loaded that adds to the classes of another, such as fastai, so that a script that forgets an import fails here too; `also` names
modules that are loaded nevertheless, for scripts that are known to import them."""

import atexit, functools, gc, json, os, runpy, signal, subprocess, sys, tempfile, threading, time, warnings
from contextlib import suppress
from pathlib import Path

LIBRARIES = 'IPython.display matplotlib.pyplot numpy pandas PIL.Image scipy.stats sklearn.datasets sklearn.metrics timm torch torch._dynamo torchvision'


@functools.cache
def server(also=()):
    "The process that forks, and a folder for what is said; it ends when its standard input is closed, as this process ends"
    folder = tempfile.TemporaryDirectory(prefix='warm-')
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    return subprocess.Popen([sys.executable, __file__, *also], stdin=subprocess.PIPE, env=env, text=True), folder


class Script:
    "`python script *args` as `subprocess.Popen` would start it, in a session of its own"

    def __init__(self, script, *args, folder='.', also=(), **env):
        (process, told), self.also = server(also), also
        self.args, self.told = [str(script), *map(str, args)], Path(tempfile.mkdtemp(dir=told.name))
        request = dict(args=self.args, folder=os.path.abspath(folder), env=dict(os.environ) | env, told=str(self.told))
        process.stdin.write(json.dumps(request) + '\n')
        process.stdin.flush()
        self.pid = int(self._wait_for('pid'))

    def _wait_for(self, name, timeout=float('inf')):
        until = time.monotonic() + timeout
        while not (self.told / name).exists():
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            assert server(self.also)[0].poll() is None, 'the process that forks has ended'
            time.sleep(0.01)
        return (self.told / name).read_text()

    def poll(self):
        self.returncode = int(self._wait_for('status')) if (self.told / 'status').exists() else None
        return self.returncode

    def send_signal(self, sign):
        if self.poll() is None:
            os.kill(self.pid, sign)

    def communicate(self, timeout=float('inf')):
        self.returncode = int(self._wait_for('status', timeout))
        return tuple((self.told / name).read_text() for name in ('out', 'err'))


def run(script, *args, **kwargs):
    "What `subprocess.run` gives"
    if sys.platform != 'linux':  # Windows has no fork, and on macOS what is forked may not use the system's own libraries
        folder, _ = kwargs.pop('folder', '.'), kwargs.pop('also', ())
        env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg') | kwargs
        return subprocess.run([sys.executable, str(script), *map(str, args)], cwd=folder, env=env, capture_output=True, text=True)
    process = Script(script, *args, **kwargs)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def tell(folder, name, text):
    "Write a file that is there only when it is whole"
    path = Path(folder, name)
    path.with_suffix('.part').write_text(str(text))
    path.with_suffix('.part').rename(path)


def requests():
    "What is asked for, each in a process of its own, whose parent tells its number and how it ended"
    for line in sys.stdin:
        if os.fork():
            continue
        request = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not (pid := os.fork()):
            return request
        tell(request['told'], 'pid', pid)
        tell(request['told'], 'status', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    sys.exit()


def become(request):
    "Set this process up as a newly started one"
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited: a job in the background of a shell ignores it
    for number, path in enumerate((os.devnull, *(Path(request['told'], name) for name in ('out', 'err')))):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(request['env'])
    os.chdir(request['folder'])
    tempfile.tempdir = None
    sys.modules['numpy'].random.seed()
    sys.argv, sys.path[0] = request['args'], os.path.dirname(request['args'][0])


def run_to_the_end(script):
    "As the interpreter would, but for giving memory back at the end, which takes a second for what was loaded before the fork"
    status = 0
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        status = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


if __name__ == '__main__':
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in (*LIBRARIES.split(), *sys.argv[1:]):
            with suppress(ImportError):
                __import__(name)
    gc.freeze()  # what is loaded stays, and is shared with all that is forked
    become(request := requests())
    run_to_the_end(request['args'][0])
