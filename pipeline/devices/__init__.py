"""Devices that candidates are measured on: what a target's [device] leads to. Nothing here loads TVM's compiler.

contract   what it takes to try candidates somewhere
tracker    who is there: TVM's tracker, asked over its own protocol, without TVM
identity   what devices said of themselves, remembered; how many are used at once
probes     the C that is sent along: runs a candidate in a child of its own, says what the board is
session    one connection to one device: upload, load, call, time
rpc        measuring over such sessions: what is the candidate's fault, what is the device's; waiting for it
"""
