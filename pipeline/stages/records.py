"""records: a MetaSchedule database and workloads → the records of each workload."""

from __future__ import annotations

from pipeline.compiler import ir, records
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: workloads and records, a database's two files; f<digest>, the functions of workloads.

    Outputs: g<digest>, for each workload that the database has records of; unread, how many lines cannot be read.
    """
    groups, unread = records.read_database(inputs["workloads"], inputs["records"])
    outputs = {"unread": str(unread).encode()}
    for name in inputs:
        if name[0] == "f":
            group = groups.get(records.digest_of(ir.load(inputs[name])))
            if group is not None:
                outputs[f"g{name[1:]}"] = group.to_bytes()
    return outputs
