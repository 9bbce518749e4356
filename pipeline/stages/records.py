"""records: a MetaSchedule database and workloads → the records of each workload."""

from __future__ import annotations

from pipeline.compiler import ir, records
from pipeline.stages import Inputs, Options, Outputs


def run(inputs: Inputs, options: Options) -> Outputs:
    """Inputs: workloads and records, a database's two files; f<digest>, the functions of workloads.

    Outputs: g<digest>, for each workload that the database has records of; unread, how many lines cannot be read;
    foreign, how many records are of none of the workloads.
    """
    groups, unread = records.read_database(inputs["workloads"], inputs["records"])
    asked = {name[1:]: records.digest_of(ir.load(inputs[name])) for name in inputs if name[0] == "f"}
    outputs = {f"g{name}": groups[digest].to_bytes() for name, digest in asked.items() if digest in groups}
    foreign = sum(len(group.records) for digest, group in groups.items() if digest not in asked.values())
    return {**outputs, "unread": str(unread).encode(), "foreign": str(foreign).encode()}
