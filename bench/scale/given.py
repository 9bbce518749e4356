"""What is simulated: the numbers that every process of a simulation is handed, and that `--help` lists as options."""

from __future__ import annotations

from dataclasses import dataclass

DEVICE = "simulated"  # that all workers say they have, and that all operators are measured on


@dataclass(frozen=True)
class Given:
    """Seconds of a stage are of one core, by candidate; sizes are bytes of one blob."""

    workers: int = 10
    operators: int = 100_000
    seconds: float = 30.0  # that are looked at, after `warm`
    warm: float = 20.0
    batch: int = 16
    together: int = 0  # candidates that one order compiles; 0: as many as `doit tune` gives it
    speed: float = 1.0
    hosts: int = 2  # processes that hold the workers
    drivers: int = 1
    schedulers: int = 1  # of dask's: each has its share of the workers and of the drivers
    at_once: int = 0  # batches in preparation, `-j` of `doit tune`; 0: as many as the executor takes
    log: int = 0  # messages of each connection that dask keeps, with what is in them; 0: as tvmake has it
    search: float = 0.085
    codegen: float = 0.15
    measure: float = 0.05
    learn: float = 0.5  # a lesson
    function: int = 20_000
    object: int = 20_000
    seed: int = 0
