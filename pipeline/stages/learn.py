"""learn: candidates of a workload and how fast they are → the cost model that knows them as well."""

from __future__ import annotations

import logging
from typing import Any, cast

import msgspec

from pipeline.compiler import ir, records, search, targets
from pipeline.stages import Inputs, Options, Outputs
from pipeline.stages.search import model_of

_log = logging.getLogger(__name__)


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: function; results, JSON [[decisions, ratio], …], ratio 0 where it failed; model, where there is one;
    source, where the space is the workspace's. Options: space, target; threads, 1 where not given.

    Outputs: model. Where nothing can be learnt with (no xgboost), it holds the candidates and predicts at random.
    """
    func = ir.load(inputs["function"])
    target = targets.load(cast("dict[str, object]", options["target"]))
    space = search.of(cast(str, options["space"]), inputs.get("source"))
    timed = []
    for decisions, ratio in msgspec.json.decode(inputs["results"], type=list[tuple[Any, float]]):
        try:
            timed.append((space.make(func, target, decisions), ratio))
        except ValueError as error:  # one of another version of the space teaches nothing
            _log.warning("not learnt: %s", error)
    threads = cast(int, options.get("threads", 1))
    model = model_of(inputs).learn(records.digest_of(func), target, timed, threads)
    return {"model": model.to_bytes()}
