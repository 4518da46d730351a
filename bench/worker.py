"A process that runs functions of a module, and is replaced when one of them fails or takes too long"

import time, traceback, warnings
from importlib import import_module
from multiprocessing import get_context


def work(pipe, module):
    "In that process: call what is asked for"
    warnings.simplefilter('ignore')
    functions = import_module(module)
    pipe.send('ready')
    while True:
        name, args = pipe.recv()
        try:
            pipe.send(dict(figures=getattr(functions, name)(*args)))
        except Exception as e:
            traceback.print_exc()
            pipe.send(dict(error=f'{type(e).__name__}: {e}'[:2000]))


class Worker:
    def __init__(self, module):
        self.module, self.process = module, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()

    def begin(self):
        context = get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.module))  # no daemon, as compilers start processes
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, name, args, most):
        "What the function gives, as `figures`, or `error`; and its `seconds`, of at most so many"
        if self.process is None:
            self.begin()  # which takes no time of the function's
        start = time.perf_counter()
        self.pipe.send((name, args))
        try:
            found = self.pipe.recv() if self.pipe.poll(most) else dict(error=f'TimeoutError: not done in {most:.0f} s')
        except EOFError:
            self.process.join()
            found = dict(error=f'The process ended with {self.process.exitcode}')
        if 'error' in found:
            self.end()
        return dict(seconds=time.perf_counter() - start, **found)

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None
