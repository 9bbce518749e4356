"""A simulated cluster: a thousand hosts that do no work, and all that stands between them and a night of tuning.

`__main__.py` says what is real, what is fake and how to run it; docs/scale.md what came of it. One row of the table is
made from top to bottom:

    given.py        what is simulated: so many workers, operators, seconds of a stage, bytes of a blob
    simulation.py   starts the processes, marks when a window begins and ends, stops them
    pipes.py          what it and a process of it say to each other
    cluster.py        dask's processes: schedulers, and hosts with their workers
    work.py             what a worker does in place of a stage: waits, and answers with random bytes
    driver.py         a driver's process: a night, its scheduler, memoizer, store and DaskExecutor
    engine.py           the night's engine, which gives the orders that the real one gives
    counts.py         what each of them counts: seconds of processors, memory, messages and bytes
    row.py          what the counts at both marks come to: the figures, and the table's line

Three smaller questions are asked without a cluster, each in a file of its own: `paper.py`, what so many workers take by
arithmetic; `decisions.py`, how fast our scheduler is alone; `claims.py`, what a claim of an operator asks of a remote.
"""
