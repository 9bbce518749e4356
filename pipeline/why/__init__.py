"""Why an operator is what it is: what two builds were made of, compared, and told in plain words.

    changes.py    two trees of components         → what changed: path, before, after
    words.py      one change                      → a sentence; a table of small functions
    evidence.py   digests and keys                → what the store and the tuning records know of them
    causes.py     two builds of the journal       → for an operator or a model: why it has another key, to the root
    likeness.py   an operator that is new         → the one that it most likely was before, and how their IR differs
    accounts.py   an artifact and its journal     → the whole account of an operator or a model
    shown.py      an account                      → text

To tell a new kind of change, write one function and its line in the table of words.py. Needs no TVM but for IR.
"""
