"The row of a network, found in a process of its own, so that what crashes, hangs or takes all memory costs that row alone"

import multiprocessing, resource, time, warnings

import torch

from . import checks, networks

CHECKS = ['summary', 'modes', 'precompute', 'fusion', 'remedy']  # in the order in which they are made
SECONDS, MEMORY = 900, 16 * 2**30  # at most, for one network

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([__name__])  # the imports take longer than most networks


def failed(e):
    "An exception, short enough for a table"
    return f'failed: {type(e).__name__}: {" ".join(str(e).split())[:200]}'


def attempt(check, *args):
    try:
        return check(*args)
    except Exception as e:
        return failed(e)


def examine(network):
    "The row of a network, each time it grows"
    model, how, pixels = networks.smallest_input(network)
    checks.prepare(model, pixels)
    found, millions = checks.norms(model).values(), sum(p.numel() for p in model.parameters()) / 1e6
    row = dict(pixels=pixels, parameters=round(millions, 2), norms=len(found), batch_norms=len(checks.with_stats(model)))
    for name in ('summary', 'modes', 'precompute', 'fusion'):
        yield (row := row | {name: attempt(getattr(checks, f'check_{name}'), model, pixels)})
    refused = row['precompute']
    if refused.startswith('refused'):
        yield row | dict(remedy=attempt(checks.check_remedies, network, model, how, pixels, refused))


def work(network, pipe):
    "In a process of its own"
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    try:
        for row in examine(network):
            pipe.send(row)
    except Exception as e:
        pipe.send(dict(modes=failed(e)))


def find_row(network):
    "The row of a network, whatever happens to its process"
    start, row, (pipe, end) = time.monotonic(), {}, CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(network, end), daemon=True)
    process.start()
    end.close()
    try:
        while pipe.poll(max(0, start + SECONDS - time.monotonic())):
            row = pipe.recv()
        problem = f'out of time: {SECONDS} s'
    except EOFError:
        process.join()
        problem = f'crashed: exit code {process.exitcode}' if process.exitcode else None
    process.kill()
    process.join()
    if problem:
        row[next((c for c in CHECKS if c not in row), CHECKS[-1])] = problem
    return dict(zip(('source', 'family', 'network'), network)) | row | dict(seconds=round(time.monotonic() - start))
