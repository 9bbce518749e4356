"""All that knows TVM. Nothing outside this package imports it, and of this package only what runs in a worker does.

ir          the normal form of a PrimFunc, its digest and structural hash
targets     a target as written → as TVM understands it
frontends   a model → a Relax module without weights, and the weights
passes      our own Relax passes
lowering    a Relax module → bytecode objects and unique workloads
strategies  K0 passes: a workload → a scheduled PrimFunc, or not applicable
search      search spaces: a workload and what was tried → candidates
records     MetaSchedule's records, grouped by workload; exchange: to and from our own
objects     a PrimFunc → an object file
"""
