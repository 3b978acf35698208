# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations that fail in all ways: python3 -m lab.faults.

cases      what is done to which migration: drawn from a seed, and a fixed set
proxy      a channel between two QEMUs that breaks where it is told to
failcalls  system calls of a QEMU that fail: the other side of fail-calls.c
sides      the QEMUs, with RAM of each kind, and what they hold
peek       accesses to the RAM of a running process, while postcopy is active
attempt    one migration, from its start until nothing more can come of it
known      what QEMU 10.0 does wrong without our patches as well
verdict    what has to hold then
run        a whole case: guests, migration, verdict, a second attempt
live       the same with a guest that writes all the time
report     what came of many cases, as text
"""
