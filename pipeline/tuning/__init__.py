"""`doit tune`, apart from what a person sees of doit: what a night of tuning does, without TVM.

    records    what is kept of every trial, and what follows from a set of them: the best, what was spent
    ledger     the sets of records in the store
    operators  which operators of built models there is anything to gain for
    states     operators as a night sees them: numbers, and curves
    scheduler  which operator the next batch of trials is for, and which have ended
    night      the loop: propose, build, measure, retest, write down; stopped at any time, it loses a batch at most
    batch      one batch and its course at a post; posts: where it is measured; calls: how that is waited for;
               claims: that no other run has its operator;
               account: what is counted and told of it
    events     what happens in it, and who is told
    engine     how candidates are measured, by whatever runs stages; workshop: where they are made; candidates: how;
               lessons: what cost models learn from them
    local      nights of a workspace
    fakes      an engine that does none of that, for tests and simulations
    face       what one sees: a live table, plain lines, events
    standings  what is known of each operator; databases: records from and for MetaSchedule

Tuning only ever adds records. What a build takes from them is another matter: pipeline.composition.
"""
