"""Processes that are killed, and what they leave behind"""

import atexit, os, re, shutil, signal, sys, tempfile, threading, time, traceback
from multiprocessing import connection, get_context
from pathlib import Path

import psutil

SHM = Path('/dev/shm')
_fork = get_context('fork')  # everything is imported already, so that a victim starts in no time


class Victim:
    "A process in a session and with a TMPDIR of its own that runs `f(tell, *args)` in `folder/work`"

    def __init__(self, f, *args, folder):
        self.folder, self.told, self.pids = Path(folder), [], set()
        for name in ('work', 'tmp'):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.pipe, theirs = _fork.Pipe(duplex=False)
        self.process = _fork.Process(target=_run, args=(self.folder, theirs, f, args))
        self.process.start()
        theirs.close()
        self.wait('started')  # its session is made

    def wait(self, word=None, seconds=120):
        "Until it tells `word`, ends, or the time is over; returns whether it is still there"
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = connection.wait([self.process.sentinel, *([] if self.pipe is None else [self.pipe])], left)
            if self.pipe in ready:
                if self._read() == word is not None:
                    return True
            elif ready:
                return False
        return self.process.is_alive()

    def _read(self):
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.pipe = None
            return None
        self.told.append((time.monotonic(), *message))
        return message[0]

    def kill(self):
        "SIGKILL to the whole session, and wait until it is gone"
        while alive := session(self.process.pid):
            self.pids |= alive
            for pid in alive:
                _kill(pid)
            self.process.join(0.01)
        self.process.join()
        self._drain()

    def end(self, seconds=240):
        "Let it end; what `f` returned, or `None` if it failed or had to be killed"
        self.pids |= session(self.process.pid)
        if self.wait(seconds=seconds):
            self.told.append((time.monotonic(), 'error', f'still running after {seconds} seconds'))
            self.kill()
        until = time.monotonic() + 10
        while session(self.process.pid) and time.monotonic() < until:  # helpers that clean up behind it
            time.sleep(0.02)
        self._drain()
        return next(iter(self.all('result')), None)

    def _drain(self):
        while self.pipe is not None and self.pipe.poll():
            self._read()

    def all(self, word):
        "What it told under `word`"
        return [rest[0] if rest else None for _, w, *rest in self.told if w == word]

    def seconds_between(self, begin, end):
        "The longest time from one word to the other"
        begins, ends = ([t for t, w, *_ in self.told if w == word] for word in (begin, end))
        return max((b - a for a, b in zip(begins, ends)), default=0)


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def session(pid):
    "The living processes of the session that `pid` leads"
    found = set()
    for p in psutil.process_iter():
        try:
            if os.getsid(p.pid) == pid and p.status() != psutil.STATUS_ZOMBIE:
                found.add(p.pid)
        except (ProcessLookupError, psutil.NoSuchProcess, PermissionError):
            pass
    return found


def _run(folder, pipe, f, args):
    os.setsid()
    log = os.open(folder / 'log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
    os.chdir(folder / 'work')
    os.environ['TMPDIR'] = tempfile.tempdir = str(folder / 'tmp')
    tell = lambda *message: pipe.send(message)
    tell('started')
    try:
        tell('result', f(tell, *args))
    except BaseException:
        tell('error', traceback.format_exc()[-3000:])
    threading._shutdown()  # these two as at the end of a program; `multiprocessing` does not run all of that
    atexit._run_exitfuncs()


def in_shm():
    return {p.name for p in SHM.iterdir()} if SHM.exists() else set()


def left_behind(folder, pids, before):
    "What killed or ended processes `pids` left in their TMPDIR, and in shared memory beyond what was there `before`"
    shm = [n for n in in_shm() - before if {int(d) for d in re.findall(r'\d+', n)} & pids]
    return sorted([f'tmp/{p.name}' for p in (folder / 'tmp').iterdir()] + [f'shm/{n}' for n in shm])


def clear_shm(names):
    "Remove from shared memory what joblib leaves there when all of its processes are killed"
    for path in (SHM / n for n in names):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
